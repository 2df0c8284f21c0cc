"""The tokens that a drafter may propose, where these are not all of the target's.

A few thousand tokens make up nearly all that is said, and drafting reads a row of the target's LM
head for each token that it may propose. Verification knows all tokens, so what is said stays the
target's: a token that cannot be drafted only ends a round. With q = 0 for such tokens, rejection
sampling keeps the target's law as with any other q.

Shapes:
    V: the target's vocabulary.    U: tokens that the drafter may propose.    R: rows.
    D: hidden size.    ...: any leading axes.

Source: Zhao et al., FR-Spec, arXiv 2502.14856; EAGLE-3's `d2t`, arXiv 2503.01840.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Function = Callable[[mx.array], mx.array]


@runtime_checkable
class RowsHead(Protocol):
    """An LM head that gives its rows apart; see `targets.head.Head`."""

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return logits [R, .] of `hidden` [R, D]."""
        ...

    def best_tokens(self, hidden: mx.array, keep: int) -> tuple[mx.array, mx.array]:
        """Return the most likely tokens and their log-probabilities, [R, keep]."""
        ...

    def of(self, ids: mx.array) -> Function:
        """Return the head of the tokens `ids` [U] alone: [R, D] -> [R, U]."""
        ...

    @property
    def nbytes(self) -> int:
        """What its weights take [bytes]."""
        ...


def head_of(lm_head: Function, ids: mx.array | None) -> Function:
    """Return a target's LM head over the tokens that a drafter proposes.

    Args:
        lm_head: [R, D] -> [R, V]. If it gives its rows apart, those of the tokens are gathered, and
            no others are read.
        ids: [U] int32; None: all tokens.
    """
    if ids is None:
        return lm_head
    ids = ids + 0  # a copy: a compiled step of training must not capture a weight of the model
    mx.eval(ids)
    if isinstance(lm_head, RowsHead):
        return lm_head.of(ids)
    return lambda hidden: lm_head(hidden)[..., ids]


def named(places: mx.array, ids: mx.array | None) -> mx.array:
    """Return the ids of tokens by their places, 0 to U - 1, among `ids` [U]; None: all tokens."""
    return places if ids is None else ids[places]


def spread(rows: mx.array, ids: mx.array | None, vocab_size: int, other: float) -> mx.array:
    """Return [..., V], with `rows` [..., U] at the tokens `ids` [U] and `other` elsewhere.

    Args:
        rows: Logits or laws over the tokens that a drafter proposes.
        ids: These; None: all tokens, and the rows are returned as they are.
        vocab_size: V.
        other: For the tokens that it does not propose.
    """
    if ids is None:
        return rows
    wide = mx.full((*rows.shape[:-1], vocab_size), other, dtype=rows.dtype)
    return mx.put_along_axis(wide, mx.broadcast_to(ids, rows.shape), rows, axis=-1)


def check_ids(ids: mx.array, vocab_size: int) -> None:
    """Require ids that a drafter can propose: ascending, none twice, all in the vocabulary.

    Args:
        ids: [U] of whole numbers.
        vocab_size: V.

    Raises:
        ValueError: If they are not; the message names the first that is wrong.
    """
    known = np.array(ids).astype(np.int64)
    before = np.concatenate([[-1], known[:-1]])
    wrong = np.flatnonzero((known <= before) | (known >= vocab_size))
    if wrong.size:
        place = int(wrong[0])
        raise ValueError(
            "The tokens that a drafter proposes must be ascending ids of its target, from 0 to "
            f"{vocab_size - 1} and none twice; number {place} is {known[place]}, after "
            f"{before[place]}. Convert or train the drafter again."
        )


def frequent_ids(counts: npt.NDArray[np.int64], size: int, always: Iterable[int] = ()) -> mx.array:
    """Return the most frequent tokens, [U] int32 ascending; of equally frequent ones the lowest.

    Args:
        counts: [V] how often each token is said.
        size: U.
        always: Ids that are among them in any case, such as those that end a text.
    """
    rank = counts.copy()
    rank[[each for each in always if 0 <= each < len(rank)]] = np.iinfo(rank.dtype).max
    return mx.array(np.sort(np.argsort(-rank, kind="stable")[:size]).astype(np.int32))
