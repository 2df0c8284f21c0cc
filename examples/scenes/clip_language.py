"""What is said about a clip: its beginning, what happens, its end; questions about these.

Before an event is told, the text says where everything is after it: what has moved then follows
from the text, which a small model learns sooner than to compare two pictures. As for pictures, each
choice of words has a favourite that the clip decides.

All randomness comes from the `random.Random` that the caller passes.
"""

from __future__ import annotations

import random

from clips import MOMENTS, Clip, Event
from language import (
    capital,
    count_phrase,
    joined,
    listing,
    location,
    noun_phrase,
    object_sentence,
    pick,
    relation_sentence,
    short_name,
    with_article,
)
from words import CELLS, FIRST, LATER, MOODS, NEXT, NUMBERS, OPENINGS, VERB_FORMS, VERBS
from world import PATTERNS, PLACES, SHAPES, SIZES

EARLY = ("Then", "After a moment,", "Soon,")
LATE = ("Finally,", "Last of all,", "Further on,")
SO = ("So", "Thus", "Hence")
WHERETO = {
    "left": ("left", "to the left", "towards the left"),
    "right": ("right", "to the right", "towards the right"),
    "up": ("up", "upward", "towards the top"),
    "down": ("down", "lower", "towards the bottom"),
}
HAPPENS = {
    "go": (
        "{w} the {a} goes {d} and stays {l}.",
        "{w} the {a} leaves its spot, floats {d} and {v} {l}.",
        "{w} one sees the {a} go {d}, until it {v} {l}.",
        "{w} going {d}, the {a} comes to rest {l}.",
    ),
    "push": (
        "{w} the {a} goes {d} and meets the {b}, which falls back; it stays {l}.",
        "{w} the {a} and the {b} meet: both go {d}, so that the {b} {u} {l}.",
        "{w} the {b} must go {d}, for its place is taken by the {a}; look for it {l}.",
        "{w} going {d}, the {a} reaches the {b}, which leaves and {u} {l}.",
    ),
    "appear": (
        "{w} {np} appears {l}.",
        "{w} the view reveals {np} {l}.",
        "{w} {np} comes and {v} {l}.",
        "{w} {l}, where nothing was before, {v} {np}.",
    ),
    "leave": (
        "{w} the {a} leaves the picture.",
        "{w} nothing remains of the {a}.",
        "{w} the spot of the {a} stays empty.",
        "{w} the {a} is seen no longer.",
    ),
    "nothing": (
        "{w} nothing happens for a moment.",
        "{w} everything stays in its place.",
        "{w} all is quiet.",
    ),
}
ENDINGS = (
    "At the end there {is} {n}.",
    "What remains {is} {n}.",
    "The last view shows {n}.",
)
VIDEO_PROMPTS = (
    "Describe the video in detail.",
    "What happens in the video? Explain in detail.",
    "Write a detailed description of this video.",
    "Please describe the video.",
)
EVENTS_PROMPTS = ("What happens in the video?", "What changes in the video?")
STEPS_PROMPTS = ("List what happens in the video.", "List the events of the video.")
VIEW_PROMPTS = tuple(
    f"List the objects {when}." for when in ("at the beginning", "in the middle", "at the end")
)


def happening(clip: Clip, number: int, words: str, rng: random.Random) -> str:
    """The sentence about an event, beginning with `words`."""
    event = clip.events[number]
    if event.kind == "nothing":
        return capital(pick(HAPPENS["nothing"], clip.place, rng).format(w=words).strip())
    thing = clip.things[event.thing]
    # Whose new place is told; an object that leaves has none.
    told = event.other if event.kind == "push" else event.thing
    here = clip.at(number, told) if event.kind == "leave" else clip.at(number + 1, told)
    frame = pick(HAPPENS[event.kind], thing.shape + here.cell, rng)
    text = frame.format(
        w=words,
        a=short_name(thing),
        b=short_name(here),
        np=noun_phrase(thing, rng),
        d=pick(WHERETO.get(event.direction, ("",)), here.colour, rng),
        l=location(here, rng),
        v=pick(VERBS[SHAPES[thing.shape]], thing.size, rng),
        u=pick(VERBS[SHAPES[here.shape]], here.size, rng),
    )
    return capital(text.strip())


def standing(clip: Clip, moment: int) -> str:
    """Where everything is at a moment, in fixed words."""
    places = [
        f"the {short_name(thing)} {'is ' if i == 0 else ''}at the {CELLS[thing.cell]}"
        for i, thing in enumerate(clip.scene(moment).objects)
    ]
    return joined(places)


def _told(clip: Clip, number: int, words: str, rng: random.Random) -> str:
    """Where everything is after an event, and the event."""
    so = pick(SO, clip.place, rng)
    return f"{words} {standing(clip, number + 1)}. {happening(clip, number, so, rng)}"


