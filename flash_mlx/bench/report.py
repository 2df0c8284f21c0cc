"""The report of a benchmark: everything that its figures depend on, and no path of the machine.

A bound stands beside each speed-up: what tokens per pass allow at the measured costs, if a round
took nothing but the drafter's time and the target's pass.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import flash_mlx
from flash_mlx.bench.answers import PLAIN
from flash_mlx.bench.macs import projections
from flash_mlx.cost import Costs
from flash_mlx.doctor import Report as Machine


def build(
    rows: Sequence[dict[str, Any]],
    settings: Mapping[str, Any],
    machine: Machine,
    curve: Mapping[int, float],
    skipped: Mapping[str, str],
    *,
    replay_costs: bool = False,
) -> dict[str, Any]:
    """Return what `bench --json` writes.

    Args:
        rows: From `run`, of all temperatures.
        settings: As the user gave them, with the words of the command line as `argv`.
        machine: From `doctor.examine`.
        curve: Rows of a pass to its time, from `measure.verify_cost` [s].
        skipped: Name of each question that was not asked -> why.
        replay_costs: Whether rows also have what their rounds would bring at published costs.
    """
    seen = asdict(machine)
    if machine.blas.path is not None:
        seen["blas"]["path"] = machine.blas.path.name
    rows = [dict(row) for row in rows]
    asked = next((row["asked"] for row in rows if "asked" in row), None)
    for row in rows:
        row.pop("asked", None)
        row["threads"] = machine.blas.threads
    for row in rows:
        if row["error"] is None and row["rounds"]:
            plain = _seconds_per_token(rows, row["temperature"])
            row |= bound(row, curve, plain)
            # Of texts of a round each, no time of drafting is known.
            if replay_costs and row["drafted"] and row["draft_seconds"] is not None:
                row["projected"] = projections(row, row["draft_seconds"] / plain)
    return {
        "machine": seen,
        "revision": revision(),
        "settings": dict(settings),
        "asked": asked,
        "skipped": dict(skipped),
        "verify_seconds": {str(m): s for m, s in curve.items()},
        "verify_cost": {str(m): s / curve[1] for m, s in curve.items()},
        "target_entropy": rows[0].get("target_entropy"),
        "rows": rows,
    }


def bound(row: Mapping[str, Any], curve: Mapping[int, float], plain: float) -> dict[str, float]:
    """Return the most speed-up that a row's tokens per pass allow, and its share of that.

    Args:
        row: Of a contender, with `outcomes`.
        curve: Rows of a pass to its time [s].
        plain: Time of a token of plain decoding [s]. A pass that is waited for takes longer than
            one that plain decoding queues ahead, so costs are counted in this.

    Returns:
        `bound`: tokens per pass / (cost of a pass + cost of drafting), costs in plain tokens, the
        pass's a mean over the rounds by their rows. `of_bound`: the speed-up's share of it.
        `unmeasured_rounds`: those of more rows than the curve has, which goes on as it ended.
    """
    curve = {**curve, 1: min(plain, curve[1])}
    costs = Costs(plain, tuple(sorted(curve.items())))
    passes = sum(costs.round(1 + drafted) * number for drafted, _, number in row["outcomes"])
    draft = (row["draft_seconds"] or 0.0) / plain if row["drafted"] else 0.0
    most = row["mean_acceptance_length"] / (passes / row["rounds"] + draft)
    beyond = sum(number for drafted, _, number in row["outcomes"] if drafted + 1 > max(curve))
    return {"bound": most, "of_bound": row["speedup"] / most, "unmeasured_rounds": beyond}


def revision() -> str | None:
    """Return the commit that flash-mlx runs from, with `+` if files differ; None if not known."""
    installed = metadata.distribution("flash-mlx").read_text("direct_url.json")
    commit = json.loads(installed or "{}").get("vcs_info", {}).get("commit_id")
    if commit is not None:
        return str(commit)
    package = Path(flash_mlx.__file__).parent
    # The package may lie in an environment inside of somebody else's repository.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = (
        _git(package, "rev-parse", "HEAD"),
        _git(package, "status", "--porcelain", "."),
    )
    return None if commit is None else commit.strip() + ("+" if changes else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603  the words are ours
            ["git", "-C", str(folder), *words],  # noqa: S607  the user's own git
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _seconds_per_token(rows: Sequence[Mapping[str, Any]], temperature: float) -> float:
    """Return the time of a plain token at a temperature [s]."""
    plain = next(r for r in rows if r["drafter"] == PLAIN and r["temperature"] == temperature)
    return 1 / float(plain["generation_tps"])
