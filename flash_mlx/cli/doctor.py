"""`flash-mlx doctor`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from flash_mlx.doctor import Report


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Say what this machine is, which backend and BLAS are active, what a row costs."""
    from flash_mlx.doctor import examine

    report = examine()
    click.echo(json.dumps(dataclasses.asdict(report), default=str) if as_json else _text(report))


def _text(report: Report) -> str:
    versions = ", ".join(f"{name} {found or 'absent'}" for name, found in report.versions.items())
    blas = report.blas
    lines = [
        f"System     {report.system}, {report.cores} cores, {report.memory_gb:.1f} GB",
        f"Python     {report.python}",
        f"Versions   {versions}",
        f"MLX        {report.backend} on {report.processor}",
        f"BLAS       {blas.name} ({blas.reason})",
    ]
    if blas.path is not None:
        threads = "" if blas.threads is None else f", {blas.threads} threads"
        lines.append(f"           {blas.path}{threads}")
    if blas.error is not None:
        lines.append(f"           Error: {blas.error}")
    costs = "   ".join(f"{rows}: {cost:.2f}" for rows, cost in report.row_cost.items())
    lines += [
        f"Row cost   {costs}",
        f"           rows: time of a 2048 x 2048 float32 product over one row's "
        f"({report.row_seconds * 1e3:.2f} ms)",
    ]
    for place, (name, state) in enumerate(report.kernels.items()):
        lines.append(f"{'' if place else 'Kernels':<11}{name}: {state}")
    return "\n".join(lines)
