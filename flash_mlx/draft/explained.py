"""How much was drafted of a text, and why, in words."""

from __future__ import annotations

from collections.abc import Mapping

from flash_mlx.cost import Costs


def explain(costs: Costs, outcomes: Mapping[tuple[int, int], int], parked: int) -> str:
    """Return in a line how much was drafted, and why.

    Args:
        costs: That decided it.
        outcomes: (drafted, accepted) of a round -> number of such rounds.
        parked: Rounds without drafts because these would not have paid; the others had none.
    """
    rounds, plain = sum(outcomes.values()), sum(n for (d, _), n in outcomes.items() if not d)
    rows = [m for m, _ in costs.rounds if m > 1][-4:]
    known = f"a pass over {', '.join(map(str, rows))} rows takes "
    known += ", ".join(f"{costs.round(m):.2f}" for m in rows)
    if costs.drafts:
        first, last = costs.drafts[0][0], costs.drafts[-1][0]
        known += f", drafting {first} to {last} tokens {costs.draft(first):.2f}"
        known += f" to {costs.draft(last):.2f}"
    known += " times a plain token here"
    if plain == rounds:
        why = "it does not pay" if parked else "nothing was there to draft"
        return f"Drafting: none in {rounds} passes, as {why}: {known}"
    drafted = {key: n for key, n in outcomes.items() if key[0]}
    deepest = costs.drafts[-1][0] if costs.drafts else 0
    spent = sum(
        n * (costs.round(1 + d) + costs.draft(min(d, deepest))) for (d, _), n in drafted.items()
    )
    gain = sum(n * (1 + a) for (_, a), n in drafted.items()) / spent
    mean = sum(n * d for (d, _), n in drafted.items()) / (rounds - plain)
    return (
        f"Drafting: {mean:.1f} drafts in a pass, none in {plain} of {rounds} passes; where there "
        f"were, {gain:.2f} tokens in the time of one: {known}"
    )
