"""MSD: EAGLE whose image rows bypass the fusion.

Where the next row is an image's, the layer reads the target's embedding of it as it is, without the
hidden; everything else is EAGLE. The variant for Qwen2-VL also norms the layer's input and has
biases (`input_norm`, `attention_bias`). Rotary positions are indices of rows: the published code
gives all three axes of M-RoPE the same one.

Shapes:
    T: rows of the prompt.    D: hidden size.

Source: MSD, arXiv 2505.14260, and its published code.
"""

from __future__ import annotations

import mlx.core as mx

from flash_mlx.draft.eagle import EagleModel
from flash_mlx.draft.one_layer import Reading, Spans, image_rows


class MsdModel(EagleModel):
    """The weights of EAGLE, read differently."""

    def read_prompt(
        self,
        embeddings: mx.array,
        features: mx.array,
        images: Spans,
        context: mx.array | None = None,
    ) -> Reading:
        """Return what is read of a prompt; see `OneLayerModel.read_prompt`."""
        visual = image_rows(images, embeddings.shape[0])
        reading = super().read_prompt(embeddings, features, images, context)
        rows = mx.where(mx.array(visual)[:, None], embeddings, reading.rows)
        return Reading(rows, reading.positions)
