"""What each patch of a picture shows, as class labels: the supervision of the vision tower.

Background patches say the place and how many objects there are; object patches say everything about
their object, its cell and its rank in reading order included. `groups` are independent choices.

Shapes:
    P patches, A attributes (the columns below), -1 where an attribute does not apply.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from world import COLOURS, GRID, MAX_OBJECTS, PATTERNS, PLACES, SHAPES, SIZES, Scene

GROUPS = {
    "kind": 2,  # background, object
    "place": len(PLACES),
    "count": MAX_OBJECTS,
    "rank": MAX_OBJECTS,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "pattern": len(PATTERNS),
    "cell": GRID * GRID,
}
OFFSETS = dict(zip(GROUPS, np.cumsum([0, *GROUPS.values()])[:-1].tolist(), strict=True))
NUM_CLASSES = sum(GROUPS.values())
NONE = NUM_CLASSES  # the class of "does not apply", in `classes`


def patch_labels(scene: Scene, owner: NDArray[np.int8]) -> NDArray[np.int32]:
    """[P, A] int32: column j is the class within group j, -1 where it does not apply.

    Args:
        scene: The scene.
        owner: [P] int8, 0 for the background, i + 1 for object i (from `render`).
    """
    table = np.full((len(scene.objects) + 1, len(GROUPS)), -1, np.int32)
    table[0, :3] = 0, scene.place, len(scene.objects) - 1
    for rank, thing in enumerate(scene.objects):
        table[rank + 1, 0] = 1
        table[rank + 1, 3:] = rank, thing.shape, thing.colour, thing.size, thing.pattern, thing.cell
    return table[owner]


def classes(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Labels [..., A] as rows of one table of all classes; `NONE` where one does not apply."""
    offsets = np.array(list(OFFSETS.values()), np.int32)
    return np.where(labels < 0, NONE, labels + offsets).astype(np.int32)
