"""Recording which drafts are right, and pacing a recording."""

import random
from itertools import pairwise

import mlx.core as mx
import pytest

from flash_mlx.bench.macs import CURVES, Curve
from flash_mlx.bench.pacing import num_right, overall, record, replay
from flash_mlx.cost import Costs
from flash_mlx.pace import LATE, PRIOR, RISK, RISK_PER_TOKEN, TRIAL
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
    (text,) = replay([counts], costs, 7)
    assert text.speedup >= 0.98
    if good:
        assert text.speedup > (1.5 if curve.generations[0] not in ("M1", "M2") else 0.98)
    else:
        assert sum(depth == 0 for depth in text.depths) > 0.8 * len(text.depths)


USELESS = [[0] * 60] * 40
DEAR = Costs(1.0, ((1, 1.15), (2, 1.24), (4, 1.3), (8, 1.6), (16, 2.3)), ((1, 0.19), (7, 0.35)))


def at(curve: Curve) -> Costs:
    plain = curve.times[0][1]
    return Costs(plain, curve.times, ((1, 0.1 * plain), (7, 0.15 * plain)))


ALL = [*map(at, CURVES), DEAR]
NAMES = [*(curve.name for curve in CURVES), "waits"]


@pytest.mark.parametrize("belief", [PRIOR, 0.95])
@pytest.mark.parametrize("costs", ALL, ids=NAMES)
def test_many_texts_lose_hardly_anything_to_a_useless_drafter(costs: Costs, belief: float) -> None:
    texts = replay(USELESS, costs, 7, belief)
    assert overall(texts) >= (0.993 if belief == PRIOR else 0.99)
    assert sum(not any(text.depths) for text in texts) > 20
    trial = TRIAL if belief > PRIOR else RISK
    assert texts[0].spent - 60 <= trial + RISK_PER_TOKEN * 60
    lost = sum(text.spent - text.tokens for text in texts)
    assert lost <= trial + RISK_PER_TOKEN * 60 * len(texts)


@pytest.mark.parametrize("belief", [PRIOR, 0.95])
@pytest.mark.parametrize("costs", ALL[1:], ids=NAMES[1:])
def test_a_drafter_that_is_good_at_another_topic_is_found_within_a_few_texts(
    costs: Costs, belief: float
) -> None:
    good = [[7] * 60] * 12
    texts = replay([*USELESS[:8], *good, *USELESS[:8], *good], costs, 7, belief)
    for start in (8, 28):
        found = next(place for place in range(start, start + 12) if texts[place].speedup > 1.2)
        assert found < start + 8
        assert all(text.speedup > 1.5 for text in texts[found + 1 : start + 12])


@pytest.mark.parametrize("costs", ALL, ids=NAMES)
def test_good_drafts_are_worth_their_trial_at_every_curve(costs: Costs) -> None:
    rng = random.Random(0)
    texts = [[rng.choice((7, 7, 7, 5, 2, 0)) for _ in range(60)] for _ in range(5)]
    assert overall(replay(texts, costs, 7, 0.95)) >= 0.98


def test_sampled_texts_begin_anew_and_greedy_ones_do_not() -> None:
    texts = [[0] * 60] * 3
    sampled = replay(texts, DEAR, 7, 0.95, greedy=False)
    assert sampled[0] == sampled[1] == sampled[2]
    greedy = replay(texts, DEAR, 7, 0.95)
    assert sum(map(bool, greedy[0].depths)) > sum(map(bool, sampled[0].depths)) > 0
    assert not any(greedy[1].depths)


def test_a_prompt_that_is_read_late_and_a_pass_that_was_not_queued_cost_what_they_do() -> None:
    texts = replay([[0] * 200] * 10, DEAR, 7)
    later = next(text for text in texts[1:] if any(text.depths))
    tries = [depth for depth in later.depths if depth]
    drafted = sum(DEAR.round(1 + depth) + DEAR.draft(depth) for depth in tries)
    plain = len(later.depths) - len(tries)
    after = sum(1 for a, b in pairwise(later.depths) if a and not b)
    expected = plain + drafted + after * DEAR.wait + LATE * DEAR.draft(1)
    assert later.spent == pytest.approx(expected)


def test_a_lucky_first_draft_does_not_park_a_drafter_that_pays() -> None:
    """Where a block costs 6.3 plain tokens and brings 8, after a first one that brought 11."""
    costs = Costs(1.0, ((1, 1.0), (2, 1.85), (4, 3.3), (8, 6.1), (16, 6.3)), ((1, 0.1), (10, 0.2)))
    (text,) = replay([[10, *[7] * 149]], costs, 10, 0.95)
    assert text.speedup > 1.15
    assert text.depths.count(0) < 0.1 * len(text.depths)
