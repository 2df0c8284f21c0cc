"""Counts and times of a generation, taken from outside of the loop.

`GenerationStats.watch` passes rounds through and keeps the books. `TimedTarget` and
`TimedDrafter` split a round's time into phases; they wait for the device after each phase, which
costs the overlap of host and device, so a run with them explains a time but does not measure it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic

import mlx.core as mx

from flash_mlx.around import TargetAround
from flash_mlx.decode import Cache, Drafter, Output, Round, State, Target
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree


@dataclass
class GenerationStats:
    """What a generation brought and what it took.

    The prefill gives one token of its own; it counts as generated, but not as a round.

    Attributes:
        generation_tokens: Tokens emitted, the prefill's own included.
        accept_lengths: Histogram: tokens of a round -> number of such rounds.
        outcomes: Histogram: (drafted, accepted) of a round -> number of such rounds.
        prefill_seconds: Time to the first token [s].
        decode_seconds: Time from the first token to the last [s].
    """

    generation_tokens: int = 0
    accept_lengths: Counter[int] = field(default_factory=Counter)
    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def watch(self, rounds: Iterable[Round]) -> Iterator[Round]:
        """Yield the rounds of one `decode`, counting and timing them.

        The clock starts at the first request and also runs while the caller deals with a round,
        for the device may be at work then.
        """
        start = time.perf_counter()
        first: float | None = None
        for each in rounds:
            now = time.perf_counter()
            self.generation_tokens += len(each.tokens)
            if first is None:
                first = now
                self.prefill_seconds = first - start
            else:
                self.decode_seconds = now - first
                self.accept_lengths[len(each.tokens)] += 1
                self.outcomes[each.num_drafted, each.num_accepted] += 1
            yield each

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
    """A target that clocks its passes.

    Attributes:
        verify_seconds: Time in `verify` so far, until the device is done [s].
    """

    def __init__(self, target: Target) -> None:
        """Start the clock at 0."""
        super().__init__(target)
        self.verify_seconds = 0.0

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """See `Target`."""
        start = time.perf_counter()
        out = self.target.verify(tree, cache)
        mx.eval(out.logits, out.hidden)
        self.verify_seconds += time.perf_counter() - start
        return out


@dataclass(eq=False)
class TimedDrafter(Generic[State]):
    """A drafter that clocks its drafts.

    Attributes:
        drafter: Does the work.
        draft_seconds: Time in `draft` so far, until the device is done [s]. It holds what the
            drafter left undone in `prefill` and `extend`.
    """

    drafter: Drafter[State]
    draft_seconds: float = 0.0

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> State:
        """See `Drafter`."""
        return self.drafter.prefill(prompt, hidden, root)

    def draft(self, root: int, state: State, sampler: Sampler, key: mx.array) -> DraftTree:
        """See `Drafter`."""
        start = time.perf_counter()
        tree = self.drafter.draft(root, state, sampler, key)
        mx.eval(tree.tokens, tree.probs)
        self.draft_seconds += time.perf_counter() - start
        return tree

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: State) -> State:
        """See `Drafter`."""
        return self.drafter.extend(hidden, tokens, state)
