"""Recording which drafts are right, and pacing a recording."""

import mlx.core as mx
import pytest

from flash_mlx.bench.macs import CURVES
from flash_mlx.bench.pacing import num_right, record, replay
from flash_mlx.cost import Costs
from flash_mlx.prompt import Prompt
from flash_mlx.tree import DraftTree, Topology
from toy import OracleDrafter, ToyTarget, continuation

TARGET = ToyTarget(seed=3)
FORKED = Topology((-1, 0, 0, 1, 2, 4))


def test_a_tree_is_right_as_far_as_the_text_follows_one_of_its_paths() -> None:
    tree = DraftTree(FORKED, mx.array([9, 1, 2, 3, 4, 5], dtype=mx.int32))
    for follows, right in (((1, 3, 5), 2), ((2, 4, 5), 3), ((2, 3), 1), ((4,), 0), ((2, 4), 2)):
        assert num_right(tree, follows) == right


@pytest.mark.parametrize("corruption", [0.0, 1.0])
def test_drafts_are_counted_after_each_token_of_the_answer(corruption: float) -> None:
    answer = continuation(TARGET, (1, 2), 9)
    oracle = OracleDrafter(Topology.chain(3), TARGET, laws=False, corruption=corruption)
    counts = record(TARGET, oracle, Prompt((1, 2)), answer)
    assert len(counts) == 8
    if corruption == 0:
        assert counts == [3, 3, 3, 3, 3, 3, 2, 1]
    else:
        assert sum(counts) < 8


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
@pytest.mark.parametrize("good", [True, False])
def test_published_costs_never_make_drafting_slower(curve: object, good: bool) -> None:
    plain = curve.times[0][1]
    costs = Costs(plain, curve.times, ((1, 0.1 * plain), (7, 0.15 * plain)))
    counts = [min(7, 199 - place) if good else 0 for place in range(200)]
    speedup, depths = replay(counts, costs, 7)
    assert speedup >= 0.98
    if good:
        assert speedup > (1.5 if curve.generations[0] not in ("M1", "M2") else 0.98)
    else:
        assert sum(depth == 0 for depth in depths) > 0.8 * len(depths)
