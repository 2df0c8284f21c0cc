"""Drafting pays or is parked: the rule on its own, on measured cost curves and recorded drafts."""

import itertools
import random
import statistics
from dataclasses import replace

import pytest

from flash_mlx.bench import pacing
from flash_mlx.cost import Costs
from flash_mlx.pace import (
    CREDIT,
    FIRST_GAP,
    PRIOR,
    RISK,
    RISK_PER_TOKEN,
    RISK_SHARE,
    TRUST,
    Pace,
    Rate,
)

# Cost of a pass over m rows of a 4-bit model, relative to one row, as users of MLX measured it: the
# M3 Max in mlx issue 3863, the M4 Pro in 3839 and 3852. On M1 and M2, MLX 0.32 multiplies by a
# 4-bit matrix row by row up to 5 rows (`vector_limit` 6), and then costs as much whatever the rows.
CURVES = {
    "M1": ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 6.0), (32, 6.2)),
    "M2": ((1, 1.0), (2, 1.9), (3, 2.8), (4, 3.7), (5, 4.6), (6, 4.7), (32, 4.9)),
    "M3 Max": ((1, 1.0), (2, 1.0), (4, 1.28), (6, 2.04), (8, 2.5), (10, 3.9), (16, 3.9), (32, 4.0)),
    "M4 Pro": ((1, 1.0), (2, 1.0), (3, 1.2), (4, 1.45), (5, 1.75), (6, 2.07), (8, 2.75), (10, 4.5)),
    # The demo on one core of an AMD EPYC, reading ahead worth 6% of a pass.
    "CPU": ((1, 1.06), (2, 1.11), (4, 1.16), (8, 1.40), (16, 1.89), (32, 2.9)),
}
DRAFTS = ((1, 0.1), (7, 0.15))
DEPTH = 7

# Greedy captions of the demo: how many of the seven drafts for what follows token i are accepted.
RECORDED = [
    "77777776747760437747677214321077654321777765432104321066776777777777777777776210210777654321",
    "77777777777777677547577657765332107770777771777777777777777654321",
    "7777777776776543210477777774327327077772105432103210675777757777777776523710371777654321",
    "777777777763547777747106077616543210267432104211003217777777777577765433100543210172777777654321",
    "7777777747677327432177437707757325422272104321007765437177654321",
    "77777777654727677332707455321732147254377214321077654727775433773577217654651371077654321",
    "7777777765432104321062700573210674521210544210737653431054323014321075707776543216210210777743210101010777654321",
    "77777654321051727077767437321056351321077776573216753377777654321",
    "7777777777777777765542100432107465401106735732456543650721032076543217654322065432107654523210301010777654321",
    "777777777654231507777107277776747216556575736543210024361041045210503220077577277765432103210777654321",
]


def texts(reliability: float) -> list[list[int]]:
    """Recorded drafts of a worse drafter: each that was right stays so with this probability."""
    rng = random.Random(0)

    def kept(count: int) -> int:
        return next((i for i in range(count) if rng.random() >= reliability), count)

    return [[kept(int(count)) for count in text] for text in RECORDED]


def replay(
    accepted: list[int], costs: Costs, belief: float = PRIOR
) -> tuple[float, tuple[int, ...]]:
    """Pace a text by itself."""
    (text,) = pacing.replay([accepted], costs, DEPTH, belief, greedy=False)
    return text.speedup, text.depths


@pytest.mark.parametrize("belief", [PRIOR, 0.95])
@pytest.mark.parametrize("reliability", [1.0, 0.8, 0.5, 0.2, 0.0])
@pytest.mark.parametrize("curve", CURVES)
def test_drafting_is_never_slower(curve: str, reliability: float, belief: float) -> None:
    costs, risk = Costs(1.0, CURVES[curve], DRAFTS), TRUST if belief > PRIOR else RISK
    for text in texts(reliability):
        for length in (20, 50, len(text)):
            speedup, _ = replay(text[:length], costs, belief)
            # The loss of a text is bounded, also where all its drafts are wrong.
            length = min(length, len(text))
            further = RISK_PER_TOKEN * max(0.0, length - risk / RISK_SHARE)
            assert length / speedup - length <= risk + further + 1e-6
            assert speedup >= (0.98 if length * RISK_SHARE >= risk else 0.93)


@pytest.mark.parametrize(
    ("curve", "least", "depths"),
    [("M1", 1.0, {0}), ("M3 Max", 2.2, {3}), ("M4 Pro", 2.0, {2, 3}), ("CPU", 2.9, {6, 7})],
)
def test_good_drafts_are_as_long_as_the_machine_makes_them_pay(
    curve: str, least: float, depths: set[int]
) -> None:
    costs = Costs(1.0, CURVES[curve], DRAFTS)
    results = [replay(text, costs) for text in texts(1.0)]
    assert statistics.median(speedup for speedup, _ in results) >= least
    chosen = [depth for _, each in results for depth in each]
    assert statistics.mode(chosen) in depths


