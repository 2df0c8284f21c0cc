"""A target's LM head, of all tokens or of some.

Shapes:
    R: rows of any number.    D: hidden size.    V: vocabulary.    U: tokens of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.few_rows import lay_out_for_few_rows
from flash_mlx.kernels.lmhead_topk import lmhead_topk, most_likely
from flash_mlx.targets.weights import num_bytes

LAYERS = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)


class Head:
    """From hidden states to logits; a callable.

    Args:
        layer: An LM head, or an embedding.
        tied: Whether it is the embedding, in place of an LM head.
        bound: Logits stay between this and its negative, by a hyperbolic tangent; None: they may be
            anything.
    """

    def __init__(self, layer: nn.Module, *, tied: bool = False, bound: float | None = None) -> None:
        """Keep them."""
        self._layer: Any = layer
        self._tied, self._bound = tied, bound

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return logits [R, V] of `hidden` [R, D]."""
        layer = self._layer
        logits: mx.array = layer.as_linear(hidden) if self._tied else layer(hidden)
        return logits if self._bound is None else mx.tanh(logits / self._bound) * self._bound

    @property
    def nbytes(self) -> int:
        """What its weights take [bytes]."""
        return num_bytes(self._layer)

    @property
    def packed(self) -> tuple[mx.array, mx.array, mx.array, int, int] | None:
        """Its packed weights, scales, biases, group size and bits.

        None if its logits are not their plain product with the hidden states.
        """
        layer = self._layer
        quantised = isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))
        if not quantised or layer.mode != "affine" or "bias" in layer or self._bound is not None:
            return None
        return layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits

    def best_tokens(self, hidden: mx.array, keep: int) -> tuple[mx.array, mx.array]:
        """Return the most likely tokens after `hidden` [R, D], if possible without their logits.

        Returns:
            Ids [R, keep] int32, the most likely first, and log-probabilities [R, keep] float32; of
            a part the places of its tokens, 0 to U - 1.
        """
        packed = self.packed
        if packed is None:
            return most_likely(self(hidden), keep)
        return lmhead_topk(hidden, *packed, keep)

    def of(self, ids: mx.array) -> Callable[[mx.array], mx.array]:
        """Return the head of the tokens `ids` [U]: [R, D] -> [R, U].

        Their rows are copied, as they are stored. Of a layer of another class all logits are
        computed, as nothing is known of its weights.
        """
        layer = self._layer
        if type(layer) not in LAYERS:
            return lambda hidden: self(hidden)[..., ids]
        part: Any = nn.Linear(1, 1, bias="bias" in layer)
        if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            size, bits = layer.group_size, layer.bits
            part = nn.QuantizedLinear(size, 1, "bias" in layer, size, bits, layer.mode)
        for name, rows in layer.parameters().items():  # each has a row for a token
            part[name] = rows[ids]
        lay_out_for_few_rows(part)
        part.freeze()
        mx.eval(part.parameters())
        return Head(part, bound=self._bound)
