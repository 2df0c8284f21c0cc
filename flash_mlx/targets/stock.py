"""What mlx-vlm itself is given to answer a prompt, to be compared with.

Shapes:
    T: prompt rows.    N: visual rows.    D: hidden size.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from flash_mlx.prompt import Prompt
from flash_mlx.targets.load import LoadedTarget


def stock_inputs(loaded: LoadedTarget, prompt: Prompt) -> dict[str, Any]:
    """Return the arrays for `mlx_vlm.stream_generate` that make it read the same prompt; lazy.

    Where mlx-vlm's own way with images is not that of the family's authors, it is handed the
    visual rows [N, 1, D]. Of FastVLM it gets one id an image, and puts the rows in by itself.
    """
    family = loaded.family
    inputs: dict[str, Any] = {"pixel_values": None, **prompt.inputs}
    tokens = list(prompt.tokens)
    if family.placed is not None:
        for start, stop in reversed(prompt.image_spans):
            tokens[start:stop] = [family.placed]
    elif family.image_rows is not None and prompt.inputs:
        inputs["cached_image_features"] = family.image_rows(loaded.target.model, inputs)[:, None]
    ids = mx.array(tokens, dtype=mx.int32)[None]
    return {"input_ids": ids, "mask": mx.ones_like(ids) if family.attends_mask else None, **inputs}
