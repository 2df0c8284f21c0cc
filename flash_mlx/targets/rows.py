"""How many prompt rows each picture takes, family by family.

A rule reads what the processor returned; `processing` holds it against the ids, so a template, a
processor and a model that do not fit one another are noticed before the model runs.

Shapes:
    I: images of a prompt.    T: prompt rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np

Inputs = Mapping[str, mx.array]


@dataclass(frozen=True)
class Read:
    """What a processor made of one prompt.

    Attributes:
        config: The checkpoint's `config.json`.
        inputs: The processor's arrays besides the ids.
        tokens: [T] ids, placeholders expanded.
        image_token_id: Id of a visual row.
        processor: The processor.
    """

    config: Mapping[str, Any]
    inputs: Inputs
    tokens: Sequence[int]
    image_token_id: int
    processor: Any

    @property
    def vision(self) -> Mapping[str, Any]:
        """The settings of the vision tower."""
        settings: Mapping[str, Any] = self.config.get("vision_config", {})
        return settings

    def runs(self) -> list[tuple[int, int]]:
        """Return the half-open row ranges of consecutive visual rows."""
        found, row = [], 0
        for visual, group in groupby(self.tokens, lambda token: token == self.image_token_id):
            start, row = row, row + sum(1 for _ in group)
            if visual:
                found.append((start, row))
        return found


def llava_rows(read: Read) -> tuple[int, ...]:
    """Patches of the image, with the CLS row if the encoder has one and the strategy keeps it."""
    patch_size = int(read.vision.get("patch_size", 14))
    pixel_values = read.inputs["pixel_values"]  # [I, 3, height, width]
    rows = (pixel_values.shape[2] // patch_size) * (pixel_values.shape[3] // patch_size)
    rows += read.vision.get("model_type") == "clip_vision_model"
    rows -= read.config.get("vision_feature_select_strategy", "default") == "default"
    return (rows,) * pixel_values.shape[0]


def qwen_rows(read: Read) -> tuple[int, ...]:
    """Patches of each image, merged in squares."""
    merge = int(read.vision.get("spatial_merge_size", 2)) ** 2
    grids = np.array(read.inputs["image_grid_thw"])  # [I, 3]: frames, patch rows, patch columns
    return tuple(int(patches) // merge for patches in grids.prod(axis=1))


def qwen_frame_rows(read: Read) -> tuple[tuple[int, ...], ...]:
    """Patches of each temporal patch of each video, merged in squares."""
    merge = int(read.vision.get("spatial_merge_size", 2)) ** 2
    grids = np.array(read.inputs["video_grid_thw"]).tolist()  # [videos, 3]
    return tuple((lines * columns // merge,) * frames for frames, lines, columns in grids)


def fixed_rows(key: str, default: int) -> Any:
    """Return the rule of families whose images all take the number of rows under `key`."""

    def rows(read: Read) -> tuple[int, ...]:
        text = read.config.get("text_config", {})
        number = int(read.config.get(key, text.get(key, default)))
        return (number,) * read.inputs["pixel_values"].shape[0]

    return rows


def tiled_rows(read: Read) -> tuple[int, ...]:
    """Tiles of each image, each announced by a mark; the whole image comes last."""
    last = read.processor.tokenizer.convert_tokens_to_ids("<global-img>")
    images, rows = [], 0
    for start, stop in read.runs():
        rows += stop - start
        if start and read.tokens[start - 1] == last:
            images.append(rows)
            rows = 0
    return tuple(images)


def piece_rows(read: Read) -> tuple[int, ...]:
    """Visual rows in one piece are one image: marks stand between any two."""
    return tuple(stop - start for start, stop in read.runs())


def patch_rows(read: Read) -> tuple[int, ...]:
    """Patches of each image, merged in squares; a mark stands at the end of each line."""
    merge = int(read.config.get("spatial_merge_size", 1))
    side = int(read.vision.get("patch_size", 14)) * merge
    sizes = np.array(read.inputs["image_sizes"]).reshape(-1, 2)  # [I, 2]: height, width
    return tuple(int(rows) for rows in (sizes // side).prod(axis=1))
