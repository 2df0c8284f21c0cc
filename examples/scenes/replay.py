"""A target whose answers are known, so that its own passes need not be computed again.

At temperature 0 a text does not depend on the drafter, so the states that a verification would
give can be looked up: row r of the text for every row of a tree at depth r. Rows off the text get
states that are not theirs; they follow a draft that was refused, so nobody looks at them. Loop,
drafter, acceptance and counting are the library's own.

Shapes:
    T: rows of prompt and answer.    W: width of what the target hands out.    D: hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx

from flash_mlx.around import TargetAround
from flash_mlx.decode import Cache, NoDrafter, Output, Take, Target, decode
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology


@dataclass(frozen=True, eq=False)
class Recording:
    """What a target answers to a prompt.

    Attributes:
        prompt: What it read.
        hidden: [T, W] what it hands out at every row of the prompt and of its answer.
    """

    prompt: Prompt
    hidden: mx.array


def record(
    target: Target, prompt: Prompt, max_tokens: int, stop_ids: Sequence[int]
) -> tuple[int, ...]:
    """Return the target's greedy answer."""
    rounds = decode(
        target,
        NoDrafter(),
        prompt,
        sampler=Sampler(),
        key=mx.random.key(0),
        max_tokens=max_tokens,
        stop_ids=frozenset(stop_ids),
    )
    return tuple(token for each in rounds for token in each.tokens)


def states(target: Target, prompt: Prompt, answer: Sequence[int]) -> Recording:
    """Return a recording of an answer, with all that this target hands out."""
    cache = target.make_cache()
    hidden = target.prefill(prompt, cache).hidden
    tree = DraftTree(Topology.chain(len(answer) - 1), mx.array(answer, dtype=mx.int32))
    rows = mx.concatenate([hidden, target.verify(tree, cache).hidden])
    mx.eval(rows)
    return Recording(prompt, rows)


@dataclass
class _Place:
    """How far the text has been read: see `decode.Cache`."""

    length: int = 0

    def commit(self, rows: Sequence[int]) -> None:
        self.length += len(rows)


class ReplayTarget(TargetAround):
    """Answers one prompt as recorded.

    Attributes:
        recording: Of this prompt.
    """

    def __init__(self, target: Target, recording: Recording) -> None:
        """Take embedding and LM head from the target that was recorded."""
        super().__init__(target)
        self.recording, self._hidden = recording, recording.hidden

    def make_cache(self) -> _Place:
        return _Place()

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        """See `Target`."""
        cache.commit(range(len(prompt)))
        rows = self._hidden[: len(prompt)]
        if take is not None:
            take(0, rows)
            rows = rows[-1:]
        return self._output(rows[-1:], rows)

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """See `Target`; a text's last rows stand in for those beyond its end."""
        last = self._hidden.shape[0] - 1
        rows = [min(cache.length + depth, last) for depth in tree.topology.depth]
        hidden = self._hidden[mx.array(rows)]
        return self._output(hidden, hidden)

    def _output(self, read: mx.array, hidden: mx.array) -> Output:
        """Logits of the LM head's inputs, which are the last D columns."""
        return Output(self.target.lm_head(read[:, -self.target.hidden_size :]), hidden)
