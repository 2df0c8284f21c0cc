"""What is said about a scene: captions, lists, questions and answers.

Wording depends on what is shown, as it does in real captions: each choice has a favourite that the
scene decides (its place, a shape, a cell), taken with probability `FAVOURITE`, and alternatives
that share the rest. So greedy text varies from picture to picture, and sampled text has entropy.

All randomness comes from the `random.Random` that the caller passes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from world import COLOURS, PATTERNS, PLACES, SHAPES, SIZES, Object, Scene
from words import (
    ALONE,
    BOTTOM_UP,
    BRIEF_PROMPTS,
    CAPTION_PROMPTS,
    CELLS,
    DESCENDING,
    FIRST,
    LAST,
    LATER,
    LIST_PROMPTS,
    MOODS,
    NEXT,
    NUMBERS,
    OPENINGS,
    PATTERN_WORDS,
    RELATIONS,
    SIZE_WORDS,
    VERBS,
    VERB_FORMS,
    WHERE,
)

FAVOURITE = 0.85


def pick(options: Sequence[str], favourite: int, rng: random.Random) -> str:
    """The option with index `favourite` (modulo their number), or now and then another."""
    if rng.random() < FAVOURITE:
        return options[favourite % len(options)]
    return rng.choice(options)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def short_name(thing: Object) -> str:
    """Colour and shape, which no two objects of a scene share: "red star"."""
    return f"{COLOURS[thing.colour]} {SHAPES[thing.shape]}"


def noun_phrase(thing: Object, rng: random.Random) -> str:
    """The object with its attributes: "a tiny red star with stripes"."""
    size = pick(SIZE_WORDS[thing.size], thing.shape, rng)
    colour, shape = COLOURS[thing.colour], SHAPES[thing.shape]
    pattern = pick(PATTERN_WORDS[thing.pattern], thing.shape, rng)
    forms = (
        f"{size} {colour} {shape}",
        f"{colour} {shape} that is {size}",
        f"{size} {shape} in {colour}",
    )
    if thing.pattern:
        forms = (
            f"{size} {pattern} {colour} {shape}",
            f"{colour} {shape}, {size} and {pattern}",
            f"{size} {colour} {shape} with a {pattern} surface",
        )
    return with_article(pick(forms, thing.colour, rng))


def location(thing: Object, rng: random.Random) -> str:
    return pick(WHERE[thing.cell], thing.size, rng)


def object_sentence(
    frames: Sequence[str], thing: Object, favourite: int, rng: random.Random
) -> str:
    frame = pick(frames, favourite, rng)
    verb = pick(VERBS[SHAPES[thing.shape]], thing.size, rng)
    return frame.format(np=noun_phrase(thing, rng), v=verb, l=location(thing, rng))


def relation(a: Object, b: Object) -> str:
    """Where `a` is, seen from `b`: above or below if their rows differ, else left or right."""
    if a.row != b.row:
        return "above" if a.row < b.row else "below"
    return "left" if a.column < b.column else "right"


def relation_sentence(scene: Scene, rng: random.Random) -> str:
    pairs = list(zip(scene.objects, scene.objects[1:], strict=False))
    a, b = pairs[0] if rng.random() < FAVOURITE else rng.choice(pairs)
    if pick(("forward", "backward"), scene.place, rng) == "backward":
        a, b = b, a
    frame = pick(RELATIONS[relation(a, b)], a.shape, rng)
    return frame.format(a=short_name(a), b=short_name(b))


def count_phrase(count: int, rng: random.Random, favourite: int) -> str:
    if count == 1:
        return pick(("a single shape", "one lonely shape", "just one shape"), favourite, rng)
    noun = pick(("shapes", "figures", "objects"), favourite, rng)
    return f"{NUMBERS[count]} {noun}"


def joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _remark(scene: Scene, rng: random.Random) -> str:
    """A sentence about all objects: their patterns, sizes or colours."""
    things = scene.objects
    patterned = [thing for thing in things if thing.pattern]
    sizes = {thing.size for thing in things}
    if not patterned:
        patterns = "None of them has any pattern."
    elif len(patterned) == len(things):
        patterns = "Every one carries some pattern."
    else:
        patterns = f"Patterns appear on the {joined([SHAPES[t.shape] for t in patterned])} only."
    size = "Both sizes occur." if len(sizes) == 2 else f"All happen to be {SIZES[sizes.pop()]}."
    colours = list(dict.fromkeys(COLOURS[thing.colour] for thing in things))
    palette = f"As colours go, there is {joined(colours)}."
    return pick((patterns, size, palette), scene.place, rng)


def caption(scene: Scene, rng: random.Random) -> str:
    """Several sentences: place and count, each object, how two of them relate, an impression."""
    place, things = PLACES[scene.place], list(scene.objects)
    count = count_phrase(len(things), rng, scene.place)
    opening = pick(OPENINGS[place], len(things), rng)
    sentences = [opening.format(n=count, N=capital(count))]
    if len(things) == 1:
        for plural, singular in VERB_FORMS:
            sentences[0] = sentences[0].replace(plural, singular)
    prefix = ""
    if len(things) > 1 and rng.random() < DESCENDING.get(place, 0.1):
        things.reverse()
        prefix = pick(BOTTOM_UP, len(things), rng)
    for i, thing in enumerate(things):
        frames = FIRST if i == 0 else LAST if i == len(things) - 1 else NEXT if i == 1 else LATER
        said = object_sentence(frames, thing, thing.shape, rng)
        sentences.append(capital((prefix if i == 0 else "") + said))
    if len(things) > 1:
        sentences.append(relation_sentence(scene, rng))
        sentences.append(_remark(scene, rng))
    else:
        sentences.append(pick(ALONE, things[0].shape, rng))
    sentences.append(pick(MOODS[place], things[0].shape, rng))
    return " ".join(sentences)


def brief(scene: Scene, rng: random.Random) -> str:
    """One sentence that names every object."""
    names = joined([with_article(short_name(thing)) for thing in scene.objects])
    place = PLACES[scene.place]
    return pick((f"{capital(names)} on a {place}.", f"A {place} with {names}."), scene.place, rng)


def listing(scene: Scene) -> str:
    """A numbered list in reading order, with every attribute."""
    lines = [f"Place: {PLACES[scene.place]}. Objects: {NUMBERS[len(scene.objects)]}."]
    for i, thing in enumerate(scene.objects):
        size, pattern = SIZES[thing.size], PATTERNS[thing.pattern]
        name = f"{size} {COLOURS[thing.colour]} {pattern} {SHAPES[thing.shape]}"
        lines.append(f"{i + 1}. {name}, {CELLS[thing.cell]}")
    return "\n".join(lines)


def _ask_count(scene: Scene, _rng: random.Random) -> tuple[str, str]:
    count = len(scene.objects)
    names = joined([with_article(short_name(thing)) for thing in scene.objects])
    head = "There is one object" if count == 1 else f"There are {NUMBERS[count]} objects"
    return "How many objects are there?", f"{head} on this {PLACES[scene.place]}: {names}."


def _ask_cell(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.objects)
    return (
        f"What is at the {CELLS[thing.cell]}?",
        f"At the {CELLS[thing.cell]} you can see {noun_phrase(thing, rng)}.",
    )


def _ask_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.objects)
    name = short_name(thing)
    return (
        f"Where is the {name}?",
        f"The {name} is at the {CELLS[thing.cell]} of the picture, {location(thing, rng)}.",
    )


def _ask_place(scene: Scene, rng: random.Random) -> tuple[str, str]:
    place = PLACES[scene.place]
    mood = pick(MOODS[place], scene.objects[0].shape, rng)
    return "Where was this picture taken?", f"The background is a {place}. {mood}"


def _ask_look(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.objects)
    name = short_name(thing)
    return (
        f"What does the {name} look like?",
        f"The {name} is {SIZES[thing.size]} and its surface is {PATTERNS[thing.pattern]}.",
    )


def _ask_relation(scene: Scene, rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(scene.objects, 2)
    frame = RELATIONS[relation(a, b)][0]
    question = f"Where is the {short_name(a)} relative to the {short_name(b)}?"
    return question, frame.format(a=short_name(a), b=short_name(b))


def _ask_colour(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.objects)
    same = [SHAPES[o.shape] for o in scene.objects if o.colour == thing.colour]
    colour = COLOURS[thing.colour]
    verb = "is" if len(same) == 1 else "are"
    return f"Which objects are {colour}?", f"The {joined(same)} {verb} {colour}."


_QUESTIONS = (_ask_count, _ask_cell, _ask_where, _ask_place, _ask_look, _ask_colour, _ask_relation)


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about the scene and its answer."""
    kinds = _QUESTIONS if len(scene.objects) > 1 else _QUESTIONS[:-1]
    return rng.choice(kinds)(scene, rng)


def conversation(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer. `kind`: caption, brief, list or question."""
    if kind == "caption":
        return rng.choice(CAPTION_PROMPTS), caption(scene, rng)
    if kind == "brief":
        return rng.choice(BRIEF_PROMPTS), brief(scene, rng)
    if kind == "list":
        return rng.choice(LIST_PROMPTS), listing(scene)
    return question(scene, rng)
