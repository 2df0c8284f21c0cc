"""Short clips: a scene in which two things happen, one after the other.

A clip has three moments, and between two of them an object goes somewhere, appears, leaves or
pushes another. At the moments everything rests in its cell, so each moment is a scene; in between,
things are on their way.

Shapes:
    F = 3 moments.    S = 128 picture side [pixels].    N pictures of a clip.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from render import SIDE, Look, background, draw_look, paint, patch_owners
from world import GRID, MAX_OBJECTS, PLACES, Object, Scene, draw_object, draw_scene

MOMENTS = 3
PER_MOMENT = 8  # pictures of a moment, one second long
_MOVING = 3  # of these, pictures at each end of a moment on which things are on their way
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
_WEIGHTS = {"go": 4.0, "push": 7.0, "appear": 2.0, "leave": 1.5, "nothing": 0.4}
_MOST_AT_FIRST = 3


@dataclass(frozen=True)
class Event:
    """What happens between two moments.

    Attributes:
        kind: "go", "push", "appear", "leave" or "nothing".
        thing: Who goes, pushes, appears or leaves; an index into `Clip.things`.
        other: Who is pushed.
        direction: Where to, for "go" and "push".
    """

    kind: str
    thing: int = -1
    other: int = -1
    direction: str = ""


@dataclass(frozen=True)
class Clip:
    """A place, all objects that are ever there, and what becomes of them.

    Attributes:
        place: As in `Scene`.
        things: Objects, each with the first cell it stands in. No two share both colour and shape.
        cells: [F] for each moment the cells by indices into `things`; who is away is missing.
        events: [F - 1]
    """

    place: int
    things: tuple[Object, ...]
    cells: tuple[dict[int, int], ...]
    events: tuple[Event, ...]

    def at(self, moment: int, thing: int) -> Object:
        """An object where it stands at a moment."""
        return replace(self.things[thing], cell=self.cells[moment][thing])

    def scene(self, moment: int) -> Scene:
        """What is to be seen at a moment."""
        things = [self.at(moment, thing) for thing in self.cells[moment]]
        return Scene(self.place, tuple(sorted(things, key=lambda o: o.cell)))


def _next(cell: int, direction: str) -> int | None:
    """The neighbour of a cell, or None at the border."""
    row, column = cell // GRID + STEPS[direction][0], cell % GRID + STEPS[direction][1]
    return GRID * row + column if 0 <= row < GRID and 0 <= column < GRID else None


def _possible(cells: dict[int, int]) -> list[tuple[Event, dict[int, int]]]:
    """All ways in which objects can go, be pushed or leave, and where they all are afterwards."""
    owner = {cell: thing for thing, cell in cells.items()}
    out = [(Event("nothing"), cells)]
    for thing, cell in cells.items():
        if len(cells) > 1:
            rest = {k: v for k, v in cells.items() if k != thing}
            out.append((Event("leave", thing), rest))
        for direction in STEPS:
            to = _next(cell, direction)
            while to is not None and to not in owner:
                out.append((Event("go", thing, direction=direction), cells | {thing: to}))
                to = _next(to, direction)
            behind = None if to is None else _next(to, direction)
            if to is not None and behind is not None and behind not in owner:
                moved = cells | {thing: to, owner[to]: behind}
                out.append((Event("push", thing, owner[to], direction), moved))
    return out


def draw_clip(rng: random.Random) -> Clip:
    """Draw a scene of one to three objects and what happens there."""
    scene = draw_scene(rng)
    things = list(scene.objects)
    while len(things) > _MOST_AT_FIRST:
        things.pop(rng.randrange(len(things)))
    cells = [{i: thing.cell for i, thing in enumerate(things)}]
    events: list[Event] = []
    for _ in range(MOMENTS - 1):
        ways = _possible(cells[-1])
        kinds = sorted({event.kind for event, _ in ways})
        if len(things) < MAX_OBJECTS:
            kinds.append("appear")
        kind = rng.choices(kinds, [_WEIGHTS[each] for each in kinds])[0]
        if kind == "appear":
            free = [cell for cell in range(GRID * GRID) if cell not in cells[-1].values()]
            new = draw_object(PLACES[scene.place], free, rng)
            while any((new.colour, new.shape) == (o.colour, o.shape) for o in things):
                new = draw_object(PLACES[scene.place], free, rng)
            things.append(new)
            event, after = Event(kind, len(things) - 1), cells[-1] | {len(things) - 1: new.cell}
        else:
            event, after = rng.choice([way for way in ways if way[0].kind == kind])
        events.append(event)
        cells.append(after)
    return Clip(scene.place, tuple(things), tuple(cells), tuple(events))


def _look_at(clip: Clip, thing: int, look: Look, time: float) -> Look | None:
    """How an object is drawn at a time in [0, F - 1] moments; None while it is away."""
    before = min(int(time), MOMENTS - 2)
    share = time - before
    at_first, at_last = (clip.cells[moment].get(thing) for moment in (before, before + 1))
    first = at_last if at_first is None else at_first
    last = at_first if at_last is None else at_last
    if first is None or last is None:
        return None
    size = share if at_first is None else 1 - share if at_last is None else 1.0
    event = clip.events[before]
    if event.kind == "push":  # one arrives where the other then starts from
        share = min(2 * share, 1.0) if thing == event.thing else max(2 * share - 1, 0.0)
    start = clip.things[thing].cell
    row = first // GRID + share * (last // GRID - first // GRID) - start // GRID
    column = first % GRID + share * (last % GRID - first % GRID) - start % GRID
    cell = SIDE / GRID
    return replace(look, x=look.x + cell * column, y=look.y + cell * row, radius=look.radius * size)


def render_times(
    clip: Clip, seed: int, times: list[float]
) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Draw a clip at some times.

    Args:
        clip: What to draw.
        seed: Decides jitter, tints and noise.
        times: [N] in [0, F - 1] moments; whole numbers are the moments themselves.

    Returns:
        The pictures [N, S, S, 3], and the owners of patches [N, P]: 0 for the background, i + 1
        for `clip.things[i]`.
    """
    rng = np.random.default_rng(seed)
    place = PLACES[clip.place]
    empty = background(place, rng)
    looks = [draw_look(thing, rng) for thing in clip.things]
    pictures, owners = [], []
    for time in times:
        image, masks = empty.copy(), {}
        for i, (thing, look) in enumerate(zip(clip.things, looks, strict=True)):
            here = _look_at(clip, i, look, time)
            if here is not None and here.radius >= 1:
                masks[i] = paint(image, thing, here, place == "night sky")
        image += rng.normal(0, 4, image.shape).astype(np.float32)
        pictures.append(np.clip(image, 0, 255).astype(np.uint8))
        owners.append(patch_owners(masks))
    return np.stack(pictures), np.stack(owners)


def moments(clip: Clip, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """The pictures of the moments, [F, S, S, 3], and their patches' owners [F, P]."""
    return render_times(clip, seed, [float(moment) for moment in range(MOMENTS)])


def film(clip: Clip, seed: int) -> NDArray[np.uint8]:
    """All pictures of a clip, [F * 8, S, S, 3]: 8 a second, a second a moment."""
    times = []
    for number in range(MOMENTS * PER_MOMENT):
        moment, step = divmod(number, PER_MOMENT)
        # Rest in the middle of a second; on the way from `_MOVING` before its end to as many after.
        share = max(0, step - (PER_MOMENT - _MOVING) + 1) - max(0, _MOVING - step)
        times.append(min(max(moment + share / (2 * _MOVING + 1), 0.0), MOMENTS - 1.0))
    return render_times(clip, seed, times)[0]