def test_a_drafter_that_becomes_good_is_found_out() -> None:
    costs = Costs(1.0, CURVES["M3 Max"], DRAFTS)
    _, depths = replay([0] * 150 + [DEPTH] * 700, costs)
    assert depths[0] > 0
    assert depths[10:100].count(0) > 80
    assert sum(depth > 1 for depth in depths[-40:]) == 40


def test_a_drafter_known_to_be_good_drafts_far_ahead_at_once() -> None:
    costs = Costs(1.0, CURVES["CPU"], DRAFTS)
    known = [replay([int(c) for c in text], costs, 0.95) for text in RECORDED]
    unknown = [replay([int(c) for c in text], costs) for text in RECORDED]
    assert all(depths[0] == DEPTH for _, depths in known)
    assert all(depths[0] < DEPTH for _, depths in unknown)
    assert statistics.mean(s for s, _ in known) > 1.02 * statistics.mean(s for s, _ in unknown)


def test_what_earlier_texts_gained_may_be_risked_and_what_they_lost_may_not() -> None:
    costs = Costs(1.0, ((1, 1.2), (2, 1.9), (12, 2.4)), ((1, 0.2), (7, 0.4)))
    fresh = Pace.begin(costs, 0.95)
    dear = next(d for d in range(1, 11) if not fresh.affords(1 + d, d))
    gainful = replace(fresh, tokens=90, spent=30.0).carried(costs)
    assert gainful.affords(1 + dear, dear)
    assert gainful.spent == -CREDIT
    assert gainful.carried(costs).spent == -CREDIT  # credit does not add up
    assert fresh.carried(costs).spent == 0
    aside = pytest.approx(RISK - 1.3)  # the smallest draft costs so much beyond its token
    assert fresh.parked(500).carried(costs).spent == aside
    assert replace(fresh, tokens=500, spent=500.6).carried(costs).spent == aside
    assert replace(fresh, tokens=500, spent=499).carried(costs).spent == -1
    cheap = Costs(1.0, CURVES["CPU"], DRAFTS)
    assert fresh.parked(500).carried(cheap).spent == 0  # nothing was gained
    assert fresh.parked(500).carried(cheap, late=True).spent == 0
    lost = replace(fresh, tokens=20, spent=20.7).carried(costs)
    assert lost.wait > 0
    assert lost.spent == pytest.approx(0.7 - 20 * RISK_PER_TOKEN)


def test_a_sampled_text_trusts_what_training_measured_as_earlier_texts_may_not_be_asked() -> None:
    costs = Costs(1.0, ((1, 1.2), (4, 1.4), (12, 1.9)), ((1, 0.2), (7, 0.4)))
    greedy, sampled = (Pace.begin(costs, 0.95, greedy=each) for each in (True, False))
    assert (greedy.reach(7), sampled.reach(7)) == (2, 7)
    assert Pace.begin(costs, greedy=False).risk == greedy.risk < sampled.risk == TRUST


def test_a_good_drafter_is_tried_once_where_passes_are_dear() -> None:
    costs = Costs(1.0, CURVES["M2"], DRAFTS)
    assert Pace.begin(costs, 0.95).reach(DEPTH) < DEPTH
    assert Pace.begin(costs, 0.95, remembered=True).reach(DEPTH) == DEPTH
    assert Pace.begin(costs, remembered=True).risk == RISK  # nobody measured this one


@pytest.mark.parametrize("curve", CURVES)
def test_what_the_trial_of_a_useless_drafter_lost_is_made_up_for(curve: str) -> None:
    costs = Costs(1.0, CURVES[curve], DRAFTS)
    pace, spent, texts, length = Pace.begin(costs, 0.95, remembered=True), 0.0, 40, 80
    for text in range(texts):
        pace = pace.carried(costs) if text else pace
        for _ in range(length):
            depth = 0 if pace.wait else pace.reach(DEPTH)
            if not depth:
                pace, spent = (pace if pace.wait else pace.rested()).parked(1), spent + 1
                continue
            refused = {("draft", 0): [(pace.rate(("draft", 0)).accepted, False)]}
            pace = pace.after(1, 1 + depth, depth, refused)
            spent += costs.round(1 + depth) + costs.draft(depth)
    assert spent <= 1.015 * texts * length
    assert spent > texts * length


@pytest.mark.parametrize(("wait", "looks"), [(0.0, True), (0.02, True), (0.2, False)])
def test_drafts_are_looked_at_where_a_wait_is_cheap(wait: float, looks: bool) -> None:
    costs = Costs(1.0, ((1, 1 + wait), (8, 1.5 + wait)), DRAFTS)
    assert costs.wait == pytest.approx(wait)
    assert Pace(costs).looks(DEPTH) == looks


