"""`flash-mlx selftest`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from flash_mlx.selftest import SelfTest, Trial


@click.command("selftest")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> int:
    """Hold every Metal kernel to its definition on this machine; a report to paste."""
    from flash_mlx.selftest import run

    result = run()
    if as_json:
        facts = dataclasses.asdict(result) | {"passed": result.passed}
        click.echo(json.dumps(facts))
    else:
        click.echo(_text(result))
    return 0 if result.passed else 1


def _text(result: SelfTest) -> str:
    lines = [f"Device     {result.device}"]
    if not result.metal:
        lines.append("Metal      no: kernels cannot run here; their definitions were run instead")
    for trial in result.trials:
        lines.append(f"{trial.kernel:<29} {trial.dtype:<9} {trial.size:<44} {_outcome(trial)}")
    curve = "   ".join(f"{rows}: {cost:.2f}" for rows, cost in result.verify_cost.items())
    lines += [
        f"Row cost   {curve}",
        "           rows: time of the demo's pass over them over one row's",
    ]
    if result.metal:
        lines.append(f"Result     {'passed' if result.passed else 'FAILED'}")
    return "\n".join(lines)


def _outcome(trial: Trial) -> str:
    found = trial.decision
    if found is None:
        return "definition runs"
    if found.error is None or found.kernel_seconds is None or found.ops_seconds is None:
        return f"FAILED: {found.reason}"
    times = f"{found.kernel_seconds * 1e3:.3f} ms, MLX {found.ops_seconds * 1e3:.3f} ms"
    return f"{'used' if found.use else 'not used'}: {times}, error {found.error:.1e}"
