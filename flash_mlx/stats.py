"""Counts and times of a generation, taken from outside of the loop.

`GenerationStats.watch` passes rounds through and keeps the books. `clocked` splits the time of some
rounds into phases (`Phases`). A clocked round waits for the device after each phase, which costs
the overlap of host and device; so it explains a time, and does not measure it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic

import mlx.core as mx

from flash_mlx.around import TargetAround
from flash_mlx.decode import Cache, Drafter, Output, ReadingDrafter, Round, State, Target
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree


@dataclass(eq=False)
class Phases:
    """Where rounds spend their time, as seen in those that are clocked.

    The first round is never clocked, for what the drafter left undone in its prefill falls into it.

    Attributes:
        every: The second round is clocked, and every so many after it; 1: all of them.
        begun: Rounds begun.
        ended: `begun` as the last round ended; rounds of a drafter that was dropped begin no more.
        rounds: Of these, clocked and done.
        draft_seconds: Time of the drafter in these, all together [s].
        verify_seconds: Time of the target's passes [s].
        round_seconds: Time of the rounds [s].
    """

    every: int = 1
    begun: int = 0
    ended: int = 0
    rounds: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    round_seconds: float = 0.0

    @property
    def host_seconds(self) -> float:
        """Time in neither drafter nor target [s]."""
        return self.round_seconds - self.draft_seconds - self.verify_seconds

    def clocks(self, number: int) -> bool:
        """Whether round `number`, counted from 1, is clocked."""
        return number >= 2 and (number - 2) % self.every == 0

    @property
    def now(self) -> bool:
        """Whether the round that is going on is clocked."""
        return self.begun != self.ended and self.clocks(self.begun)

    def per_round(self) -> dict[str, float | None]:
        """Return `draft_seconds`, `verify_seconds`, `host_seconds` of a round; None unclocked."""
        times = {
            "draft_seconds": self.draft_seconds,
            "verify_seconds": self.verify_seconds,
            "host_seconds": self.host_seconds,
        }
        return {name: each / self.rounds if self.rounds else None for name, each in times.items()}


@dataclass
class GenerationStats:
    """What a generation brought and what it took.

    The prefill gives one token of its own; it counts as generated, but not as a round.

    Attributes:
        generation_tokens: Tokens emitted, the prefill's own included.
        accept_lengths: Histogram: tokens of a round -> number of such rounds.
        outcomes: Histogram: (drafted, accepted) of a round -> number of such rounds.
        parked: Rounds without drafts because drafting did not pay.
        prefill_seconds: Time to the first token [s].
        decode_seconds: Time from the first token to the last [s].
        phases: Of rounds; nothing is clocked unless `clocked` was given the same ones.
    """

    generation_tokens: int = 0
    accept_lengths: Counter[int] = field(default_factory=Counter)
    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)
    parked: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    phases: Phases = field(default_factory=Phases)

    def watch(self, rounds: Iterable[Round]) -> Iterator[Round]:
        """Yield the rounds of one `decode`, counting and timing them.

        The clock starts at the first request and also runs while the caller deals with a round,
        for the device may be at work then.
        """
        start = resumed = time.perf_counter()
        first: float | None = None
        for each in rounds:
            now = time.perf_counter()
            if self.phases.now:
                self.phases.rounds += 1
                self.phases.round_seconds += now - resumed
            self.phases.ended = self.phases.begun
            self.generation_tokens += len(each.tokens)
            if first is None:
                first = now
                self.prefill_seconds = first - start
            else:
                self.decode_seconds = now - first
                self.accept_lengths[len(each.tokens)] += 1
                self.outcomes[each.num_drafted, each.num_accepted] += 1
                self.parked += each.parked
            yield each
            resumed = time.perf_counter()

    @property
    def rounds(self) -> int:
        """Passes of the target after the prefill."""
        return self.accept_lengths.total()

    @property
    def drafted(self) -> int:
        """Drafts that the target read."""
        return sum(drafted * count for (drafted, _), count in self.outcomes.items())

    @property
    def accepted(self) -> int:
        """Drafts that were emitted."""
        return sum(accepted * count for (_, accepted), count in self.outcomes.items())

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per round, the target's own included; plain decoding has 1, no round 0."""
        return (self.generation_tokens - 1) / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Entry i: of the rounds with more than i drafts, the share with more than i accepted.

        For chains this is how often the draft of slot i is emitted.
        """

        def share(slot: int) -> float:
            offered = sum(count for (drafted, _), count in self.outcomes.items() if drafted > slot)
            taken = sum(count for (_, accepted), count in self.outcomes.items() if accepted > slot)
            return taken / offered

        return tuple(share(slot) for slot in range(max((d for d, _ in self.outcomes), default=0)))

    @property
    def generation_tps(self) -> float:
        """Tokens per second after the first one; 0 if there is no second."""
        return (self.generation_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class TimedTarget(TargetAround):
    """A target that clocks its passes; see `clocked`."""

    def __init__(self, target: Target, phases: Phases) -> None:
        """Clock the passes of a target."""
        super().__init__(target)
        self._phases = phases

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """See `Target`."""
        if not self._phases.now:
            return self.target.verify(tree, cache)
        start = time.perf_counter()
        out = self.target.verify(tree, cache)
        mx.eval(out.logits, out.hidden)
        self._phases.verify_seconds += time.perf_counter() - start
        return out


@dataclass(frozen=True, eq=False)
class TimedDrafter(Generic[State]):
    """A drafter that clocks what it does; see `clocked`.

    What it leaves undone in `extend` is clocked in the next `draft`.
    """

    drafter: Drafter[State]
    phases: Phases

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> State:
        """See `Drafter`; not clocked."""
        return self.drafter.prefill(prompt, hidden, root)

    def draft(self, root: int, state: State, sampler: Sampler, key: mx.array) -> DraftTree:
        """See `Drafter`."""
        phases = self.phases
        phases.begun += 1
        start = time.perf_counter()
        tree = self.drafter.draft(root, state, sampler, key)
        if phases.now:
            mx.eval(tree.tokens, tree.probs)
            phases.draft_seconds += time.perf_counter() - start
        # A pass ahead would be clocked in another round than the one that it is for.
        if tree.lookahead and (phases.now or phases.clocks(phases.begun + 1)):
            return replace(tree, lookahead=False)
        return tree

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: State) -> State:
        """See `Drafter`."""
        start = time.perf_counter()
        state = self.drafter.extend(hidden, tokens, state)
        if self.phases.now:
            self.phases.draft_seconds += time.perf_counter() - start
        return state


@dataclass(frozen=True, eq=False)
class TimedReadingDrafter(TimedDrafter[State]):
    """As `TimedDrafter`, for one that reads the prompt with the target."""

    drafter: ReadingDrafter[State]

    def read(self, prompt: Prompt, start: int, hidden: mx.array, state: State | None) -> State:
        """See `ReadingDrafter`; not clocked."""
        return self.drafter.read(prompt, start, hidden, state)

    def rewind(self, state: State, rows: int) -> State:
        """See `ReadingDrafter`; not clocked."""
        return self.drafter.rewind(state, rows)


def clocked(
    target: Target, drafter: Drafter[State], phases: Phases
) -> tuple[Target, Drafter[State]]:
    """Return a target and a drafter that do the same, and keep `phases`."""
    if isinstance(drafter, ReadingDrafter):
        return TimedTarget(target, phases), TimedReadingDrafter(drafter, phases)
    return TimedTarget(target, phases), TimedDrafter(drafter, phases)
