"""Do drafted tokens have the law of plain sampling? Draws of two tokens, against the exact law.

Tokens a, x, y follow a prompt. `a` is fixed, so that x and y are what rounds of drafting bring. The
exact law of x comes from a pass over a, and that of y from a pass over each of the likely x; both
passes read one row, as plain decoding does. Then x and y are drawn many times with the drafter, by
the loop itself.

A law over many outcomes shows nothing in a few hundred draws. So outcomes are put into groups of
about 1/16 of the probability each (one that is likelier stands alone), and the distance of counts
and law is the total variation over the groups: half the sum of the differences.

Shapes:
    T: prompt rows.    N: rows of a tree.    S: rows between the prompt and a tree.
    V: vocabulary.    D: hidden size.    W: tokens x whose followers y are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_mlx.around import TargetAround
from flash_mlx.decode import ROOT_ALONE, Cache, Drafter, Output, State, Take, Target, decode
from flash_mlx.measure import noise_floor
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology

Floats = npt.NDArray[np.float64]

GROUPS = 16
FOLLOWED = 32  # tokens x whose followers are told apart; those of the others are not
ROOM = 64  # tokens that a draw could have, so that its first rounds draft as ever


@dataclass(frozen=True)
class LawTest:
    """How far draws with a drafter are from the law of plain sampling.

    Attributes:
        temperature: Of the sampler.
        tokens: 1: the law of x. 2: the joint law of x and y.
        draws: Number of them.
        total_variation: Distance of draws and law, from 0 to 1.
        noise_floor: What the distance of that many right draws stays below, but for one case in
            a thousand.
    """

    temperature: float
    tokens: int
    draws: int
    total_variation: float
    noise_floor: float

    @property
    def passed(self) -> bool:
        """Whether chance explains the distance."""
        return self.total_variation <= self.noise_floor


@dataclass(eq=False)
class Begun:
    """The place of one answer after the prompt; `length` rows, of which T are the prompt's.

    Attributes:
        length: See `Cache`.
        path: [S] int32 rows committed after the prompt.
        tree: What was verified last.
    """

    length: int
    path: mx.array = field(default_factory=lambda: mx.zeros((0,), dtype=mx.int32))
    tree: DraftTree | None = None

    def commit(self, rows: Sequence[int]) -> None:
        """See `Cache`.

        Raises:
            ValueError: If nothing was verified.
        """
        if self.tree is None:
            raise ValueError("Rows can be committed after a tree was verified; there was none.")
        self.path = mx.concatenate([self.path, self.tree.tokens[mx.array(tuple(rows))]])
        self.length += len(rows)


class ReadOnce(TargetAround):
    """A target that has read one prompt, and answers it many times from there.

    Its own cache never goes past the prompt: rows committed by an answer are read again before each
    tree, which for a few rows is cheaper than the prompt.

    Args:
        target: Reads the prompt now.
        prompt: T rows; the only one that `prefill` takes.
        first: The token that every answer begins with, whatever the sampler.
    """

    def __init__(self, target: Target, prompt: Prompt, first: int) -> None:
        """Read the prompt."""
        super().__init__(target)
        self._cache = target.make_cache()
        out = target.prefill(prompt, self._cache)
        only = mx.where(mx.arange(target.vocab_size) == first, 0.0, -mx.inf)[None]
        self.start = Output(only, out.hidden)
        mx.eval(self.start.logits, self.start.hidden)

    def make_cache(self) -> Begun:
        """Return the place behind the prompt."""
        return Begun(self._cache.length)

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:  # noqa: ARG002
        """Return what was read: hidden [T, D], and logits [1, V] that allow the first token."""
        return self.start

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """See `Target`."""
        if not isinstance(cache, Begun):
            raise TypeError(
                f"A target takes the caches that its make_cache returns; got "
                f"{type(cache).__name__}."
            )
        cache.tree = tree
        skipped = len(cache.path)
        parents = tree.topology.parents
        topology = Topology((*range(-1, skipped - 1), *(row + skipped for row in parents)))
        tokens = mx.concatenate([cache.path, tree.tokens])
        out = self.target.verify(DraftTree(topology, tokens), self._cache)
        return Output(out.logits[skipped:], out.hidden[skipped:])


@dataclass(frozen=True, eq=False)
class BegunDrafter(Generic[State]):
    """A drafter that has read a prompt and the token after it.

    Attributes:
        drafter: Does the work.
        start: Its state there.
    """

    drafter: Drafter[State]
    start: State

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> State:  # noqa: ARG002
        """Return the state; the prompt must be the one that was read."""
        return self.start

    def draft(self, root: int, state: State, sampler: Sampler, key: mx.array) -> DraftTree:
        """See `Drafter`."""
        return self.drafter.draft(root, state, sampler, key)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: State) -> State:
        """See `Drafter`."""
        return self.drafter.extend(hidden, tokens, state)


@dataclass(frozen=True, eq=False)
class PairLaw:
    """The exact law of x and y.

    Attributes:
        first: [V] of x.
        followed: [W] the likeliest x.
        second: [W, V] of y after each of these.
    """

    first: Floats
    followed: npt.NDArray[np.int64]
    second: Floats

    def outcomes(self) -> Floats:
        """Return the law of all outcomes: [W * V] pairs, then [V] an x with any y."""
        alone = self.first.copy()
        alone[self.followed] = 0
        pairs = self.first[self.followed, None] * self.second
        return np.concatenate([pairs.ravel(), alone])

    def place(self, x: int, y: int) -> int:
        """Return the outcome, an index of `outcomes`, that a pair of tokens is."""
        (row,) = np.nonzero(self.followed == x)
        return int(row[0]) * len(self.first) + y if len(row) else self.second.size + x


def law_of_two(target: Target, first: int, sampler: Sampler) -> PairLaw:
    """Return the law of the two tokens after `first`, from passes over one row.

    Args:
        target: From `ReadOnce`.
        first: The token after the prompt.
        sampler: Gives the processed law.
    """
    cache = target.make_cache()

    def after(token: int) -> Floats:
        tree = DraftTree(ROOT_ALONE, mx.array([token], dtype=mx.int32))
        probs = sampler.probs(target.verify(tree, cache).logits)[0]
        law: Floats = np.array(probs, dtype=np.float64)
        law /= law.sum()
        return law

    law = after(first)
    cache.commit((0,))
    followed = np.argsort(-law, kind="stable")[:FOLLOWED]
    followed = followed[law[followed] > 0]
    return PairLaw(law, followed, np.stack([after(int(token)) for token in followed]))


def compare(counts: Floats, law: Floats, tokens: int, temperature: float) -> LawTest:
    """Compare the counts of outcomes with their law, in groups.

    Args:
        counts: [outcomes] of draws.
        law: [outcomes] probabilities.
        tokens: Of each draw, for the report.
        temperature: Likewise.
    """
    order = np.argsort(-law, kind="stable")
    ends = np.cumsum(law[order])
    middles = np.minimum(ends - law[order] / 2, 1 - 1e-9)
    groups = np.empty(len(law), dtype=np.int64)
    groups[order] = np.floor(middles * GROUPS).astype(np.int64)
    # What cannot happen has no part in any group's chance.
    groups[law == 0] = GROUPS
    expected: Floats = np.bincount(groups, law, GROUPS + 1).astype(np.float64)
    seen = np.bincount(groups, counts, GROUPS + 1)
    draws = int(counts.sum())
    distance = np.abs(seen / draws - expected).sum() / 2
    floor = noise_floor(expected, draws)
    return LawTest(temperature, tokens, draws, float(distance), float(floor))


def check_law(
    target: Target,
    drafter: Drafter[Any],
    prompt: Prompt,
    first: int,
    sampler: Sampler,
    *,
    draws: int,
    key: mx.array,
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[LawTest, LawTest]:
    """Draw two tokens with a drafter, many times, and compare them with their exact law.

    Args:
        target: Whose law it is, processed or not.
        drafter: Proposes them.
        prompt: What they follow; it must leave room for three tokens.
        first: The token between the prompt and them.
        sampler: How tokens are drawn; not greedy.
        draws: How often.
        key: PRNG key.
        progress: Told of each draw.

    Returns:
        The tests of one token and of both.
    """
    begun = ReadOnce(target, prompt, first)
    law = law_of_two(begun, first, sampler)
    read = BegunDrafter(drafter, drafter.prefill(prompt, begun.start.hidden, first))
    one, both = np.zeros(len(law.first)), np.zeros(law.second.size + len(law.first))
    for each in mx.random.split(key, draws):
        said: list[int] = []
        rounds = decode(
            begun, read, prompt, sampler=sampler, key=each, max_tokens=ROOM, stop_ids=()
        )
        for some in rounds:
            said += some.tokens
            if len(said) >= 3:
                break
        _, x, y = said[:3]
        one[x] += 1
        both[law.place(x, y)] += 1
        progress(1)
    return (
        compare(one, law.first, 1, sampler.temperature),
        compare(both, law.outcomes(), 2, sampler.temperature),
    )
