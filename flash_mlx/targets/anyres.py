"""LLaVA-NeXT's pictures: an overview, and tiles of the picture at a higher resolution.

The picture is scaled into the best of several grids of tiles, its longer side filling it. Of the
patches of all tiles together, those of the filling are dropped, and each line of patches ends with
a learned row. LLaVA-OneVision besides shrinks what exceeds a number of tiles.

mlx-vlm's LLaVA-NeXT, unlike its LLaVA-OneVision, reads one picture only and puts its tiles one
after another, without dropping or ending lines. `image_rows` does what the authors' code does.

Shapes:
    I: images.    K: tiles of an image, the overview included.    P: patches along a tile's side.
    h, w: lines and columns of patches that an image keeps.    D: hidden size.

Source: LLaVA-NeXT (2024), "spatial unpad" merging of anyres patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from flash_mlx.targets.rows import Inputs, Read

GRIDS = "image_grids"


def rows(read: Read) -> tuple[int, ...]:
    """Return the overview's patches, those the grid keeps, and one row a line; for each image."""
    side = _side(read.config)
    most = read.config.get("vision_aspect_ratio", "anyres_max_9")
    limit = int(most.removeprefix("anyres_max_")) if _shrinks(read.config) else None
    found = []
    for size, grid in zip(*_sizes_and_grids(read.config, read.inputs), strict=True):
        top, left = _unpad(size, (grid[0] * side, grid[1] * side))
        height, width = grid[0] * side - 2 * top, grid[1] * side - 2 * left
        if limit is not None:
            ratio = math.sqrt(height * width / (limit * side**2))
            if ratio > 1.1:
                height, width = int(height // ratio), int(width // ratio)
        found.append(side * side + height * (width + 1))
    return tuple(found)


def prepare(config: Mapping[str, Any], inputs: Inputs) -> Inputs:
    """Add [I, 2] int32, the lines and columns of each image's grid of tiles."""
    return {**inputs, GRIDS: mx.array(_sizes_and_grids(config, inputs)[1], dtype=mx.int32)}


def image_rows(model: Any, inputs: Inputs) -> mx.array:
    """Return the visual rows [rows, D] of all images, in order."""
    grids = np.array(inputs[GRIDS]).tolist()
    sizes = np.array(inputs["image_sizes"]).tolist()
    pixels = inputs["pixel_values"]  # [I, most tiles, 3, height, width]
    counts = [1 + lines * columns for lines, columns in grids]
    tiles = mx.concatenate([pixels[image, :count] for image, count in enumerate(counts)])
    *_, states = model.vision_tower(tiles.transpose(0, 2, 3, 1), output_hidden_states=True)
    features = states[model.vision_feature_layer]
    if model.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    features = model.multi_modal_projector(features)  # [all tiles, P * P, D]
    packed, start = [], 0
    for size, grid, count in zip(sizes, grids, counts, strict=True):
        packed.append(_pack(features[start : start + count], size, grid, model.image_newline))
        start += count
    return mx.concatenate(packed)


def _pack(tiles: mx.array, size: list[int], grid: list[int], newline: mx.array) -> mx.array:
    """Return one image's rows, the overview first, of its tiles [K, P * P, D]."""
    overview, patches = tiles[0], tiles[1:]
    side, hidden = math.isqrt(patches.shape[1]), patches.shape[2]
    lines, columns = grid
    whole = patches.reshape(lines, columns, side, side, hidden).transpose(0, 2, 1, 3, 4)
    whole = whole.reshape(lines * side, columns * side, hidden)
    top, left = _unpad(size, whole.shape[:2])
    whole = whole[top : whole.shape[0] - top, left : whole.shape[1] - left]
    ends = mx.broadcast_to(newline.astype(whole.dtype), (whole.shape[0], 1, hidden))
    whole = mx.concatenate([whole, ends], axis=1).reshape(-1, hidden)
    return mx.concatenate([overview, whole])


def _unpad(size: list[int], patches: tuple[int, ...] | list[int]) -> tuple[int, int]:
    """Return how many lines of patches at top and bottom, and columns left and right, are filling.

    Args:
        size: Height and width of the picture [pixels].
        patches: Lines and columns of patches of all tiles together.
    """
    height, width = size
    lines, columns = patches
    if width / height > columns / lines:
        return (lines - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (lines / height), 7))) // 2


def _sizes_and_grids(
    config: Mapping[str, Any], inputs: Inputs
) -> tuple[list[list[int]], list[list[int]]]:
    """Return each image's height and width [pixels], and its grid's lines and columns.

    Raises:
        ValueError: If the configuration does not say which grids there are.
    """
    from transformers.image_processing_utils import select_best_resolution

    if "image_grid_pinpoints" not in config:
        raise ValueError("config.json must say the grids of tiles (image_grid_pinpoints).")
    tile = int(config["vision_config"]["image_size"])
    sizes = np.array(inputs["image_sizes"]).reshape(-1, 2).tolist()
    best = [select_best_resolution(size, config["image_grid_pinpoints"]) for size in sizes]
    return sizes, [[height // tile, width // tile] for height, width in best]


def _side(config: Mapping[str, Any]) -> int:
    vision = config["vision_config"]
    return int(vision["image_size"]) // int(vision["patch_size"])


def _shrinks(config: Mapping[str, Any]) -> bool:
    return bool(config["model_type"] == "llava_onevision")
