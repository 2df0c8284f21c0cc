"""What rounds and drafts cost: arithmetic on the host, no arrays.

Everything is counted in *plain tokens*: the time that plain decoding takes for one. A round that
drafts to depth K and verifies m rows costs `draft(K) + round(m)` and brings one token and those
accepted; `pace` chooses K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import add

Curve = tuple[tuple[int, float], ...]

TABLE = 65  # rows, and tokens ahead, whose costs are computed once


@dataclass(frozen=True)
class Costs:
    """What plain decoding, rounds and drafts take here.

    Attributes:
        plain: Time of a token of plain decoding, with its passes queued ahead [s].
        rounds: Rows of a tree -> time of a round without the drafting of it [s]; ascending.
        drafts: Depth -> time to draft that many tokens ahead [s]; empty if it costs nothing.

    Raises:
        ValueError: If a time is not above 0, or rows or depths do not ascend from 1 on.
    """

    plain: float
    rounds: Curve
    drafts: Curve = ()

    def __post_init__(self) -> None:
        """Check the curves, and let none fall: noise only adds, so fewer rows never cost more."""
        if not self.rounds:
            raise ValueError("Costs must hold the time of at least one round; there is none.")
        for name in ("rounds", "drafts"):
            curve = getattr(self, name)
            counts, times = [count for count, _ in curve], [time for _, time in curve]
            if counts != sorted(set(counts)) or any(count < 1 for count in counts):
                raise ValueError(f"The counts of {name} must ascend from 1 on; got {counts}.")
            least = list(accumulate(reversed(times), min))[::-1]
            object.__setattr__(self, name, tuple(zip(counts, least, strict=True)))
        for time in (self.plain, *(t for _, t in self.rounds + self.drafts)):
            if not 0 < time < math.inf:
                raise ValueError(f"A measured time must be above 0; got {time}.")

    def round(self, rows: int) -> float:
        """Return the cost of a round over a tree of `rows` rows [plain tokens]."""
        known = self._tables[0]
        return known[rows] if rows < TABLE else _between(self.rounds, rows) / self.plain

    def draft(self, depth: int) -> float:
        """Return the cost of drafting `depth` tokens ahead [plain tokens]."""
        if not self.drafts:
            return 0.0
        known = self._tables[1]
        return known[depth] if depth < TABLE else _between(self.drafts, depth) / self.plain

    def ahead(self, depth: int) -> float:
        """Return the cost of drafting a chain so far ahead and of the round [plain tokens]."""
        known = self._tables[2]
        return known[depth] if depth < len(known) else self.round(1 + depth) + self.draft(depth)

    def least(self, other: Costs) -> Costs:
        """Return the lesser of two measured times, wherever there are two: noise only ever adds."""

        def merged(curve: Curve, again: Curve) -> Curve:
            times = dict(curve)
            for count, time in again:
                times[count] = min(time, times.get(count, time))
            return tuple(sorted(times.items()))

        rounds, drafts = merged(self.rounds, other.rounds), merged(self.drafts, other.drafts)
        return Costs(min(self.plain, other.plain), rounds, drafts)

    @property
    def wait(self) -> float:
        """What it costs to let the device idle until the host has looked at something."""
        return max(0.0, self.round(1) - 1)

    @cached_property
    def _tables(self) -> tuple[tuple[float, ...], ...]:
        """Costs of the first few rounds, drafts and both: asked for hundreds of times a text."""
        rounds = tuple(_between(self.rounds, rows) / self.plain for rows in range(TABLE))
        drafts = (0.0,) * TABLE
        if self.drafts:
            later = (_between(self.drafts, depth) / self.plain for depth in range(1, TABLE))
            drafts = (0.0, *later)
        return rounds, drafts, tuple(map(add, rounds[1:], drafts))


def _between(curve: Curve, count: int) -> float:
    """Interpolate; beyond its ends a curve goes on as it began or ended."""
    if len(curve) == 1:
        return curve[0][1]
    place = next((i for i, (c, _) in enumerate(curve) if c >= count), len(curve) - 1)
    (low, before), (high, after) = curve[max(0, place - 1)], curve[max(1, place)]
    return before + (after - before) * (count - low) / (high - low)
