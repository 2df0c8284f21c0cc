"""A report as a picture. Needs matplotlib, which comes with the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flash_mlx.bench.answers import MLX_VLM, PLAIN
from flash_mlx.files import replacing

MISSING = "--plot needs matplotlib, which is not installed: pip install 'flash-mlx[plot]'"


def require_matplotlib() -> None:
    """Find out before the run whether its picture can be drawn.

    Raises:
        ValueError: It cannot.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(MISSING)


def plot(report: Mapping[str, Any], file: Path) -> None:
    """Draw speed-ups with their intervals, acceptance by slot, and the cost of a pass by its rows.

    Args:
        report: From `report.build`.
        file: PNG to write.

    Raises:
        OSError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [row for row in report["rows"] if not row["error"] and row["drafter"] != PLAIN]
    figure = Figure(figsize=(12, 1.6 + max(2.4, 0.35 * len(good))), layout="constrained")
    FigureCanvasAgg(figure)
    speeds, slots, costs = figure.subplots(1, 3)
    labels = [f"{row['drafter']}, T {row['temperature']:g}" for row in good]
    middles = [row["speedup"] for row in good]
    errors = [
        [row["speedup"] - row["speedup_low"] for row in good],
        [row["speedup_high"] - row["speedup"] for row in good],
    ]
    places = range(len(good))
    speeds.barh(places, middles, xerr=errors, height=0.5, color="#88a", label="decoding")
    whole = [row["end_to_end_speedup"] for row in good]
    speeds.plot(whole, places, "k|", markersize=12, label="vision and prefill included")
    speeds.axvline(1, color="0.6", linewidth=0.8)
    speeds.set(xlabel="speed-up over plain decoding, 95% interval")
    speeds.set_yticks(list(places), labels, fontsize=8)
    speeds.invert_yaxis()
    if good:
        speeds.legend(fontsize=7, loc="lower right")
    for row, label in zip(good, labels, strict=True):
        if row["drafter"] != MLX_VLM and row["drafted"]:
            shares = row["acceptance_by_position"]
            slots.plot(range(1, len(shares) + 1), shares, ".-", label=label)
    slots.set(xlabel="slot of the draft", ylabel="share accepted", ylim=(0, 1))
    if slots.get_legend_handles_labels()[0]:
        slots.legend(fontsize=7)
    rows = [int(m) for m in report["verify_cost"]]
    costs.plot(rows, list(report["verify_cost"].values()), "k.-")
    costs.set(xlabel="rows of a pass", ylabel="cost of a pass over one row's", ylim=(0, None))
    with replacing(file) as new:
        figure.savefig(new, format="png", dpi=120)
