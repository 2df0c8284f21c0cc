import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import pytest

from flash_mlx.around import TargetAround
from flash_mlx.decode import (
    Cache,
    Drafter,
    NoDrafter,
    Output,
    ReadingDrafter,
    Round,
    Target,
    decode,
)
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats, Phases, clocked
from flash_mlx.tree import DraftTree, Topology
from toy import GREEDY, KEY, RandomDrafter, ToyTarget, generate

ROUNDS = [
    Round((1,), 0, 0),  # the prefill's own
    Round((2, 3, 4), 4, 2),
    Round((5,), 4, 0),
    Round((6, 7), 2, 1),
    Round((8, 9), 2, 2),  # cut: both were drafted
    Round((3,), 0, 0, parked=True),  # the root alone
]


@dataclass
class Clock:
    """Time that passes only where something says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


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
    assert stats.parked == 1
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
    clock = Clock(10.0)
    monkeypatch.setattr(time, "perf_counter", clock)

    def rounds() -> Iterator[Round]:
        for each, seconds in zip(ROUNDS, (2.0, 0.5, 1.5), strict=False):
            clock.now += seconds
            yield each

    stats = GenerationStats()
    assert len(list(stats.watch(rounds()))) == 3
    assert stats.prefill_seconds == 2.0
    assert stats.decode_seconds == 2.0
    assert stats.generation_tps == 4 / 2.0


def test_an_abandoned_iterator_leaves_what_was_counted() -> None:
    stats = GenerationStats()
    rounds: Iterator[Round] = stats.watch(ROUNDS)
    next(rounds), next(rounds)
    assert stats.generation_tokens == 4
    assert stats.rounds == 1


class SlowTarget(TargetAround):
    def __init__(self, target: Target, clock: Clock) -> None:
        super().__init__(target)
        self.clock = clock

    def make_cache(self) -> Cache:
        cache = super().make_cache()
        commit = cache.commit

        def slow(rows: Sequence[int]) -> None:
            self.clock.now += 3
            commit(rows)

        cache.commit = slow
        return cache

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        self.clock.now += 100
        return super().verify(tree, cache)


class SlowDrafter(RandomDrafter):
    clock: Clock

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> None:
        self.clock.now += 5000

    def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:
        self.clock.now += 20
        return super().draft(root, state, sampler, key)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: None) -> None:
        self.clock.now += 7


@pytest.mark.parametrize("every", [1, 3])
def test_time_outside_of_target_and_drafter_is_the_hosts(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    plain = ToyTarget()
    SlowDrafter.clock = clock
    phases = Phases(every)
    target, drafter = clocked(
        SlowTarget(plain, clock), SlowDrafter(Topology.chain(2), plain.vocab_size, True), phases
    )
    stats = GenerationStats(phases=phases)
    for _ in stats.watch(decoding(target, drafter, 12)):
        clock.now += 1000  # the caller's time is not the round's
    assert stats.rounds > 5
    assert phases.rounds == len(range(2, stats.rounds + 1, every))
    assert phases.per_round() == {"draft_seconds": 27, "verify_seconds": 100, "host_seconds": 3}
    assert phases.host_seconds == 3 * phases.rounds


@pytest.mark.filterwarnings("ignore:A drafter must return ids")
@pytest.mark.parametrize("every", [1, 2])
def test_rounds_after_a_broken_drafter_was_dropped_are_not_clocked(every: int) -> None:
    class Broken(RandomDrafter):
        def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:
            tree = super().draft(root, state, sampler, key)
            asked.append(root)
            return replace(tree, tokens=tree.tokens + (100 if len(asked) == 4 else 0))

    asked: list[int] = []
    phases = Phases(every)
    target, drafter = clocked(ToyTarget(), Broken(Topology.chain(2), 11, True), phases)
    stats = GenerationStats(phases=phases)
    list(stats.watch(decoding(target, drafter, 30)))
    assert (len(asked), phases.begun) == (4, 4)
    assert stats.rounds > 10
    assert phases.rounds == len(range(2, 5, every))


def test_a_pass_ahead_is_clocked_in_the_round_that_it_is_for() -> None:
    passes: list[tuple[int, bool]] = []

    class Counted(TargetAround):
        def verify(self, tree: DraftTree, cache: Cache) -> Output:
            passes.append((phases.begun, phases.now))
            return super().verify(tree, cache)

    phases = Phases(4)
    target, drafter = clocked(Counted(ToyTarget()), NoDrafter(), phases)
    list(decoding(target, drafter, 12))
    clocked_passes = [number for number, now in passes if now]
    assert clocked_passes == [2, 6, 10]  # each in its own round, once
    # In the others, plain decoding still reads ahead: a pass begins in the round before its own.
    assert len(passes) == 11
    assert [number for number, now in passes if not now].count(3) == 2


def decoding(target: Target, drafter: Drafter[Any], max_tokens: int) -> Iterator[Round]:
    return decode(
        target, drafter, Prompt((1, 2)), sampler=GREEDY, key=KEY, max_tokens=max_tokens, stop_ids=()
    )


@pytest.mark.parametrize("laws", [True, False])
def test_clocks_change_nothing_but_their_own_reading(laws: bool) -> None:
    plain = ToyTarget()
    phases = Phases()
    target, drafter = clocked(
        plain, RandomDrafter(Topology.chain(2), plain.vocab_size, laws), phases
    )
    text = generate(target, drafter, (1, 2), 10)
    assert text == generate(plain, NoDrafter(), (1, 2), 10, sampler=GREEDY, key=KEY)
    assert phases.verify_seconds > 0
    assert phases.draft_seconds > 0
    assert (target.vocab_size, target.hidden_size, target.max_context) == (11, 16, None)
    assert target.lm_head(target.embed(mx.array([3, 1]))).shape == (2, 11)


def test_a_drafter_that_reads_with_the_target_still_does() -> None:
    target, drafter = clocked(ToyTarget(), NoDrafter(), Phases())
    assert isinstance(drafter, ReadingDrafter)
    _, other = clocked(target, RandomDrafter(Topology.chain(1), 11, True), Phases())
    assert not isinstance(other, ReadingDrafter)
