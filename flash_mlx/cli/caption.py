"""`flash-mlx caption`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flash_mlx.cli.generate import model_options, notices, sampling_options
from flash_mlx.cli.learn import learn_options, observed
from flash_mlx.cli.options import INTERRUPTED
from flash_mlx.cli.penalties import penalty_options
from flash_mlx.cli.video import video_options

MOST_TEXTS = 256

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flash_mlx.caption import Caption


def _refuse_workers(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001
    value: int | None,
) -> None:
    """Say why more processes are no faster.

    Raises:
        UsageError: More than one is asked for.
    """
    if value not in (None, 1):
        raise click.UsageError(
            "--workers cannot help: a token takes as long as the memory needs to deliver the "
            "model's weights, and workers would share that memory and each hold a copy of them. "
            "The next pictures are prepared while a text is decoded anyway; leave it out.",
            context,
        )


def _batch_size(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001
    value: str,
) -> int | str:
    """Read a number, or `auto`.

    Raises:
        UsageError: It is neither.
    """
    if value == "auto":
        return value
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= MOST_TEXTS):
        raise click.UsageError(
            f"--batch-size must be auto or a whole number from 1 to {MOST_TEXTS}; got {value}.",
            context,
        )
    return int(value)


@click.command("caption")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSONL file that gets a row for each picture.",
)
@model_options
@learn_options
@click.option(
    "--prompt",
    help="What to ask; {name} stands for a field of a list's row.  [default: to describe it in "
    "detail]",
)
@click.option("--system", help="System message.")
@video_options
@click.option("--resume", is_flag=True, help="Go on with FILE: skip what it has already.")
@click.option("--sidecar", is_flag=True, help="Write each caption beside its picture too, as .txt.")
@click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    metavar="N|auto",
    callback=_batch_size,
    help="Texts decoded together; auto: as many as is fastest here, by measured costs.",
)
@click.option("--workers", type=int, hidden=True, expose_value=False, callback=_refuse_workers)
@sampling_options
@penalty_options
@click.option("--verbose/--no-verbose", default=True, help="Progress on stderr; default: on.")
def command(
    inputs: tuple[str, ...],
    output: Path,
    model: str,
    draft_model: str,
    draft_block_size: int | None,
    loading: dict[str, Any],
    learn: tuple[Path | None, float],
    prompt: str | None,
    resume: bool,
    sidecar: bool,
    verbose: bool,
    **settings: Any,
) -> int:
    """Describe many pictures and videos: files, folders, globs, or lists (.jsonl, a path a row).

    What cannot be read becomes a row with an error and stops nothing.
    """
    if prompt is not None and not prompt.strip():
        raise click.UsageError("The prompt must hold text, and this one is empty.")
    from flash_mlx.caption import Job
    from flash_mlx.generate import load

    job = Job(inputs, prompt, output=output, resume=resume, sidecar=sidecar)
    if not job.todo:
        job.close()
        failed = f", {job.num_failed} of them errors" if job.num_failed else ""
        click.echo(f"Nothing is left to do: {job.num_done} done before{failed}.", err=True)
        return 0
    loaded = observed(load(model, draft_model, draft_block_size=draft_block_size, **loading), learn)
    for line in notices(loaded, draft_model):
        click.echo(line, err=True)
    code = _follow(job.run(loaded, **settings), len(job.todo), job.num_done, verbose=verbose)
    if verbose and job.batches:
        click.echo(job.batches, err=True)
    return code


def _follow(captions: Iterator[Caption], num_todo: int, num_done: int, *, verbose: bool) -> int:
    """Show how far the captions are, and what came of them.

    Returns:
        The exit code: 1 if there were errors only.
    """
    start, count, failures = time.perf_counter(), 0, 0
    code = 0

    def pace(_: object = None) -> str:
        minutes = (time.perf_counter() - start) / 60
        return f"{count / minutes:.1f} images/min, {failures} failed"

    file = sys.stderr if verbose else None
    bar = click.progressbar(
        length=num_todo,
        label="Captions",
        file=file,
        hidden=not verbose,
        show_pos=True,
        item_show_func=pace,
    )
    try:
        with bar:
            for each in captions:
                count, failures = count + 1, failures + (each.error is not None)
                bar.update(1, each)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if verbose:
        skipped = f"{num_done} done before, " if num_done else ""
        click.echo(f"{skipped}{count - failures} captions, {pace()}", err=True)
    return code or (1 if count and count == failures else 0)
