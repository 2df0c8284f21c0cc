"""Penalties and biases: what happens to the target's logits before a `Sampler` sees them.

They depend on the text so far, so each row of a tree has its own: that of the text before the tree
and of the row's ancestors. With n(x) the number of times that token x stands among the last
`context_size` tokens of a row's text, the row itself included, its logits l change in this order:

    bias          l(x) <- l(x) + bias(x)
    repetition    l(x) <- l(x) / r  or, if that is below 0,  l(x) * r     where n(x) > 0
    presence      l(x) <- l(x) - a                                        where n(x) > 0
    frequency     l(x) <- l(x) - b n(x)

Order and windows are those of mlx-vlm and mlx-lm, and as there the type of the logits stays.

Shapes:
    N: rows of the tree.    S: tokens before the tree.    M: tokens in any row's window.
    V: vocabulary.

Source: repetition, Keskar et al. 2019; presence and frequency, the OpenAI API.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_mlx.tree import DraftTree, Topology

CONTEXT_SIZE = 20  # as in mlx-vlm and mlx-lm
STRONGEST = 2.0  # presence and frequency penalty, as in the OpenAI API

# Logits [N, M] of tokens that were said, and their counts n -> what the logits become.
Change = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Penalties:
    """What tokens pay for having been said, and what some of them get in any case.

    Attributes:
        repetition_penalty: r; above 1 makes repetition rarer, 1 changes nothing.
        presence_penalty: a; 0 changes nothing.
        frequency_penalty: b; 0 changes nothing.
        logit_bias: Token id to what is added to its logit; `-inf` bans the token.
        repetition_context_size: Tokens of a row's text that the repetition penalty looks at.
        presence_context_size: Likewise, the presence penalty.
        frequency_context_size: Likewise, the frequency penalty.

    Raises:
        ValueError: If a value is out of its range.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_context_size: int = CONTEXT_SIZE
    presence_context_size: int = CONTEXT_SIZE
    frequency_context_size: int = CONTEXT_SIZE

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                "The repetition penalty must be above 0 (1 changes nothing); "
                f"got {self.repetition_penalty}."
            )
        for name, size, penalty in (
            ("repetition", self.repetition_context_size, 0.0),
            ("presence", self.presence_context_size, self.presence_penalty),
            ("frequency", self.frequency_context_size, self.frequency_penalty),
        ):
            if not -STRONGEST <= penalty <= STRONGEST:
                raise ValueError(
                    f"The {name} penalty must be between {-STRONGEST:g} and {STRONGEST:g} "
                    f"(0 changes nothing); got {penalty}."
                )
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"The context size of the {name} penalty must be a whole number of tokens, "
                    f"1 or more; got {size}."
                )
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0:
                raise ValueError(f"A logit bias must be given for a token id; got {token!r}.")
            if not bias < math.inf:  # which is true of NaN
                raise ValueError(
                    f"The logit bias of token {token} must be a number, or -inf to ban the token; "
                    f"got {bias}."
                )

    @property
    def active(self) -> bool:
        """Whether anything changes."""
        return bool(self.logit_bias or self._changes)

    def apply(self, logits: mx.array, text: mx.array, tree: DraftTree) -> mx.array:
        """Return what the logits become; lazy.

        Args:
            logits: [N, V] the target's; row i is about the token after row i.
            text: [S] int32 tokens that stand before the tree and count.
            tree: N rows.

        Returns:
            [N, V] of the same type.
        """
        if self.logit_bias:
            tokens = mx.array(tuple(self.logit_bias))
            bias = mx.array(tuple(self.logit_bias.values()), dtype=logits.dtype)
            logits = logits.at[:, tokens].add(bias)
        for change, context_size in self._changes:
            logits = _apply(change, context_size, logits, text, tree)
        return logits

    @property
    def _changes(self) -> list[tuple[Change, int]]:
        """The penalties that are set, in order, each with its context size."""
        r, a, b = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        every: tuple[tuple[bool, Change, int], ...] = (
            (r != 1, lambda x, _: mx.where(x < 0, x * r, x / r), self.repetition_context_size),
            (a != 0, lambda x, _: x - a, self.presence_context_size),
            (b != 0, lambda x, n: x - b * n, self.frequency_context_size),
        )
        return [(change, context_size) for is_set, change, context_size in every if is_set]


def make_penalties(**settings: Any) -> Penalties:
    """Return the penalties that a caller set: `Penalties`, where None stands for the default.

    Raises:
        ValueError: A value is out of its range.
    """
    return Penalties(**{name: value for name, value in settings.items() if value is not None})


def _apply(
    change: Change, context_size: int, logits: mx.array, text: mx.array, tree: DraftTree
) -> mx.array:
    """Change the logits [N, V] of the tokens in each row's window."""
    text = text[max(0, len(text) + 1 - context_size) :]  # the root's window, the widest into it
    windows = mx.array(_windows(tree.topology, len(text), context_size))
    tokens = mx.concatenate([text, tree.tokens])
    # A token may stand in a window several times: it is counted, then changed once by its count.
    counts = mx.zeros(logits.shape).at[:, tokens].add(windows)
    tokens = mx.broadcast_to(tokens, windows.shape)
    counts = mx.take_along_axis(counts, tokens, axis=1).astype(logits.dtype)
    said = mx.take_along_axis(logits, tokens, axis=1)
    said = mx.where(counts > 0, change(said, counts), said)
    return mx.put_along_axis(logits, tokens, said, axis=1)


def _windows(topology: Topology, num_text: int, context_size: int) -> npt.NDArray[np.float32]:
    """Return [N, num_text + N]; 1 where a token of the text or the tree is in row i's window."""
    depth = np.array(topology.depth)[:, None]
    ages = np.concatenate([depth + np.arange(num_text, 0, -1), depth - depth.T], axis=1)
    own = np.concatenate([np.ones((len(topology), num_text), np.bool_), topology.mask], axis=1)
    return (own & (ages < context_size)).astype(np.float32)
