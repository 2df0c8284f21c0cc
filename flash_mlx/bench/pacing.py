"""What pacing makes of recorded drafts where rounds cost something else: arithmetic, no model runs.

A recording says, for each token of a text, how many of the drafts for what follows it are right. At
temperature 0 that does not depend on what is drafted, so any cost curve can be put under it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flash_mlx.cost import Costs
from flash_mlx.decode import Drafter, Target
from flash_mlx.draft.sources import Outcomes
from flash_mlx.measure import read_answer
from flash_mlx.pace import PRIOR, Pace
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree


def record(
    target: Target, drafter: Drafter[Any], prompt: Prompt, answer: Sequence[int]
) -> list[int]:
    """Return how many drafts after each token of a greedy answer are right, but for its last one.

    Args:
        target: Reads the answer.
        drafter: Drafts what it always does, unpaced.
        prompt: What is answered.
        answer: Ids.
    """
    cache = target.make_cache()
    prefilled = target.prefill(prompt, cache)
    hidden = read_answer(target, prompt, answer).hidden
    state = drafter.prefill(prompt, prefilled.hidden, answer[0])
    counts: list[int] = []
    for place in range(1, len(answer)):
        tree = drafter.draft(answer[place - 1], state, Sampler(), mx.random.key(0))
        counts.append(num_right(tree, answer[place:]))
        state = drafter.extend(hidden[place : place + 1], (answer[place],), state)
    return counts


def num_right(tree: DraftTree, follows: Sequence[int]) -> int:
    """Return how many drafts of a tree a text goes on with."""
    tokens: Any = tree.tokens.tolist()
    row = 0
    for count, token in enumerate(follows):
        found = [child for child in tree.topology.children[row] if tokens[child] == token]
        if not found:
            return count
        row = found[0]
    return len(follows)


@dataclass(frozen=True)
class Replayed:
    """What pacing made of a text.

    Attributes:
        tokens: Of the text, its first one excluded.
        spent: What they cost [plain tokens].
        depths: Drafted ahead in each round.
    """

    tokens: int
    spent: float
    depths: tuple[int, ...]

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return self.tokens / self.spent


def overall(texts: Sequence[Replayed]) -> float:
    """Return the speed-up of several texts, one after the other."""
    return sum(text.tokens for text in texts) / sum(text.spent for text in texts)


def replay(
    texts: Iterable[Sequence[int]],
    costs: Costs,
    block_size: int,
    belief: float = PRIOR,
    *,
    greedy: bool = True,
) -> list[Replayed]:
    """Return what pacing makes of texts that one process decodes, in this order, at these costs.

    As there, a greedy text goes on from what became of those before it, and the first may try a
    drafter at a loss; each sampled text begins anew. A prompt that was not read for a drafter that
    did not pay is read when it is asked, and the first pass after a draft waits for the host.

    Args:
        texts: From `record`, none of them empty.
        costs: Of rounds and drafts.
        block_size: Most that is drafted in a round.
        belief: See `Pace`.
        greedy: Whether the texts count as greedy.
    """
    fresh = Pace.begin(costs, belief, block_size, greedy=greedy, remembered=greedy).settled()
    pace, replayed = fresh, []
    for number, accepted in enumerate(texts):
        if number:
            rests = greedy and pace.carried(costs, late=True).rests
            pace = pace.carried(costs, late=rests) if greedy else fresh
        each, pace = _replayed(accepted, pace, block_size)
        replayed.append(each)
    return replayed


def _replayed(accepted: Sequence[int], pace: Pace, block_size: int) -> tuple[Replayed, Pace]:
    """Return what pacing makes of a text that begins with this pace, and the pace at its end."""
    costs, depths, place, spent = pace.costs, [0], 0, 0.0
    while place < len(accepted):
        depth = 0 if pace.wait else pace.reach(block_size)
        if depth == 0:
            pace = (pace if pace.wait else pace.rested()).parked(1)
            place, spent = place + 1, spent + (costs.round(1) if depths[-1] else 1)
        else:
            hits = min(depth, accepted[place])
            tried = range(min(depth, hits + 1))
            outcomes: Outcomes = {("draft", slot): [(PRIOR, slot < hits)] for slot in tried}
            spent += costs.round(1 + depth) + costs.draft(depth) + pace.late
            pace, place = pace.after(1 + hits, 1 + depth, depth, outcomes), place + 1 + hits
        depths.append(depth)
    return Replayed(place, spent, tuple(depths[1:])), pace
