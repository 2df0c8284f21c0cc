"""What scenes are made of: places, objects that belong to them, and how one is drawn.

As in photographs, things co-occur: a place makes some objects, colours, sizes and rows of the grid
likely together, so a picture is partly predictable from its surroundings and partly not.
Two thirds of the objects come from the place's own stock, the rest is uniform.

All randomness comes from the `random.Random` that the caller passes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PLACES = ("meadow", "night sky", "beach", "wooden floor", "stone wall", "tablecloth")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white")
SIZES = ("small", "large")
PATTERNS = ("plain", "striped", "dotted")
GRID = 3  # positions: cell = GRID * row + column, row 0 at the top
MAX_OBJECTS = 4

RGB = {
    "red": (214, 40, 40),
    "blue": (40, 80, 220),
    "green": (30, 140, 60),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
    "white": (248, 248, 248),
}


@dataclass(frozen=True)
class Object:
    """One object. All fields are indices into the tuples above; `cell` is in [0, 9)."""

    shape: int
    colour: int
    size: int
    pattern: int
    cell: int

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID


@dataclass(frozen=True)
class Scene:
    """A place and its objects in reading order (by cell). No two share both colour and shape."""

    place: int
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class _Stock:
    """An object that belongs to a place: shape, likely colours, size and rows."""

    shape: str
    colours: tuple[str, ...]
    size: str
    rows: tuple[int, ...]


_STOCK: dict[str, tuple[_Stock, ...]] = {
    "meadow": (
        _Stock("circle", ("yellow", "orange"), "large", (0,)),
        _Stock("triangle", ("green",), "large", (1, 2)),
        _Stock("star", ("white", "purple"), "small", (2,)),
        _Stock("cross", ("red",), "small", (1, 2)),
    ),
    "night sky": (
        _Stock("star", ("yellow", "white"), "small", (0, 1)),
        _Stock("ring", ("orange", "purple"), "large", (0, 1)),
        _Stock("circle", ("white",), "large", (0,)),
        _Stock("triangle", ("red",), "small", (1, 2)),
    ),
    "beach": (
        _Stock("circle", ("red", "blue"), "small", (2,)),
        _Stock("ring", ("orange", "white"), "large", (1, 2)),
        _Stock("triangle", ("white", "yellow"), "large", (0, 1)),
        _Stock("star", ("orange",), "small", (2,)),
    ),
    "wooden floor": (
        _Stock("square", ("red", "green", "blue"), "large", (1, 2)),
        _Stock("circle", ("green",), "small", (2,)),
        _Stock("cross", ("yellow",), "small", (0, 1)),
        _Stock("triangle", ("purple",), "small", (1, 2)),
    ),
    "stone wall": (
        _Stock("square", ("white", "blue"), "large", (0, 1)),
        _Stock("cross", ("white", "red"), "large", (0, 1)),
        _Stock("ring", ("green",), "small", (1,)),
        _Stock("star", ("purple",), "large", (0,)),
    ),
    "tablecloth": (
        _Stock("ring", ("blue", "white"), "large", (1,)),
        _Stock("circle", ("orange", "green"), "small", (0, 1, 2)),
        _Stock("square", ("yellow",), "small", (2,)),
        _Stock("cross", ("purple",), "small", (0, 2)),
    ),
}
_STOCK_SHARE = 2 / 3
_COUNT_WEIGHTS = {
    "meadow": (1, 2, 4, 3),
    "night sky": (1, 3, 3, 4),
    "beach": (2, 4, 3, 1),
    "wooden floor": (1, 3, 4, 2),
    "stone wall": (3, 4, 2, 1),
    "tablecloth": (1, 2, 3, 4),
}
_PATTERN_WEIGHTS = (5, 2, 2)


def draw_object(place: str, cells: list[int], rng: random.Random) -> Object:
    """Draw an object for one of these cells of a place."""
    pattern = rng.choices(range(len(PATTERNS)), _PATTERN_WEIGHTS)[0]
    if rng.random() < _STOCK_SHARE:
        stock = rng.choice(_STOCK[place])
        shape = SHAPES.index(stock.shape)
        colour = COLOURS.index(rng.choice(stock.colours))
        size = SIZES.index(stock.size)
        likely = [cell for cell in cells if cell // GRID in stock.rows]
        return Object(shape, colour, size, pattern, rng.choice(likely or cells))
    return Object(
        rng.randrange(len(SHAPES)),
        rng.randrange(len(COLOURS)),
        rng.randrange(len(SIZES)),
        pattern,
        rng.choice(cells),
    )


def draw_scene(rng: random.Random) -> Scene:
    """Draw a scene: a place, one to four objects in different cells."""
    place = rng.randrange(len(PLACES))
    count = rng.choices(range(1, MAX_OBJECTS + 1), _COUNT_WEIGHTS[PLACES[place]])[0]
    cells = list(range(GRID * GRID))
    objects: list[Object] = []
    while len(objects) < count:
        new = draw_object(PLACES[place], cells, rng)
        if all((new.colour, new.shape) != (old.colour, old.shape) for old in objects):
            objects.append(new)
            cells.remove(new.cell)
    return Scene(place, tuple(sorted(objects, key=lambda o: o.cell)))