def test_a_belief_weighs_against_a_few_refusals() -> None:
    outcomes = {("draft", 0): [(0.95, False)]}
    costs = Costs(1.0, CURVES["CPU"], DRAFTS)
    after = [Pace.begin(costs, belief).after(1, 2, 1, outcomes) for belief in (0.95, PRIOR)]
    assert after[0].rate(("draft", 0)).accepted > 0.75 > 0.5 > after[1].rate(("draft", 0)).accepted
    assert after[0].rate(("sibling", 1)) == after[1].rate(("sibling", 1))


def test_pauses_grow_while_nothing_is_accepted() -> None:
    _, depths = replay([0] * 2000, Costs(1.0, CURVES["CPU"], DRAFTS))
    tries = [place for place, depth in enumerate(depths) if depth]
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert gaps[-1] >= gaps[len(gaps) // 2] > gaps[0]
    assert max(gaps[1:]) > 4 * FIRST_GAP


def test_rests_become_longer() -> None:
    pace = Pace(Costs(1.0, CURVES["CPU"], DRAFTS))
    waits = []
    for _ in range(6):
        pace = pace.rested()
        waits.append(pace.wait)
    assert waits == [8, 16, 32, 64, 128, 128]


def test_what_costs_more_than_may_be_lost_is_never_tried() -> None:
    pace = Pace(Costs(1.0, ((1, 1.0), (2, 3.0)), DRAFTS)).settled()
    assert pace.wait > 100
    assert replay([DEPTH] * 80, pace.costs) == (1.0, (0,) * 80)


def test_costs_between_measured_points_and_beyond_them() -> None:
    costs = Costs(0.5, ((1, 0.5), (3, 1.0), (5, 1.5)), ((2, 0.1), (4, 0.2)))
    assert [costs.round(m) for m in (1, 2, 3, 4, 5, 7)] == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    assert [round(costs.draft(k), 6) for k in (0, 2, 3, 4, 5)] == [0.0, 0.2, 0.3, 0.4, 0.5]
    assert Costs(1.0, ((1, 1.0),)).draft(3) == 0


def test_more_rows_never_cost_less() -> None:
    costs = Costs(1.0, ((1, 1.4), (2, 1.1), (4, 1.9), (8, 1.5)))
    assert costs.rounds == ((1, 1.1), (2, 1.1), (4, 1.5), (8, 1.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plain": 0.0}, "above 0; got 0"),
        ({"plain": float("nan")}, "above 0; got nan"),
        ({"rounds": ((1, 1.0), (2, float("inf")))}, "above 0"),
        ({"rounds": ()}, "at least one round"),
        ({"rounds": ((2, 1.0), (1, 1.0))}, "ascend from 1 on"),
        ({"drafts": ((0, 1.0),)}, "ascend from 1 on"),
    ],
)
def test_costs_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    sound = Costs(1.0, ((1, 1.0), (2, 1.5)), ((1, 0.1),))
    with pytest.raises(ValueError, match=message):
        replace(sound, **values)


def test_forecasts_are_corrected_by_how_far_off_earlier_ones_were() -> None:
    fresh = Rate()
    assert fresh.correct(0.4) == pytest.approx(0.4)
    right, wrong = fresh, fresh
    for _ in range(40):
        right, wrong = right.after([(0.5, True)]), wrong.after([(0.9, False)])
    assert 0.9 < right.correct(0.5) < 1
    assert wrong.correct(0.9) < 0.1
    assert wrong.correct(0.5) < wrong.correct(0.9)
    for _ in range(100):  # without new evidence, old evidence fades
        wrong = wrong.after([])
    assert wrong.correct(0.9) == pytest.approx(0.9, abs=0.05)


def test_what_was_gained_so_far_does_not_park_a_block_that_pays() -> None:
    """Where it would pick a first draft that does not, as the round's own time is dear."""
    costs = Costs(1.0, ((1, 1.2), (2, 1.2), (7, 1.95)), ((1, 0.05), (6, 0.15)))
    rates = {("draft", slot): Rate(1000, 200 if slot == 0 else 999, 0) for slot in range(6)}
    pace = Pace(costs, rates, tokens=500, spent=400, gained=40, paid=20, depth=10)
    assert 1 + sum(pace.hopes(1)) < costs.ahead(1)
    assert 1 + sum(pace.hopes(6)) > costs.ahead(6)
    assert pace.reach(6) == 6


def test_what_is_looked_up_is_what_is_computed() -> None:
    costs = Costs(0.5, ((1, 0.5), (3, 1.0), (5, 1.5)), ((2, 0.1), (4, 0.2)))
    for depth in (0, 1, 3, 63, 64, 65, 200):
        assert costs.ahead(depth) == costs.round(1 + depth) + costs.draft(depth)
    assert Costs(1.0, ((1, 1.0), (2, 1.5))).ahead(3) == 2.5
