"""The study's plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Row = Mapping[str, Any]
GREEDY = ("caption t=0", "question t=0")


def best_way(row: Row) -> Row:
    best: Row = next(way for way in row["ways"] if way["way"] == row["best_way"])
    return best


def plot_ratios(groups: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Ratios to the base with their intervals; filled where there are several seeds."""
    shown = [
        (f"{group}: {each['variant']}", each)
        for group, found in groups.items()
        for each in found
        if "against_base" in each
    ][::-1]
    figure = Figure(figsize=(9, 0.24 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, (_, each) in enumerate(shown):
        ratio = each["against_base"]
        axes.plot([ratio["low"], ratio["high"]], [place, place], color="0.6")
        axes.plot(ratio["ratio"], place, "o", color="C0", mfc="C0" if each["seeds"] > 1 else "w")
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7)
    axes.set_xlabel("Mean acceptance length over the base's, T=0 (hollow: one seed)")
    figure.savefig(file, dpi=110)


def plot_peers(peers: Sequence[Row], file: Path) -> None:
    """Acceptance beside the bound on the speed-up, each drafter at its best way to draft."""
    names = [f"{each['drafter']} ({each['budget']})" for each in peers][::-1]
    figure = Figure(figsize=(9, 0.35 * len(peers) + 1.4), layout="constrained")
    for axes, kind, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("lengths", "bounds"),
        ("Mean acceptance length, T=0", "Bound on the speed-up, T=0"),
        strict=True,
    ):
        for shift, column in ((0.15, GREEDY[0]), (-0.15, GREEDY[1])):
            values = [best_way(each)[kind][column] for each in peers][::-1]
            places = np.arange(len(names)) + shift
            axes.barh(places, [v["mean"] for v in values], 0.3, label=column.split()[0] + "s")
            for place, value in zip(places, values, strict=True):
                axes.plot([value["low"], value["high"]], [place, place], color="k", linewidth=1)
        axes.set_xlabel(label)
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.legend()
    figure.savefig(file, dpi=110)
