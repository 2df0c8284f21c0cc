"""`flash-mlx bench`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flash_mlx.cli.generate import loading_options
from flash_mlx.cli.options import ListOptions, at_least

if TYPE_CHECKING:
    from flash_mlx.decode import Drafter
    from flash_mlx.generate import Model
    from flash_mlx.loading import Drafting


prompts_option = click.option(
    "--prompt",
    "prompts",
    multiple=True,
    default=("Describe the image in detail.",),
    show_default=True,
    help="Prompts; picture i gets prompt i, over and over.",
)


class _Command(ListOptions):
    """Its lists: drafters, temperatures and prompts."""

    lists = ("--draft-model", "--drafting", "--temperature", "--prompt")


@click.command("bench", cls=_Command)
@click.option("--model", default="demo", show_default=True, help="Target: demo, folder or hub id.")
@click.option(
    "--draft-model",
    "drafts",
    multiple=True,
    default=("auto",),
    show_default=True,
    help="Drafters; each runs against plain decoding.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of pictures.  [default: the bundled ones]",
)
@prompts_option
@click.option("--limit", type=int, default=40, show_default=True, callback=at_least(1))
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    multiple=True,
    default=(0.0,),
    show_default=True,
    callback=at_least(0),
)
@click.option("--max-tokens", type=int, default=256, show_default=True, callback=at_least(2))
@click.option("--draft-block-size", type=int, callback=at_least(1))
@loading_options
@click.option(
    "--drafting",
    "modes",
    type=click.Choice(["tree", "chain", "fixed"]),
    multiple=True,
    default=("tree",),
    show_default=True,
    help="As much as pays, with siblings or without, or always the drafter's whole block.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path))
def command(
    model: str,
    drafts: tuple[str, ...],
    data: Path | None,
    prompts: tuple[str, ...],
    limit: int,
    temperatures: tuple[float, ...],
    max_tokens: int,
    draft_block_size: int | None,
    loading: dict[str, Any],
    modes: tuple[Drafting, ...],
    seed: int,
    output: Path | None,
) -> None:
    """Measure drafters against plain decoding, interleaved in one process."""
    from flash_mlx import bench, doctor, measure
    from flash_mlx.generate import load
    from flash_mlx.processing import make_prompt

    files = _pictures(data, limit)
    if output is not None:
        _require_writable(output)
    loaded_model = load(
        model, drafts[0], draft_block_size=draft_block_size, drafting=modes[0], **loading
    )
    loaded = loaded_model.loaded
    drafters = _drafters(loaded_model, drafts, modes, draft_block_size)
    questions = [
        make_prompt(loaded, prompts[i % len(prompts)], [file]) for i, file in enumerate(files)
    ]
    machine = doctor.examine()
    rows: list[dict[str, Any]] = []
    for temperature in temperatures:
        settings = bench.Settings(temperature, max_tokens, seed)
        label = f"Temperature {temperature:g}"
        with click.progressbar(length=len(questions) + 1, label=label, file=sys.stderr) as bar:
            rows += bench.run(loaded, drafters, questions, settings, bar.update)
    for row in rows:
        row["threads"] = machine.blas.threads
    curve = measure.verify_cost(loaded, questions[0])
    report = {
        "machine": dataclasses.asdict(machine),
        "settings": {
            "model": model,
            "drafts": drafts,
            "pictures": len(files),
            "prompts": prompts,
            "max_tokens": max_tokens,
            "seed": seed,
        },
        "verify_seconds": {str(m): s for m, s in curve.items()},
        "verify_cost": {str(m): s / curve[1] for m, s in curve.items()},
        "target_entropy": rows[0].get("target_entropy"),
        "rows": rows,
    }
    if output is not None:
        _write(report, output)
    click.echo(_table(report))


def _pictures(data: Path | None, limit: int) -> list[Path]:
    """The first pictures of a folder, by name; the bundled ones if none is named.

    Raises:
        UsageError: It has none.
    """
    if data is None:
        from flash_mlx.loading import demo_pictures

        return list(demo_pictures()[:limit])
    from flash_mlx.images import PICTURES

    files = sorted(f for f in data.iterdir() if f.suffix.lower() in PICTURES)[:limit]
    if not files:
        raise click.UsageError(
            f"--data must hold pictures ({', '.join(PICTURES)}); {data} has none."
        )
    return files


def _require_writable(output: Path) -> None:
    """Find out before the run whether its report can be written.

    Raises:
        OSError: It cannot.
    """
    folder = output.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise OSError(f"--json must name a file in a folder that can be written; got {output}.")


def _drafters(
    model: Model, names: Sequence[str], modes: Sequence[Drafting], draft_block_size: int | None
) -> dict[str, Drafter[Any]]:
    """Name, and mode if there are several, to drafter; plain decoding is none.

    The model's own drafter is that of the first name and mode.
    """
    from flash_mlx.generate import with_drafter

    drafters: dict[str, Drafter[Any]] = {}
    for name in names:
        for mode in modes:
            first = (name, mode) == (names[0], modes[0])
            each = model
            if not first:
                each = with_drafter(model, name, draft_block_size=draft_block_size, drafting=mode)
            if each.drafter is not None:
                label = each.draft_name if len(modes) == 1 else f"{each.draft_name} {mode}"
                drafters[label] = each.drafter
    return drafters


def _write(report: dict[str, Any], output: Path) -> None:
    from flash_mlx.files import replacing

    text = json.dumps(report, indent=1, default=str)
    with replacing(output) as file:
        file.write_text(text + "\n", encoding="utf-8")


def _table(report: dict[str, Any]) -> str:
    """The rows as text, and what they depend on."""
    head = (
        f"{'drafter':12} {'T':>4} {'threads':>7} {'tok/s':>7} {'speed-up':>8} {'95% interval':>13} "
        f"{'end-to-end':>10} {'tokens/pass':>11} {'identical':>9}"
    )
    lines = [head]
    for row in report["rows"]:
        start = f"{row['drafter'][-12:]:12} {row['temperature']:4g} {row['threads'] or 0:7}"
        if row["error"]:
            lines.append(f"{start} failed: {row['error']}")
            continue
        interval = f"{row['speedup_low']:.2f} - {row['speedup_high']:.2f}"
        lines.append(
            f"{start} {row['generation_tps']:7.1f} {row['speedup']:8.2f} {interval:>13} "
            f"{row['end_to_end_speedup']:10.2f} {row['mean_acceptance_length']:11.2f} "
            f"{row['identical']:9.2f}"
        )
    lines += filter(None, map(_round, report["rows"]))
    costs = "  ".join(f"{m}: {cost:.2f}" for m, cost in report["verify_cost"].items())
    lines.append(f"Cost of a pass over m rows, relative to one row: {costs}")
    entropy = report["target_entropy"]  # None if plain decoding failed
    if entropy is not None:
        lines.append(f"Entropy of the target's text: {entropy:.3f} bits per token")
    return "\n".join(lines)


def _round(row: dict[str, Any]) -> str:
    """What a row's rounds spend their time on; nothing if that was not clocked."""
    times = [row.get(f"{phase}_seconds") for phase in ("draft", "verify", "host")]
    if None in times:
        return ""
    draft, verify, host = (1e3 * float(each) for each in times if each is not None)
    total = draft + verify + host
    return (
        f"{row['drafter'][-12:]:12} {row['temperature']:4g} round of {total:.2f} ms: drafter "
        f"{draft:.2f}, target {verify:.2f}, neither {host:.2f} ({host / total:.1%})"
    )