def _both(clip: Clip, rng: random.Random) -> list[str]:
    """The sentences about the two events."""
    return [
        _told(clip, 0, pick(EARLY, clip.place, rng), rng),
        _told(clip, 1, pick(LATE, clip.events[0].thing, rng), rng),
    ]


def caption(clip: Clip, rng: random.Random) -> str:
    """Several sentences: place and count, each object at first, what happens, what remains."""
    scene, place = clip.scene(0), PLACES[clip.place]
    count = count_phrase(len(scene.objects), rng, scene.place)
    opening = pick(OPENINGS[place], len(scene.objects), rng).format(n=count, N=capital(count))
    if len(scene.objects) == 1:
        for plural, singular in VERB_FORMS:
            opening = opening.replace(plural, singular)
    sentences = [opening]
    for i, thing in enumerate(scene.objects):
        frames = FIRST if i == 0 else NEXT if i == 1 else LATER
        sentences.append(capital(object_sentence(frames, thing, thing.shape, rng)))
    sentences += _both(clip, rng)
    last = clip.scene(MOMENTS - 1)
    if len(last.objects) > 1 and pick(("relation", "rest"), clip.place, rng) == "relation":
        sentences.append(relation_sentence(last, rng))
    else:
        names = joined([with_article(short_name(thing)) for thing in last.objects])
        verb = "is" if len(last.objects) == 1 else "are"
        ending = pick(ENDINGS, last.objects[0].shape, rng)
        sentences.append(ending.format(n=names, **{"is": verb}))
    sentences.append(pick(MOODS[place], last.objects[0].shape, rng))
    return " ".join(sentences)


def stated(clip: Clip, number: int) -> str:
    """An event as a line of a list, in fixed words."""
    event: Event = clip.events[number]
    if event.kind == "nothing":
        return "nothing"
    thing = clip.things[event.thing]
    name = short_name(thing)
    if event.kind == "leave":
        return f"{name} leaves"
    cell = CELLS[clip.cells[number + 1][event.thing]]
    if event.kind == "appear":
        return f"{SIZES[thing.size]} {PATTERNS[thing.pattern]} {name} appears, {cell}"
    if event.kind == "go":
        return f"{name} goes {event.direction}, {cell}"
    return f"{name} meets {short_name(clip.things[event.other])}, {event.direction}, {cell}"


def steps(clip: Clip) -> str:
    """A list of the events, each after where everything then is."""
    lines = [f"{i + 1}. {standing(clip, i + 1)}: {stated(clip, i)}" for i in range(MOMENTS - 1)]
    return "\n".join([f"At first {standing(clip, 0)}", *lines])


def _ask_order(clip: Clip, rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(MOMENTS - 1)
    said = f"First {standing(clip, number)}. {_told(clip, number, 'Then', rng)}"
    return f"What happens {('first', 'last')[number]}?", said


def _ask_end(clip: Clip, _rng: random.Random) -> tuple[str, str]:
    last = clip.scene(MOMENTS - 1).objects
    names = joined([with_article(short_name(thing)) for thing in last])
    head = "There is one object" if len(last) == 1 else f"There are {NUMBERS[len(last)]} objects"
    return "How many objects are there at the end?", f"{head} at the end: {names}."


def _ask_where(clip: Clip, rng: random.Random) -> tuple[str, str]:
    thing = rng.randrange(len(clip.things))
    name = short_name(clip.things[thing])
    moment, when = rng.choice(((0, "first"), (MOMENTS - 1, "at the end")))
    if thing not in clip.cells[moment]:
        return f"Where is the {name} {when}?", f"The {name} is not to be seen {when}."
    here = clip.at(moment, thing)
    cell = CELLS[here.cell]
    return f"Where is the {name} {when}?", f"The {name} is at the {cell}, {location(here, rng)}."


def _ask_what_of(clip: Clip, rng: random.Random) -> tuple[str, str]:
    thing = rng.randrange(len(clip.things))
    name = short_name(clip.things[thing])
    places = [
        f"at the {CELLS[cells[thing]]}" if thing in cells else "not to be seen"
        for cells in clip.cells
    ]
    said = f"The {name} is {places[0]} first, then {', then '.join(places[1:])}."
    return f"What becomes of the {name}?", said


_QUESTIONS = (_ask_order, _ask_order, _ask_end, _ask_where, _ask_what_of)


def clip_conversation(clip: Clip, kind: str, rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer. `kind`: caption, events, steps, view or question."""
    if kind == "caption":
        return rng.choice(VIDEO_PROMPTS), caption(clip, rng)
    if kind == "events":
        said = [f"At first {standing(clip, 0)}.", *_both(clip, rng)]
        return rng.choice(EVENTS_PROMPTS), " ".join(said)
    if kind == "steps":
        return rng.choice(STEPS_PROMPTS), steps(clip)
    if kind == "view":
        moment = rng.randrange(MOMENTS)
        return VIEW_PROMPTS[moment], listing(clip.scene(moment))
    return rng.choice(_QUESTIONS)(clip, rng)
