"""The curves of a run as a picture. Needs matplotlib, which comes with the extra `train`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flash_mlx.files import replacing
from flash_mlx.train.state import METRICS
from flash_mlx.train.validate import BEST_BY


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Return what a run reported.

    Raises:
        OSError: If there is nothing to read.
    """
    lines = (output / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def plot(metrics: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw loss and acceptance by step.

    Args:
        metrics: The lines of `metrics.jsonl`.
        file: PNG to write.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [row for row in metrics if row["kind"] == "training"]
    measured = [row for row in metrics if row["kind"] == "validation" and BEST_BY in row]
    steps = [row["iteration"] for row in training]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(steps, [row["train_loss"] for row in training])
    left.set(xlabel="step", ylabel="training loss")
    shares = [row["acceptance_by_position"] for row in training]
    for slot, share in enumerate(zip(*shares, strict=True)):
        right.plot(steps, share, linewidth=0.8, alpha=0.7, label=f"slot {slot}")
    right.set(xlabel="step", ylabel="share of drafts that agree", ylim=(0, 1))
    right.legend(fontsize=6, loc="upper left")
    other = right.twinx()
    lengths = [row[BEST_BY] for row in measured]
    other.plot([row["iteration"] for row in measured], lengths, "k.-")
    other.set_ylabel("measured mean acceptance length (black)")
    with replacing(file) as new:
        figure.savefig(new, format="png", dpi=120)
