"""From logits to the law that tokens are drawn from.

The *processed* law is what users ask for with temperature, top-k, top-p and min-p, applied in this
order, each to what the one before left (as in Hugging Face transformers and vLLM). Speculative
decoding preserves exactly this law, so every place that needs p asks `Sampler.probs`.

Shapes:
    V: vocabulary.    ...: any leading axes, each row on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import mlx.core as mx

KEYS_AT_A_TIME = 64
COLD = 1e-3  # temperatures above it cannot make a logit overflow


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_p: Keeps the most likely tokens up to and including the one at which their sum
            reaches this share; 1 keeps all.
        top_k: Keeps the k most likely tokens; 0 keeps all.
        min_p: Keeps tokens at least this share as likely as the most likely one; 0 keeps all.

    Tokens as likely as the last one kept are kept too, so the law does not depend on the order
    of ids.

    Raises:
        ValueError: If a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Check types and ranges; a top-k such as 50.0 becomes a whole number."""
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(
                f"The temperature must be a number, 0 or more; got {self.temperature}."
            )
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(
                "Top-p must be a number above 0 and at most 1 (1 keeps all tokens); "
                f"got {self.top_p}."
            )
        if not (_is_number(self.top_k) and 0 <= self.top_k < math.inf and self.top_k % 1 == 0):
            raise ValueError(
                f"Top-k must be a whole number, 0 or more (0 keeps all tokens); got {self.top_k}."
            )
        object.__setattr__(self, "top_k", int(self.top_k))
        if not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(
                f"Min-p must be a number between 0 and 1 (0 keeps all tokens); got {self.min_p}."
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def probs(self, logits: mx.array) -> mx.array:
        """Return the processed law.

        Args:
            logits: [..., V] the model's, of any float type.

        Returns:
            [..., V] float32; each row sums to 1. Greedy: 1 at the largest logit (the lowest id
            among equals), 0 elsewhere.
        """
        if self.greedy:
            best = mx.argmax(logits, axis=-1, keepdims=True)
            return (mx.arange(logits.shape[-1]) == best).astype(mx.float32)
        probs = mx.softmax(self._tempered(logits), axis=-1)
        if self == Sampler(self.temperature):
            return probs
        if 0 < self.top_k < logits.shape[-1] or self.top_p < 1:
            probs = mx.where(probs < self._least_kept(probs), 0.0, probs)
        if self.min_p > 0:
            probs = mx.where(probs < self.min_p * probs.max(axis=-1, keepdims=True), 0.0, probs)
        return probs / probs.sum(axis=-1, keepdims=True)

    def _tempered(self, logits: mx.array) -> mx.array:
        """Return logits / temperature up to a constant a row, [..., V] float32."""
        logits = logits.astype(mx.float32)
        if self.temperature == 1:
            return logits
        if self.temperature > COLD:
            return logits * (1 / self.temperature)
        # The maximum goes first and the divisor stays above 0, so no temperature overflows.
        return (logits - logits.max(axis=-1, keepdims=True)) / max(self.temperature, 1e-30)

    def _least_kept(self, probs: mx.array) -> mx.array:
        """Return [..., 1], the smallest of the probabilities [..., V] that top-k and top-p keep."""
        likely = mx.topk(probs, self.top_k) if 0 < self.top_k < probs.shape[-1] else probs
        if self.top_p == 1:
            return likely.min(axis=-1, keepdims=True)
        # A token stays if those above it have not reached the share yet: the one that crosses
        # stays. The share is of what top-k left.
        ascending = mx.sort(likely, axis=-1)
        above = mx.cumsum(ascending, axis=-1, reverse=True, inclusive=False)
        share = self.top_p * ascending.sum(axis=-1, keepdims=True)
        dropped = (above >= share).sum(axis=-1, keepdims=True)
        return mx.take_along_axis(ascending, dropped, axis=-1)

    def sample(self, logits: mx.array, key: mx.array) -> mx.array:
        """Draw one token a row from the processed law.

        Args:
            logits: [..., V] the model's.
            key: PRNG key; not used if greedy.

        Returns:
            [...] int32.
        """
        if self.greedy:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        if self.top_p == 1 and self.top_k == 0 and self.min_p == 0:  # the same law, fewer steps
            # `draw` in logarithms; MLX's own draws are too coarse for tokens below 1e-7.
            times = arrivals(logits.shape, key)
            return mx.argmax(self._tempered(logits) - mx.log(times), axis=-1).astype(mx.int32)
        return draw(self.probs(logits), key)


def draw(probs: mx.array, key: mx.array) -> mx.array:
    """Draw one token a row.

    Args:
        probs: [..., V] float32, 0 or more; rows need not sum to 1.
        key: PRNG key.

    Returns:
        [...] int32.
    """
    return mx.argmax(probs / arrivals(probs.shape, key), axis=-1).astype(mx.int32)


def arrivals(shape: Sequence[int], key: mx.array) -> mx.array:
    """Return when racers of speed 1 arrive: of those with speed q(x), x is first with q(x).

    Args:
        shape: Of what is returned.
        key: PRNG key.

    Returns:
        float32 above 0, exponentially distributed with mean 1. Early times, which decide whether an
        unlikely token is drawn, are the finest: steps of 2**-32.
    """
    return -mx.log1p(-mx.random.uniform(low=2**-33, shape=shape, key=key))


def keys_from(key: mx.array) -> Iterator[mx.array]:
    """Yield keys without end, split many at a time: one by one they slow plain decoding down."""
    while True:
        key, *others = mx.random.split(key, KEYS_AT_A_TIME)
        yield from others


def make_sampler(
    defaults: Mapping[str, Any],
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
) -> Sampler:
    """Complete the caller's settings from a checkpoint's `generation_config.json`.

    Where that says `do_sample: false`, its temperature does not count.

    Raises:
        ValueError: A setting is out of its range or of another type; if it came from the
            checkpoint, the message begins with the file's name.
    """
    greedy = defaults.get("do_sample") is False
    try:
        found = Sampler(
            temperature=0.0 if greedy else defaults.get("temperature") or 0.0,
            top_p=defaults.get("top_p") or 1.0,
            top_k=defaults.get("top_k") or 0,
        )
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from error
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
    }
    return replace(found, **{name: value for name, value in given.items() if value is not None})


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
