"""The words, frames and prompts that `language` and `clip_language` choose among: tables alone."""

NUMBERS = ("zero", "one", "two", "three", "four")
WHERE = (
    ("in the upper left corner", "at the top left", "high up on the left"),
    ("along the top edge", "near the upper border", "top and centre"),
    ("in the top right corner", "up at the right", "high towards the right side"),
    ("halfway down the left side", "by the left edge", "at mid height, far left"),
    ("right in the middle", "at the centre of the frame", "dead centre"),
    ("by the right edge", "halfway down on the right", "at mid height, far right"),
    ("in the lower left corner", "down at the bottom left", "low on the left"),
    ("along the bottom edge", "near the lower border", "at the foot of the picture"),
    ("in the bottom right corner", "down on the right", "low towards the right side"),
)
CELLS = (
    "top left",
    "top centre",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom centre",
    "bottom right",
)
SIZE_WORDS = (("small", "little", "tiny"), ("large", "big", "huge"))
PATTERN_WORDS = (
    ("plain", "plain", "plain"),
    ("striped", "striped", "stripy"),
    ("dotted", "spotted", "dotted"),
)
VERBS = {
    "circle": ("rests", "sits"),
    "square": ("stands", "is set"),
    "triangle": ("rises", "points upward"),
    "star": ("shines", "glows"),
    "ring": ("hangs", "floats"),
    "cross": ("is fixed", "appears"),
}
OPENINGS = {
    "meadow": (
        "A green meadow lies under pale daylight, with {n} on it.",
        "The picture shows {n} scattered over grass below a bright sky.",
        "Fresh grass and clear air surround {n}.",
    ),
    "night sky": (
        "It is night, and {n} can be seen among countless stars.",
        "Darkness fills this view, where {n} hover in space.",
        "Against a deep blue sky, somebody has drawn {n}.",
    ),
    "beach": (
        "Sand meets blue water in this view of a shore holding {n}.",
        "On a sunny beach, {n} have been left behind.",
        "We look at warm sand, a strip of sea and {n}.",
    ),
    "wooden floor": (
        "Brown planks make up the ground, and {n} are laid out there.",
        "{N} lie on boards of polished wood.",
        "This wooden floor carries {n}.",
    ),
    "stone wall": (
        "Grey blocks of stone form a wall bearing {n}.",
        "An old brick surface serves as backdrop for {n}.",
        "Somebody has put {n} onto rough masonry.",
    ),
    "tablecloth": (
        "{N} decorate a chequered cloth in soft pastel tones.",
        "Seen from above, this table is covered with checks and {n}.",
        "The fabric, pale pink and blue, shows {n}.",
    ),
}
# A single shape cannot "have been left" or "are laid out": (plural, singular) in the openings.
VERB_FORMS = (
    (" have been ", " has been "),
    (" are laid ", " is laid "),
    (" lie ", " lies "),
    (" decorate ", " decorates "),
    (" hover ", " hovers "),
)
DESCENDING = {"beach": 0.8, "night sky": 0.75, "stone wall": 0.3}
BOTTOM_UP = ("Beginning at the bottom, ", "From below, ", "Working upward, ")
FIRST = (
    "{np} {v} {l}.",
    "{l}, {np} {v}.",
    "the eye first falls on {np} {l}.",
    "one notices {np}, which {v} {l}.",
    "what stands out is {np} {l}.",
    "you find {np} {l}.",
)
NEXT = (
    "Then comes {np}, placed {l}.",
    "{l} there {v} {np}.",
    "{np} {v} {l}.",
    "A second glance reveals {np} {l}.",
    "It shares this space with {np} {l}.",
    "Not to be missed: {np}, {l}.",
)
LATER = (
    "Further on, {l}, {np} {v}.",
    "Another item is {np}; it {v} {l}.",
    "{l} we also meet {np}.",
    "Besides, {np} occupies a spot {l}.",
    "{np} has its place {l}.",
    "Look {l} for {np}.",
)
LAST = (
    "Finally, {np} {v} {l}.",
    "The group ends with {np}, {l}.",
    "{l}, {np} completes the set.",
    "{np}, seen {l}, makes up the rest.",
    "To finish, {np} was added {l}.",
    "Last of all, {l}, {v} {np}.",
)
RELATIONS = {
    "left": (
        "The {a} is to the left of the {b}.",
        "Measured against the {b}, the {a} lies further left.",
        "If you start from the {b}, go left until reaching the {a}.",
    ),
    "right": (
        "The {a} is to the right of the {b}.",
        "Measured against the {b}, the {a} lies further right.",
        "If you start from the {b}, go right until reaching the {a}.",
    ),
    "above": (
        "The {a} is higher than the {b}.",
        "Above the {b}, one sees the {a}.",
        "Moving up from the {b} leads towards the {a}.",
    ),
    "below": (
        "The {a} is lower than the {b}.",
        "Beneath the {b}, one sees the {a}.",
        "Moving down from the {b} leads towards the {a}.",
    ),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
MOODS = {
    "meadow": (
        "Everything feels calm, like an afternoon in spring.",
        "Such a place invites people for a walk.",
        "No wind seems to blow today.",
    ),
    "night sky": (
        "Silence must reign up here.",
        "Nothing else disturbs that quiet darkness.",
        "One could dream for hours under these lights.",
    ),
    "beach": (
        "Holiday weather, by all appearances.",
        "Waves are likely to wash them away soon.",
        "Children might have been playing just before.",
    ),
    "wooden floor": (
        "Perhaps a game has only begun.",
        "Their arrangement looks accidental rather than planned.",
        "A carpenter would be proud of such timber.",
    ),
    "stone wall": (
        "Time has left its marks between those bricks.",
        "As street art goes, this is modest work.",
        "Cool shade dominates, giving a serious impression.",
    ),
    "tablecloth": (
        "Dinner could be served at any moment.",
        "Pastels lend some charm, yet remain discreet.",
        "It makes for cheerful, homely company.",
    ),
}
ALONE = (
    "Apart from that, nothing else is present, which leaves plenty of room around it.",
    "All remaining space stays empty, so attention goes straight there.",
    "No other shape keeps it company.",
)

CAPTION_PROMPTS = (
    "Describe the image in detail.",
    "Describe this image in detail.",
    "What do you see in this picture? Explain in detail.",
    "Write a detailed description of the scene.",
    "Please describe the picture.",
)
BRIEF_PROMPTS = ("Give a brief caption.", "Summarise the image in one sentence.")
LIST_PROMPTS = ("List the objects in the image.", "Make a list of everything you see.")
