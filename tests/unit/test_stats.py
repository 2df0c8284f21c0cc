import time
from collections.abc import Iterator

import mlx.core as mx
import pytest

from flash_mlx.decode import NoDrafter, Round
from flash_mlx.stats import GenerationStats, TimedDrafter, TimedTarget
from flash_mlx.tree import Topology
from toy import GREEDY, KEY, RandomDrafter, ToyTarget, generate

ROUNDS = [
    Round((1,), 0, 0),  # the prefill's own
    Round((2, 3, 4), 4, 2),
    Round((5,), 4, 0),
    Round((6, 7), 2, 1),
    Round((8, 9), 2, 2),  # cut: both were drafted
    Round((3,), 0, 0),  # the root alone
]


def counted(rounds: list[Round]) -> GenerationStats:
    stats = GenerationStats()
    assert list(stats.watch(rounds)) == rounds
    return stats


def test_counts_leave_the_prefill_out() -> None:
    stats = counted(ROUNDS)
    assert stats.generation_tokens == 10
    assert stats.rounds == 5
    assert (stats.drafted, stats.accepted) == (12, 5)
    assert stats.accept_lengths == {3: 1, 1: 2, 2: 2}
    assert stats.mean_acceptance_length == 9 / 5
    assert stats.acceptance_rate == 5 / 12


def test_acceptance_by_position_counts_rounds_that_drafted_so_far() -> None:
    assert counted(ROUNDS).acceptance_by_position == (3 / 4, 2 / 4, 0, 0)


@pytest.mark.parametrize("rounds", [[], ROUNDS[:1]])
def test_nothing_drafted_gives_zeros(rounds: list[Round]) -> None:
    stats = counted(rounds)
    assert stats.mean_acceptance_length == 0
    assert stats.acceptance_rate == 0
    assert stats.acceptance_by_position == ()
    assert stats.generation_tps == 0


def test_plain_decoding_has_an_acceptance_length_of_one() -> None:
    stats = counted([Round((1,), 0, 0)] * 5)
    assert stats.mean_acceptance_length == 1


def test_the_prefill_and_the_rest_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 12.5, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    stats = counted(ROUNDS[:3])
    assert stats.prefill_seconds == 2.0
    assert stats.decode_seconds == 2.0
    assert stats.generation_tps == 4 / 2.0


def test_an_abandoned_iterator_leaves_what_was_counted() -> None:
    stats = GenerationStats()
    rounds: Iterator[Round] = stats.watch(ROUNDS)
    next(rounds), next(rounds)
    assert stats.generation_tokens == 4
    assert stats.rounds == 1


@pytest.mark.parametrize("laws", [True, False])
def test_clocks_change_nothing_but_their_own_reading(laws: bool) -> None:
    plain = ToyTarget()
    target = TimedTarget(plain)
    drafter = TimedDrafter(RandomDrafter(Topology.chain(2), plain.vocab_size, laws))
    text = generate(target, drafter, (1, 2), 10)
    assert text == generate(plain, NoDrafter(), (1, 2), 10, sampler=GREEDY, key=KEY)
    assert target.verify_seconds > 0
    assert drafter.draft_seconds > 0
    assert (target.vocab_size, target.hidden_size, target.max_context) == (11, 16, None)
    assert target.lm_head(target.embed(mx.array([3, 1]))).shape == (2, 11)
