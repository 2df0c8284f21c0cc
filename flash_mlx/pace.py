"""How far ahead to draft, and whether drafting pays: arithmetic on the host, no arrays.

`Pace` chooses the depth K of a draft so that tokens per time are most, and parks drafting where
that is less than one token in the time of one.

Decisions follow measured costs, which are stored (`flash_mlx.draft.calibrate`), and what became of
earlier drafts of the same text; never a clock, and never how likely a drawn token was. So a text
depends on its seed, its settings and the stored costs alone, and its law is the target's.

Source: renewal-reward argument for tokens per second; acceptance per slot as in Leviathan et al.
2023, section 3.2, with a rate of its own for each slot.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from flash_mlx.cost import Costs

PRIOR = 0.7  # of a draft's acceptance, before any was seen
PRIOR_TRIALS = 1.0  # what that belief weighs
MEASURED_TRIALS = 5.0  # what it weighs if the drafter's training measured it
MEMORY = 0.95  # of a round's evidence, what is left a round later
PRIOR_GAIN = 1.3  # tokens per plain token of drafting, before any was done
FIRST_DEPTH = 4  # of a text's first draft
NO_LIMIT = 2**31
AGAIN = 0.5  # of a draft of the drafter's second pass, which reads what the first only guessed
SPARE = 0.4  # of a slot's next choice, if those before it were refused
RISK = 0.85  # plain tokens that a text may lose to drafting at once
RISK_SHARE = 0.02  # of a text's tokens, that it may lose; no more than at once, until it is so long
RISK_PER_TOKEN = 0.005  # plain tokens that each of its tokens adds from then on
TRUST = 1.4  # `RISK` of a drafter whose training measured it, where earlier texts may not be asked
TRIAL = 6.0  # `RISK` of the first text of such a drafter, if later ones know what it lost
CREDIT = 6.0  # plain tokens that a text may lose beyond that, if texts before it gained as many
LATE = 3.0  # drafts of one token, that it costs to read a prompt when the text has begun
LOOK = 0.03  # of a round's time, what a look at its drafts saves by a better choice of rows
FIRST_GAP, LONGEST_GAP = 8, 128  # rounds parked before drafting is tried again


class Rate(NamedTuple):
    """How often drafts of one kind were accepted, and how often that was expected.

    Sums over past drafts whose parents were accepted, each weighed by `MEMORY` a round.

    Attributes:
        trials: Their number.
        hits: Those accepted.
        expected: Sum of the probabilities that were forecast.
        prior: Believed share accepted, before any was seen.
        weight: Trials that this belief counts for.
    """

    trials: float = 0.0
    hits: float = 0.0
    expected: float = 0.0
    prior: float = PRIOR
    weight: float = PRIOR_TRIALS

    @property
    def accepted(self) -> float:
        """Share accepted, between the prior and what was seen."""
        return (self.hits + self.prior * self.weight) / (self.trials + self.weight)

    def correct(self, forecast: float) -> float:
        """Return a forecast shifted by how far off earlier ones were, in log-odds."""
        expected = (self.expected + self.prior * self.weight) / (self.trials + self.weight)
        shifted = _logit(forecast) + _logit(self.accepted) - _logit(expected)
        return 1 / (1 + math.exp(-shifted))

    def after(self, outcomes: Sequence[tuple[float, bool]], rounds: int = 1) -> Rate:
        """Return the rate some rounds later, with (forecast, accepted) of each draft they tried."""
        left = MEMORY**rounds
        trials, hits, expected = left * self.trials, left * self.hits, left * self.expected
        for forecast, hit in outcomes:
            trials, hits, expected = trials + 1, hits + hit, expected + forecast
        return Rate(trials, hits, expected, self.prior, self.weight)


def _logit(share: float) -> float:
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(share / (1 - share))


NO_RATE = Rate()


@dataclass(frozen=True)
class Pace:
    """What became of a text's drafts so far, and what to do next; a value, never changed.

    Attributes:
        costs: Of rounds and drafts here.
        rates: Kind of draft -> its acceptance. ("draft", i) is the first choice for slot i, and
            ("spare", r) a slot's choice r, 1 or more, if those before it were refused.
        tokens: Emitted since the prompt was read.
        spent: What that cost [plain tokens].
        gained: Tokens of rounds that drafted, weighed by `MEMORY` for each round since.
        paid: What those rounds cost, weighed likewise.
        depth: Deepest draft that the next round may try: few ahead, unless drafting pays well.
        wait: Rounds still to park.
        gap: Rounds that the next parking takes.
        belief: Chance that a draft is accepted if those before it are, from the drafter's training.
        block: Slots of one pass of the drafter; the belief is about these.
        risk: Plain tokens that the text may lose at once.
        late: What the next draft costs besides, for reading the prompt [plain tokens].
        greedy: Whether the text is. Only then later texts may know of it.
    """

    costs: Costs
    rates: Mapping[Hashable, Rate] = field(default_factory=dict)
    tokens: int = 0
    spent: float = 0.0
    gained: float = 2 * PRIOR_GAIN
    paid: float = 2.0
    depth: int = FIRST_DEPTH
    wait: int = 0
    gap: int = FIRST_GAP
    belief: float = PRIOR
    block: int = NO_LIMIT
    risk: float = RISK
    late: float = 0.0
    greedy: bool = True
    _hopes: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def begin(
        cls,
        costs: Costs,
        belief: float = PRIOR,
        block: int = NO_LIMIT,
        *,
        greedy: bool = True,
        remembered: bool = False,
    ) -> Pace:
        """Return the pace of a new text; a drafter known to be good drafts far ahead at once.

        Where passes are dear, one that drafts costs more than a short text may lose, so a good
        drafter would never be tried: of texts that are remembered, the first may lose more, once.

        Args:
            costs: Of rounds and drafts.
            belief: See `Pace`.
            block: See `Pace`.
            greedy: Whether the text is.
            remembered: Whether later texts begin with what this one lost (`carried`).
        """
        begun = cls(costs, belief=belief, block=block, greedy=greedy)
        if belief <= PRIOR:
            return begun
        risk = TRIAL if remembered else RISK if greedy else TRUST
        return replace(begun, depth=NO_LIMIT, risk=risk)

    def carried(self, costs: Costs, *, late: bool = False) -> Pace:
        """Return the pace of a text that follows this one; what was lost may not be lost again.

        What might have been lost and was not is put aside until the smallest draft can be paid.

        Args:
            costs: Of rounds and drafts.
            late: Whether the drafter reads the prompt when it is asked, if ever.
        """
        loss, due = self.spent - self.tokens, LATE * costs.draft(1) if late else 0.0
        least = costs.round(2) + costs.draft(1) + due + costs.wait - 1
        left = max(loss - RISK_PER_TOKEN * self.tokens, min(loss, 0.0, RISK - least), -CREDIT)
        return replace(self, costs=costs, tokens=0, spent=left, risk=RISK, late=due).settled()

    @property
    def gain(self) -> float:
        """Tokens that drafting brings in the time of one plain token."""
        return self.gained / self.paid

    @property
    def rests(self) -> bool:
        """Whether drafting does not pay at present, so the drafter need not read yet."""
        return self.wait > 0 or self.gain < 1

    def rate(self, kind: Hashable) -> Rate:
        """Return what is known of a kind of draft."""
        found = self.rates.get(kind)
        if found is not None or not isinstance(kind, tuple):
            return found or NO_RATE
        if kind[0] == "draft" and kind[1] >= self.block:
            return Rate(prior=AGAIN)
        if kind[0] == "draft" and self.belief > PRIOR:
            return Rate(prior=self.belief, weight=MEASURED_TRIALS)
        return Rate(prior=SPARE) if kind[0] == "spare" else NO_RATE

    def hopes(self, depth: int) -> Sequence[float]:
        """Return the chance of each slot of a chain that all is accepted up to and with it."""
        known = self._hopes
        hope = known[-1] if known else 1.0
        for slot in range(len(known), depth):
            hope *= self.rate(("draft", slot)).accepted
            known.append(hope)
        return known[:depth]

    def reach(self, limit: int) -> int:
        """Return how far ahead to draft: the depth of the chain with most tokens per time.

        Args:
            limit: As far as the drafter can.
        """
        tokens, most, worth = 1.0, self._purse - self.late, max(1.0, self.gain)
        plans, cost_of = [(1.0, self.costs.round(1), 0)], self.costs.ahead
        for depth, hope in enumerate(self.hopes(min(limit, self.depth)), start=1):
            tokens, cost = tokens + hope, cost_of(depth)
            if cost <= most:
                plans.append((tokens, cost, depth))
        best = max(plans, key=lambda plan: plan[0] - worth * plan[1])
        if best[0] <= best[1]:  # what was gained so far may have been luck
            best = max(plans, key=lambda plan: plan[0] / plan[1])
        return best[2] if best[0] > best[1] else 0

    def value(self, drafts: float, rows: int, depth: int) -> float:
        """Return what a round brings beyond the time it takes [plain tokens].

        Time is worth what drafting brings in it, so a maximum of this is one of tokens per time.

        Args:
            drafts: Expected to be accepted.
            rows: Of the tree.
            depth: Drafted ahead for it.
        """
        return 1 + drafts - max(1.0, self.gain) * (self.costs.round(rows) + self.costs.draft(depth))

    def affords(self, rows: int, depth: int) -> bool:
        """Whether such a round, if nothing of it is accepted, keeps the text's loss in bounds."""
        cost = self.costs.round(rows) + self.costs.draft(depth)
        return cost + (self.late if depth else 0.0) <= self._purse

    @cached_property
    def _purse(self) -> float:
        """What the next round may cost; a text that is parked then waits for the host once."""
        further = self.tokens + 1 - self.risk / RISK_SHARE
        bound = self.risk + RISK_PER_TOKEN * max(0.0, further)
        return bound + 1 + self.tokens - self.spent - self.costs.wait

    def looks(self, depth: int) -> bool:
        """Whether a look at drafts so far ahead, before they are verified, is worth the wait."""
        return self.costs.wait <= LOOK * (self.costs.round(1 + depth) + self.costs.draft(depth))

    def settled(self) -> Pace:
        """Return the pace parked until the smallest draft is affordable; itself, if it is."""
        if self.wait or self.affords(2, 1):
            return self
        missing = self.costs.round(2) + self.costs.draft(1) + self.late - self._purse
        further = max(0.0, self.risk / RISK_SHARE - self.tokens - 1) + missing / RISK_PER_TOKEN
        return replace(self, wait=max(1, math.ceil(further)))

    def rested(self) -> Pace:
        """Return the pace parked, as nothing that could be drafted pays; longer each time."""
        return replace(self, wait=self.gap, gap=min(2 * self.gap, LONGEST_GAP))

    def parked(self, num_rounds: int) -> Pace:
        """Return the pace after so many rounds of plain decoding, read ahead: each costs 1.

        When the pause ends, what was seen before it has faded, or nothing would be tried again.
        """
        rates = self.rates
        if num_rounds == self.wait:
            rates = {kind: rate.after((), self.gap // 2) for kind, rate in rates.items()}
        return replace(
            self,
            rates=rates,
            tokens=self.tokens + num_rounds,
            spent=self.spent + num_rounds,
            wait=max(0, self.wait - num_rounds),
        ).settled()

    def after(
        self,
        num_tokens: int,
        rows: int,
        depth: int,
        outcomes: Mapping[Hashable, Sequence[tuple[float, bool]]],
    ) -> Pace:
        """Return the pace after a round that was not parked.

        Args:
            num_tokens: That it brought.
            rows: Of its tree.
            depth: Drafted ahead for it.
            outcomes: Kind -> (forecast, accepted) of each draft whose parent was accepted.
        """
        cost = self.costs.round(rows) + self.costs.draft(depth)
        late = 0.0 if depth else self.late
        paid_off, seen = num_tokens > cost, self.rates.keys() | outcomes.keys()
        gained, paid = MEMORY * self.gained + num_tokens, MEMORY * self.paid + cost
        rests, good = gained < paid, gained >= PRIOR_GAIN * paid
        if paid_off and self.gain < 1:  # a try after a pause
            gained, paid, rests = 2 * PRIOR_GAIN, 2.0, False
        after = replace(
            self,
            rates={kind: self.rate(kind).after(outcomes.get(kind, ())) for kind in seen},
            tokens=self.tokens + num_tokens,
            spent=self.spent + cost + self.late - late,
            gained=gained,
            paid=paid,
            depth=NO_LIMIT if good else 2 * num_tokens,
            gap=FIRST_GAP if paid_off else self.gap,
            late=late,
        )
        after = after.rested() if rests else after.settled()
        return replace(after, spent=after.spent + self.costs.wait) if after.wait else after
