"""Timing computations against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import mlx.core as mx

WARM_UP = 3  # turns that are not counted


def seconds_in_turns(
    runs: Mapping[int, Callable[[], mx.array | list[mx.array]]], repeats: int
) -> dict[int, float]:
    """Time several computations in turns, so that a change of the machine's load meets all.

    Args:
        runs: By number of rows, what returns the arrays to wait for.
        repeats: Measurements of each.

    Returns:
        Rows to the median time [s].
    """
    times: dict[int, list[float]] = {rows: [] for rows in runs}
    for turn in range(WARM_UP + repeats):
        for rows, run in runs.items():
            start = time.perf_counter()
            mx.eval(run())
            if turn >= WARM_UP:
                times[rows].append(time.perf_counter() - start)
    return {rows: statistics.median(each) for rows, each in times.items()}
