"""How a slot's token is chosen from its logits.

Shapes:
    n: slots.    V: vocabulary.    W: tokens a slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flash_mlx.sampling import Sampler, arrivals


@dataclass(frozen=True, eq=False)
class Candidates:
    """What the slots of a block may say, on the device.

    Attributes:
        tokens: [n, W] the W likeliest tokens of each slot, in any order.
        logprobs: [n, W] float32, their log-probabilities.
        free: Slots at the start whose laws hold whatever comes before. The law of a later one knows
            the likeliest tokens of the slots before it, and holds only after these.
    """

    tokens: mx.array
    logprobs: mx.array
    free: int


def score_of(
    sampler: Sampler, shape: tuple[int, int], key: mx.array
) -> Callable[[int, mx.array], mx.array]:
    """Return how tokens are chosen: logits, of slots from the given one on, to scores.

    The best score wins. The W best are W draws without replacement.

    Args:
        sampler: Greedy scores by the logit; else tokens are drawn from its law.
        shape: Slots and V.
        key: PRNG key.
    """
    if sampler.greedy:
        return lambda _, logits: logits
    times = arrivals(shape, key)
    if sampler != Sampler(sampler.temperature):
        return lambda slot, logits: sampler.probs(logits) / times[slot : slot + len(logits)]
    # Only divided by a temperature, the law is not needed for the race: its logarithm will do.
    head_start = -mx.log(times) * sampler.temperature
    return lambda slot, logits: logits + head_start[slot : slot + len(logits)]
