"""What differs between the model families that flash-mlx has been verified on.

A family is a row of a table, not a class: the forward passes are mlx-vlm's own.

Shapes:
    I: images of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

Inputs = Mapping[str, mx.array]


@dataclass(frozen=True)
class Family:
    """How one `model_type` of mlx-vlm is read.

    Attributes:
        model_type: As in `config.json`.
        image_token: Key in `config.json` of the id that stands for one visual row, and the value
            mlx-vlm takes where the key is missing.
        mrope: Whether positions are three-dimensional (M-RoPE) and passed as `position_ids`;
            otherwise rows are rotated by the cache's offset.
        placeholders: Strings that the processor or tokenizer turns into visual rows.
        rows_per_image: From `config.json` and the processor's arrays to [I] visual rows.
    """

    model_type: str
    image_token: tuple[str, int]
    mrope: bool
    placeholders: tuple[str, ...]
    rows_per_image: Callable[[Mapping[str, Any], Inputs], tuple[int, ...]]

    def image_token_id(self, config: Mapping[str, Any]) -> int:
        """Return the id that stands for one visual row."""
        key, default = self.image_token
        return int(config.get(key, default))


def family_of(model_type: object) -> Family:
    """Return the family of a `model_type`.

    Raises:
        ValueError: If flash-mlx does not support it.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"The model type must be one of {', '.join(sorted(FAMILIES))}; config.json says "
            f"{model_type!r}. Other families of mlx-vlm are not supported yet."
        )
    return FAMILIES[model_type]


def _llava_rows(config: Mapping[str, Any], inputs: Inputs) -> tuple[int, ...]:
    """Patches of the image, with the CLS row if the encoder has one and the strategy keeps it."""
    vision = config.get("vision_config", {})
    patch_size = int(vision.get("patch_size", 14))
    pixel_values = inputs["pixel_values"]  # [I, 3, height, width]
    rows = (pixel_values.shape[2] // patch_size) * (pixel_values.shape[3] // patch_size)
    rows += vision.get("model_type") == "clip_vision_model"
    rows -= config.get("vision_feature_select_strategy", "default") == "default"
    return (rows,) * pixel_values.shape[0]


def _qwen_rows(config: Mapping[str, Any], inputs: Inputs) -> tuple[int, ...]:
    """Patches of each image, merged in squares."""
    merge = int(config.get("vision_config", {}).get("spatial_merge_size", 2)) ** 2
    grids = np.array(inputs["image_grid_thw"])  # [I, 3]: frames, patch rows, patch columns
    return tuple(int(patches) // merge for patches in grids.prod(axis=1))


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava", ("image_token_index", 32000), False, ("<image>",), _llava_rows),
        Family(
            "qwen2_5_vl",
            ("image_token_id", 151655),
            True,
            ("<|image_pad|>", "<|video_pad|>", "<|placeholder|>"),
            _qwen_rows,
        ),
    )
}
