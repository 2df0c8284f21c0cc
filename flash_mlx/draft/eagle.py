"""EAGLE-1 and EAGLE-2: the target's hidden states, and its own LM head.

A row is one linear layer over embedding and hidden. What comes out of the decoder layer goes
straight into the LM head: there is no final norm. EAGLE-2 has the same weights and another tree
(`growth`). An image's rows are read like text, with the target's embeddings of the image.

Shapes:
    R: rows of a pass.    D: hidden size.    V: the target's vocabulary.

Source: Li et al., arXiv 2401.15077 and 2406.16858, and the weight names of their published code.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.draft.decoder import DecoderConfig, DecoderLayer
from flash_mlx.draft.one_layer import OneLayerModel


class EagleModel(OneLayerModel):
    """The weights, and what each row is made of.

    Weights:
        See OneLayerModel; fc [D, 2D], whose columns read the embedding first, then the hidden;
        layers.0 (see DecoderLayer).
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Draw initial weights."""
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fusion_bias)
        self.layers = [DecoderLayer(config)]

    @property
    def layer(self) -> DecoderLayer:
        """The decoder layer."""
        return self.layers[0]

    def taps(self, num_layers: int) -> tuple[int, ...]:  # noqa: ARG002
        """Return layer 0, whose inputs are the embeddings."""
        return (0,)

    def split(self, hidden: mx.array) -> tuple[mx.array | None, mx.array]:
        """Take [R, 2D] apart: embeddings, hidden states."""
        size = self.config.hidden_size
        return hidden[:, :size], hidden[:, size:]

    def fuse(self, embeddings: mx.array, features: mx.array, context: mx.array | None) -> mx.array:  # noqa: ARG002
        """Return the layer's inputs, [R, D]."""
        rows: mx.array = self.fc(mx.concatenate([embeddings, features], axis=-1))
        return rows

    def logits(
        self, outputs: mx.array, lm_head: Callable[[mx.array], mx.array], vocab_size: int
    ) -> mx.array:
        """Return [R, V]; targets often pad their vocabulary beyond the drafter's."""
        logits = lm_head(outputs)
        if self.config.vocab_size == vocab_size:
            return logits
        return mx.where(mx.arange(vocab_size) < self.config.vocab_size, logits, -mx.inf)
