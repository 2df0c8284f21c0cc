"""FastVLM's pictures: a convolutional tower, each 64 x 64 pixels one row.

mlx-vlm's processor writes one id for a whole picture, and its model puts the second picture one row
too late. `image_rows` puts each where it belongs.

Shapes:
    I: images.    D: hidden size.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from flash_mlx.targets.rows import Inputs, Read

STRIDE = 64  # pixels a side of what one row sees


def rows(read: Read) -> tuple[int, ...]:
    """Squares of 64 x 64 pixels of each image."""
    pixel_values = read.inputs["pixel_values"]  # [I, 3, height, width]
    number = (pixel_values.shape[2] // STRIDE) * (pixel_values.shape[3] // STRIDE)
    return (number,) * pixel_values.shape[0]


def image_rows(model: Any, inputs: Inputs) -> mx.array:
    """Return the visual rows [rows, D] of all images, in order."""
    dtype = model.vision_tower.vision_model.patch_embed.blocks[0].reparam_conv.weight.dtype
    pixels = inputs["pixel_values"].astype(dtype).transpose(0, 2, 3, 1)
    _, features, _ = model.vision_tower(pixels)  # [I, height, width, channels]
    projected: mx.array = model.mm_projector(features.reshape(-1, features.shape[-1]))
    return projected
