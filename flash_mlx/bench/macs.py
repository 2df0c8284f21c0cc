"""What is published about Macs: memory bandwidths, and what passes over several rows cost there.

Nothing here was measured by this project. A curve is the time of 4-bit weights read by m rows over
the time by one row, in mlx; what a recorded text or an assumed acceptance would gain from it is a
projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flash_mlx.bench.pacing import overall, replay
from flash_mlx.cost import Costs

# Unified memory, as Apple specifies it [GB/s]; of two sizes of a chip, the larger.
BANDWIDTH: Mapping[str, float] = {
    "M1": 68.25, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max": 546,
    "M5": 153, "M5 Pro": 307, "M5 Max": 614,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """The cost of 4-bit weights by rows.

    Attributes:
        name: Of the chip that was measured, or of what its curve stands for.
        generations: Chips that it is used for.
        times: (rows, time), ascending; times in any unit.
        source: Where it is published, and what was measured.
    """

    name: str
    generations: tuple[str, ...]
    times: tuple[tuple[int, float], ...]
    source: str

    @property
    def costs(self) -> Costs:
        """The curve, in passes over one row."""
        return Costs(self.times[0][1], self.times)


CURVES = (
    Curve(
        "row by row (M1, M2)",
        ("M1", "M2"),
        ((1, 0.041), (2, 0.076), (4, 0.134), (7, 0.218), (8, 0.252), (16, 0.260)),
        "mlx issue 4265: a 5120 x 17408 product on an M3 Ultra, mlx 0.31.2; the kernel that reads "
        "weights anew for each row, which mlx uses on M1 and M2. No table of an M1 is published; "
        "weights that stay in the cache, as there, make further rows look dearer",
    ),
    Curve(
        "M3 Max",
        ("M3",),
        (
            (1, 0.129),
            (2, 0.129),
            (4, 0.165),
            (6, 0.263),
            (8, 0.323),
            (9, 0.405),
            (10, 0.508),
            (16, 0.509),
            (32, 0.513),
        ),
        "mlx pull request 3863: a 5120 x 17408 product, mlx 0.32.0, cold weights",
    ),
    Curve(
        "M4 Pro",
        ("M4",),
        ((1, 1.0), (2, 0.99), (3, 1.13), (4, 1.43), (5, 1.75), (8, 2.84), (10, 4.5), (32, 4.5)),
        "mlx issue 3852: a 5120 x 17408 product, mlx 0.32.0",
    ),
    Curve(
        "M5 Max",
        ("M5",),
        ((1, 75.9), (3, 84.8), (5, 112.7), (8, 170.8), (12, 241.5), (16, 296.0)),
        "mlx pull request 3791: a whole 70B model, 400 rows in its cache",
    ),
)


def curve_of(chip: str) -> Curve:
    """Return the curve that stands for a chip.

    Raises:
        ValueError: The chip is not known.
    """
    for curve in CURVES:
        if chip in BANDWIDTH and chip.split()[0] in curve.generations:
            return curve
    raise ValueError(f"A chip must be one of {', '.join(BANDWIDTH)}; got {chip}.")


def replayed(
    outcomes: Iterable[Sequence[int]], costs: Costs, draft: float, width: int | None = None
) -> float:
    """Return how many times faster than plain decoding recorded rounds would be at these costs.

    Args:
        outcomes: [drafted, accepted, rounds] of each kind of round.
        costs: Of passes by rows.
        draft: Time of drafting for a round [plain tokens].
        width: Most drafts of a round; a round cut to them keeps the first ones that were accepted,
            and what it loses is drafted again as likely as any. None: as they were.
    """
    tokens = spent = 0.0
    for drafted, accepted, number in outcomes:
        offered = drafted if width is None else min(drafted, width)
        tokens += number * (1 + min(accepted, offered))
        spent += number * (costs.round(1 + offered) + (draft if offered else 0.0))
    return tokens / spent if spent else 1.0


def projections(row: Mapping[str, Any], draft: float) -> list[dict[str, Any]]:
    """Return what a row's recorded rounds would gain at each published curve.

    Args:
        row: Of a report, with `outcomes`; `recorded` texts, if it has them, are paced anew.
        draft: Time of drafting for a round [plain tokens].
    """
    deepest = max((drafted for drafted, _, _ in row["outcomes"]), default=0)
    found = []
    for curve in CURVES:
        by_width = {k: replayed(row["outcomes"], curve.costs, draft, k) for k in range(deepest + 1)}
        best = max(by_width, key=lambda k: by_width[k])
        projected = {
            "curve": curve.name,
            "projected_speedup": by_width[best],
            "drafts": best,
            "projected_as_recorded": replayed(row["outcomes"], curve.costs, draft),
            "draft_cost": draft,
            "rows": deepest + 1,
            "measured_rows": curve.times[-1][0],
            "source": curve.source,
        }
        found.append(projected | _paced(row, curve.costs, draft))
    return found


def _paced(row: Mapping[str, Any], costs: Costs, draft: float) -> dict[str, float]:
    """Return what pacing would make of a row's recorded texts at these costs: of all, and worst."""
    texts = [text for text in row.get("recorded", ()) if text]
    if not texts:
        return {}
    # A drafter does not know how many of its block will be right at most.
    block = row["block_size"] or max(1, max(max(text, default=0) for text in texts))
    costs = replace(costs, drafts=((1, draft * costs.plain), (block + 1, draft * costs.plain)))
    paced = replay(texts, costs, block, row["belief"])
    worst = min(text.speedup for text in paced)
    return {"projected_paced": overall(paced), "projected_worst": worst}
