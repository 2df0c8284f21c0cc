"""The numbers of the study's tables, from the results of runs.

A row's `results` are those of `HeldOut.measure`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from study_plots import GREEDY

Row = Mapping[str, Any]
RESAMPLES = 4000
COLUMNS = (*GREEDY, "caption t=1", "question t=1")
SEEDS = (1, 2, 3)


def length(row: Row, columns: Sequence[str]) -> float:
    """Mean acceptance length over these results of a run."""
    results = [row["results"][name] for name in columns]
    return sum(sum(r["tokens"]) for r in results) / sum(sum(r["rounds"]) for r in results)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and most over seeds."""
    return {
        "mean": round(statistics.mean(values), 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
    }


def least_ms(results: Sequence[Row], column: str = GREEDY[0]) -> float:
    """Milliseconds of a round's drafts: the least of all runs, as a network costs what it costs.

    Args:
        results: Of runs of the same network, from `HeldOut.measure`.
        column: Says the temperature.
    """
    alike = [c for c in COLUMNS if c.split()[1] == column.split()[1]]
    return min(found[c]["draft_ms"] for found in results for c in alike if c in found)


def bound(
    row: Row, rows: int, draft_ms: float, costs: Mapping[int, float], column: str = GREEDY[0]
) -> float:
    """Return tau / (C + draft), by the cost of a verification of so many rows."""
    pass_ms = float(np.interp(rows, list(costs), list(costs.values())))
    return length(row, [column]) * costs[1] / (pass_ms + draft_ms)


def against(runs: Sequence[Row], base: Sequence[Row]) -> dict[str, float]:
    """Ratio of lengths at temperature 0, with the interval of a bootstrap.

    Args:
        runs: One a seed.
        base: The base's, with the same seeds and prompts.
    """
    both = np.array([[_counts(row) for row in pair] for pair in zip(runs, base, strict=True)])
    rng = np.random.default_rng(0)
    num_seeds, num_prompts = both.shape[0], both.shape[-1]
    ratios = []
    for _ in range(RESAMPLES):
        seeds, prompts = (
            rng.integers(0, num_seeds, num_seeds),
            rng.integers(0, num_prompts, num_prompts),
        )
        ratios.append(_ratio(both[seeds][..., prompts]))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "ratio": round(_ratio(both), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def _counts(row: Row) -> list[list[int]]:
    """[2, prompts]: tokens and rounds of each prompt at temperature 0."""
    results = [row["results"][name] for name in GREEDY]
    return [[n for r in results for n in r[name]] for name in ("tokens", "rounds")]


def _ratio(both: npt.NDArray[np.int64]) -> float:
    """Ratio of lengths, over the seeds' geometric mean; [seeds, 2, 2, prompts]."""
    sums = both.sum(-1)
    lengths = sums[:, :, 0] / sums[:, :, 1]
    return float(np.exp(np.log(lengths[:, 0] / lengths[:, 1]).mean()))


def shown(value: Mapping[str, float], seeds: int, digits: int = 2) -> str:
    """Mean and range over seeds; with one seed, the number."""
    if seeds == 1:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"
