"""What an adaptive drafter remembers: of a text, of its last drafts, and of earlier texts.

Shapes:
    A: rows accepted in a round.    R: rows of a prompt.    D: hidden size.    N: rows of a tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from flash_mlx.cost import Costs, Pace
from flash_mlx.draft.ngram import NgramState
from flash_mlx.prompt import Prompt
from flash_mlx.tree import Node


class CostsOf(Protocol):
    """Where costs come from; see `calibrate.Calibrator.costs`."""

    def __call__(self, num_rows: int, *, greedy: bool) -> Costs:
        """Return the costs with about so many rows in the cache."""
        ...


@dataclass(frozen=True, eq=False)
class Offer:
    """What was drafted from a state.

    Attributes:
        pace: That decided it; None if nothing was asked for.
        main: The drafter's state, all rows read; None if it was not asked.
        nodes: Rows 1, 2, ... of the tree. None: a chain drawn on the device.
        drafts: [N] int32, drawn on the device in the shape of `nodes`; None: the host knows the
            drafts, and a node's `kind` is its kind and its forecast.
        depth: Drafted ahead by the drafter.
        rows: Of the tree.
        ahead: Whether it was the root alone, read as plain decoding reads it.
    """

    pace: Pace | None
    main: Any = None
    nodes: tuple[Node, ...] | None = ()
    drafts: mx.array | None = None
    depth: int = 0
    rows: int = 1
    ahead: bool = False


@dataclass(frozen=True, eq=False)
class AdaptiveState:
    """What is known of a text; a value but for `offers`.

    Attributes:
        main: The drafter's state, before the rows of `prompt` and `unread`; None without a drafter,
            or if it has read nothing.
        prompt: Rows of the prompt that the drafter has not read: prompt, first row, hidden [R, D].
        unread: Hidden rows [A, D] of the target and the tokens after them, round by round.
        lookup: The text's own drafts; None without them.
        pace: What became of earlier drafts; None before the first round.
        num_rows: Of the prompt.
        offers: What `draft` made of this state last, for `extend`: none or one.
    """

    main: Any
    unread: tuple[tuple[mx.array, tuple[int, ...]], ...]
    lookup: NgramState | None
    pace: Pace | None
    num_rows: int
    prompt: tuple[tuple[Prompt, int, mx.array], ...] = ()
    offers: list[Offer] = field(default_factory=list)


@dataclass(eq=False)
class Memory:
    """What became of the drafts of earlier greedy texts, for the greedy texts that follow.

    A drafter that was of no use then is tried less now. Sampled texts neither read nor change it:
    they depend on how much is drafted, so the same seed must begin with the same knowledge.

    Attributes:
        pace: As the last text left it; None before the first.
    """

    pace: Pace | None = None
