"""What a step of a FLASH drafter has in memory at its peak, array by array, and how it keeps to it.

The peak is inside of the loss: all that the backward pass will read is there, and the logits are.
Arrays were counted by giving one size after the other another value and measuring the peak, in
float32 on a CPU; elsewhere, where MLX fuses more and keeps other arrays, the sum is an estimate.

MLX takes memory for an operation when it is put in line, not when it runs, so an unbounded line
holds up to 60% more than the step needs (measured). `bounded` lets it hold what was counted.

Shapes:
    B: sequences.    R: rows of text.    S: rows of a compressed sequence.    Q: base rows.
    n: base rows that are not padding.    m: rows that teach.    k: slots.    D: hidden size.
    V: vocabulary.    U: tokens that the drafter may propose.    H, Dh: heads and their width.
    F: width of the MLP.    W: of the recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from flash_mlx.draft import FlashConfig
from flash_mlx.draft.decoder import DecoderConfig
from flash_mlx.train.config import TrainConfig
from flash_mlx.train.data import Inputs, Taught

# [rows, k, U] arrays at the peak. All have p at the slot's token and the logits or the drafter's q;
# besides, the product that is summed, and the change of the logits or of q.
LOGITS = {"hidden": 2, "distribution": 4, "argmax": 3, "acceptance": 4, "variation": 5}
LOGITS |= {"hybrid": 7, "ranking": 2}
KEPT_LOGITS = 2  # of each pass but the last: p and q, for the backward pass
# [n, k, D]: rows with their slot's embedding, normed, after attention, normed again, after the MLP,
# their sum, at the base rows, corrected, what is taught, its distance, and of the last four the
# change.
HIDDEN = 14
MLP = 3  # [n, k, F]: gate, up, their product
HEADS = 4  # [B Q, k, H Dh]: queries and keys, rotated, values, what is attended to
SCORES = 2  # [B Q, k, H, S + k]: the softmax, and its part for each product
RECURRENT = 8  # [n, k - 1, W]: of state and token (2 each), gate and value, state, all states
TEXT = 5  # [B, R, D]: embeddings and states, normed, gate, up
TAPPED = 6  # [B, R, D]: three taps, and the same normed


@dataclass(frozen=True)
class Sizes:
    """How large a batch is.

    Attributes:
        sequences: B.
        text: R.
        compressed: S.
        base: B Q.
        chosen: n.
        taught: m.
    """

    sequences: int
    text: int
    compressed: int
    base: int
    chosen: int
    taught: int

    @classmethod
    def of(cls, inputs: Inputs) -> Sizes:
        """Return those of a batch."""
        return cls(
            sequences=inputs.order.shape[0],
            text=inputs.text_rows.shape[1],
            compressed=inputs.order.shape[1],
            base=inputs.base_rows.size,
            chosen=inputs.chosen.size,
            taught=inputs.teacher_rows.size,
        )


def step_arrays(drafter: FlashConfig, sizes: Sizes, config: TrainConfig) -> Mapping[str, int]:
    """Return what for -> bytes, all of it at the same time.

    Args:
        drafter: Its sizes.
        sizes: Of the batch.
        config: How to train.
    """
    slots, width = sizes.chosen * drafter.block_size, 4 if config.dtype == "float32" else 2
    passes, proposed = 1 + config.rollout, drafter.num_proposed
    at_once = min(sizes.chosen, config.chunk) * drafter.block_size
    weights = vars(config.losses)
    logits = max([2, *(count for name, count in LOGITS.items() if weights[name])]) * at_once
    if at_once == slots:
        logits += config.rollout * KEPT_LOGITS * slots
    attended = sizes.compressed + drafter.block_size
    heads = HEADS * drafter.head_dim + SCORES * attended
    later = sizes.chosen * (drafter.block_size - 1)
    text = sizes.sequences * sizes.text * drafter.hidden_size
    whole = drafter.vocab_size if drafter.draft_vocab_size else 0
    return {
        "logits": 4 * logits * proposed,
        "the line": 4 * at_once * proposed,  # the largest array, which is there before its turn
        "target's distributions": 4 * sizes.taught * proposed,
        "what they are chosen from": 4 * sizes.taught * whole,
        "slots": passes * width * slots * HIDDEN * drafter.hidden_size,
        "MLP": passes * width * slots * MLP * drafter.intermediate_size,
        "attention": passes * width * sizes.base * drafter.block_size * drafter.num_heads * heads,
        "corrections": passes * width * RECURRENT * later * _corrected_by(drafter),
        "text": passes * width * (TEXT + TAPPED * drafter.taps) * text,
    }


def _corrected_by(drafter: FlashConfig) -> int:
    """Return the width of what corrects a slot."""
    return drafter.recurrent_size + drafter.hydra_size + drafter.markov_rank


@contextmanager
def bounded(
    drafter: FlashConfig | DecoderConfig, inputs: Taught, config: TrainConfig
) -> Iterator[None]:
    """Within, operations wait for their turn while a batch would need more than was counted.

    Beyond that they run one after the other, so too low a bound costs time and nothing else.

    Args:
        drafter: Its sizes; one with one layer is left alone.
        inputs: The batch.
        config: How to train.
    """
    if not (isinstance(drafter, FlashConfig) and isinstance(inputs, Inputs)):
        yield
        return
    needed = step_arrays(drafter, Sizes.of(inputs), config)
    size = sum(needed.values()) - needed["the line"]
    limit = mx.get_active_memory() + size
    before = mx.set_memory_limit(limit)
    mx.set_memory_limit(min(before, limit))  # a lower one that somebody set stays
    try:
        yield
    finally:
        mx.set_memory_limit(before)
