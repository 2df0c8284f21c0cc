"""Draws a scene as a 128 x 128 picture, with the label of every 8 x 8 patch.

Shapes:
    S = 128 picture side [pixels], G = 16 patches a side, P = G * G = 256 patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from world import COLOURS, GRID, PLACES, RGB, SHAPES, Object, Scene

SIDE = 128
PATCH = 8
PATCHES = (SIDE // PATCH) ** 2
_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE]
_OBJECT_COVER = 0.3  # share of a patch that an object must cover to own it


def _regular(
    n: int, radius: float, cx: float, cy: float, inner: float = 1.0
) -> list[tuple[float, float]]:
    """Corners of a polygon, the first on top; every second one at `inner` times the radius."""
    points = []
    for i in range(n):
        r = radius * (inner if i % 2 else 1.0)
        angle = 2 * math.pi * i / n - math.pi / 2
        points.append((cx + r * math.cos(angle), cy + r * math.sin(angle)))
    return points


def _shape_mask(shape: str, cx: float, cy: float, r: float) -> NDArray[np.bool_]:
    """[S, S] bool: the pixels inside the shape."""
    picture = Image.new("L", (SIDE, SIDE), 0)
    draw = ImageDraw.Draw(picture)
    if shape in ("circle", "ring"):
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        if shape == "ring":
            hole = r * 0.52
            draw.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=0)
    elif shape == "square":
        a = r * 0.88
        draw.rectangle((cx - a, cy - a, cx + a, cy + a), fill=255)
    elif shape == "triangle":
        draw.polygon(_regular(3, r * 1.2, cx, cy + r * 0.2), fill=255)
    elif shape == "star":
        draw.polygon(_regular(10, r * 1.2, cx, cy, inner=0.42), fill=255)
    else:
        a = r * 0.34
        draw.rectangle((cx - r, cy - a, cx + r, cy + a), fill=255)
        draw.rectangle((cx - a, cy - r, cx + a, cy + r), fill=255)
    return np.asarray(picture) > 0


def background(place: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """A place without objects, [S, S, 3] float32 in [0, 255]."""

    def tint(r: int, g: int, b: int) -> NDArray[np.float32]:
        return (np.array((r, g, b)) + rng.normal(0, 5, 3)).astype(np.float32)

    image = np.zeros((SIDE, SIDE, 3), np.float32)
    if place == "meadow":
        image[:] = tint(120, 190, 110)
        image[: SIDE // 4] = tint(170, 215, 240)
    elif place == "night sky":
        image[:] = tint(22, 28, 66)
        count = 40
        image[rng.integers(0, SIDE, count), rng.integers(0, SIDE, count)] = 220
    elif place == "beach":
        image[:] = tint(232, 212, 160)
        image[: SIDE // 4] = tint(90, 170, 210)
    elif place == "wooden floor":
        image[:] = tint(165, 115, 70)
        image[(_ROWS // 10) % 2 == 0] *= 0.9
        image[_ROWS % 10 == 0] *= 0.7
    elif place == "stone wall":
        image[:] = tint(140, 140, 146)
        image[(_ROWS % 16 == 0) | ((_COLUMNS + 16 * ((_ROWS // 16) % 2)) % 32 == 0)] *= 0.8
    else:
        image[:] = tint(225, 205, 205)
        image[(_COLUMNS // 16 + _ROWS // 16) % 2 == 0] = tint(175, 195, 215)
    return image


@dataclass(frozen=True)
class Look:
    """How one object is drawn.

    Attributes:
        x, y: Its centre [pixels].
        radius: [pixels]
        colour: [3] float32 in [0, 255].
    """

    x: float
    y: float
    radius: float
    colour: NDArray[np.float32]


def draw_look(thing: Object, rng: np.random.Generator) -> Look:
    """Draw where exactly in its cell an object stands, how large it is and its shade."""
    cell = SIDE / GRID
    cx = cell * (thing.column + 0.5) + rng.uniform(-3, 3)
    cy = cell * (thing.row + 0.5) + rng.uniform(-3, 3)
    radius = (11, 18)[thing.size] * rng.uniform(0.94, 1.06)
    shade = rng.normal(0, 6, 3).astype(np.float32)
    return Look(cx, cy, radius, np.array(RGB[COLOURS[thing.colour]], np.float32) + shade)


def paint(image: NDArray[np.float32], thing: Object, look: Look, dark: bool) -> NDArray[np.bool_]:
    """Draw an object into `image` [S, S, 3]; `dark` asks for a bright outline.

    Returns:
        [S, S]: its pixels.
    """
    mask = _shape_mask(SHAPES[thing.shape], look.x, look.y, look.radius)
    colour = look.colour
    second = colour * 0.45 if colour.mean() > 100 else colour * 0.5 + 125
    fill = np.broadcast_to(colour, image.shape).copy()
    if thing.pattern == 1:
        fill[((_COLUMNS + _ROWS) // 4) % 2 == 0] = second
    elif thing.pattern == 2:
        fill[(_COLUMNS % 7 - 3) ** 2 + (_ROWS % 7 - 3) ** 2 <= 3] = second
    inside = np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1)
    image[mask] = fill[mask]
    image[mask & ~inside] = 190 if dark else 60
    return mask


def patch_owners(masks: dict[int, NDArray[np.bool_]]) -> NDArray[np.int8]:
    """Who owns each patch, [P]: 0 for the background, i + 1 for the object with mask i, [S, S]."""
    side = SIDE // PATCH
    cover = np.zeros((max(masks, default=-1) + 2, PATCHES), np.float32)
    for i, mask in masks.items():
        cover[i + 1] = mask.reshape(side, PATCH, side, PATCH).mean((1, 3)).reshape(-1)
    cover[0] = _OBJECT_COVER
    return cover.argmax(0).astype(np.int8)


def render(scene: Scene, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Draw a scene.

    Args:
        scene: What to draw.
        seed: Decides jitter, tints and noise.

    Returns:
        The picture [S, S, 3] uint8, and the owner of each patch [P] int8: 0 for the background,
        i + 1 for `scene.objects[i]`.
    """
    rng = np.random.default_rng(seed)
    place = PLACES[scene.place]
    image = background(place, rng)
    masks = {}
    for i, thing in enumerate(scene.objects):
        masks[i] = paint(image, thing, draw_look(thing, rng), place == "night sky")
    image += rng.normal(0, 4, image.shape).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), patch_owners(masks)
