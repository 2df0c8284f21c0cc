"""What `flash-mlx train` does: questions, answers, training, measuring, each with its progress."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click
import mlx.core as mx

from flash_mlx import bench
from flash_mlx.checkpoint import drafter_of, load_network
from flash_mlx.cli.asking import Data, answer, ask
from flash_mlx.cli.beginning import Origin, origin, start_of
from flash_mlx.cli.progress import Bar, interruptible, progress
from flash_mlx.cli.reporting import Several, report_to
from flash_mlx.decode import Target
from flash_mlx.draft import FlashModel
from flash_mlx.loading import Model, read_by
from flash_mlx.train import Example, Teacher, TrainConfig, Trainer, TrainingCallback
from flash_mlx.train.card import Facts, write_card
from flash_mlx.train.config import PRESET_OF, configure, rate_for_going_on
from flash_mlx.train.features import FeatureCache
from flash_mlx.train.folder import PLOT, RUN, check, claim, describe_target
from flash_mlx.train.initial import BEST_START, propose_frequent
from flash_mlx.train.plan import chunk_for
from flash_mlx.train.plot import plot, read_metrics
from flash_mlx.train.teacher import read_examples
from flash_mlx.train.validate import BEST_BY, validator

DTYPES: Mapping[mx.Dtype, Literal["float32", "bfloat16", "float16"]] = {
    mx.float32: "float32",
    mx.bfloat16: "bfloat16",
    mx.float16: "float16",
}
HIDDEN_BYTES = 1 << 30  # of the target's states that stay in memory
NOT_ASKED = (
    "resume",
    "overwrite",
    "plan",
    "save_every",
    "bench",
    "output",
    "answer_cache",
    "report_to",
)


def run(options: Mapping[str, Any]) -> bool:
    """Train as the options of the command say.

    Returns:
        Whether the run is finished; else it was interrupted and can be resumed.

    Raises:
        OSError: A file is missing, or the output cannot be written or belongs to something else.
        ValueError: Data, target, drafter or settings do not fit, or the loss is no number.
    """
    output: Path = options["output"]
    begin = origin(options)
    config, sizes = settings(options, begin)
    wanted = {name: value for name, value in options.items() if name not in NOT_ASKED}
    request = {name: str(v) if isinstance(v, Path) else v for name, v in wanted.items()}
    resume = bool(options["resume"])
    is_begun = check(output, request, resume=resume, overwrite=options["overwrite"])
    reporter = report_to(options["report_to"], output, request)
    model, drafter = start_of(options, begin, config, sizes)
    target = describe_target(model)
    questions = ask(model, options, config, str(target["sha256"]))
    # What another run left is dropped last, once nothing can be wrong with this one's settings.
    is_taken = not resume and (output / RUN).is_file()
    if not is_taken:
        claim(output, request, resume=resume)
    data = answer(model, options, questions)
    if begin is None and isinstance(drafter, FlashModel):
        _choose_tokens(drafter, data, model.loaded.eos_ids)
    if "dtype" not in options["settings"]:
        narrow = DTYPES[model.target.embed(mx.array([0])).dtype]
        config = replace(config, dtype=narrow)
    if "chunk" not in options["settings"]:
        config = replace(config, chunk=chunk_for(drafter.config))
    lends = model.loaded.target
    # With taps, the target hands out more of itself.
    target_read = read_by(drafter_of(drafter, lends), model.loaded).target
    width = lends.hidden_size * (1 + len(drafter.taps(lends.num_layers)))
    trainer = Trainer(
        drafter,
        _teacher(target_read, options, data.examples, width),
        data.examples,
        output,
        config,
        target_info=target,
        validate=validator(
            target_read,
            [one.prompt for one in data.held_out],
            options["max_tokens"],
            model.loaded.eos_ids,
            trees=lends.supports_tree,
        ),
    )
    if is_taken:
        claim(output, request, resume=False)
    with reporter:
        finished = _train(trainer, reporter, is_begun=is_begun)
    if finished:
        _describe(model, trainer, data, target, options)
    return finished


def _choose_tokens(drafter: FlashModel, data: Data, stop_ids: Sequence[int]) -> None:
    """Choose what a new drafter may propose, if that is not all tokens, and tell."""
    share = propose_frequent(drafter, (one.answer for one in data.examples), stop_ids)
    if number := drafter.config.draft_vocab_size:
        told = f"{number} of {drafter.config.vocab_size}: {share:.2%} of the answers' tokens"
        data.facts["tokens that may be drafted"] = told
        click.echo(f"Tokens that may be drafted: {told}.", err=True)


def _teacher(
    target: Target, options: Mapping[str, Any], examples: Sequence[Example], width: int
) -> Teacher:
    """Return the target as a teacher, which reads its states from the disk if that was wanted.

    Raises:
        OSError: There is no room for them.
    """
    folder = options["cache_features"]
    if folder is None:
        return Teacher.of(target, HIDDEN_BYTES, examples=examples)
    cache = FeatureCache(folder, options["cache_dtype"], width)
    missing = cache.missing(examples)
    size = cache.size(missing)
    free = cache.require_room(size)
    click.echo(
        f"The target's states of {len(missing)} answers take {size / 1e6:.1f} MB in {folder} "
        f"({len(examples) - len(missing)} are there; {free / 1e9:.1f} GB are free).",
        err=True,
    )
    with progress("Caching", len(missing), "answer") as bar:
        cache.fill(missing, lambda one: read_examples(target, [one])[0], bar.update)
    dtype = target.embed(mx.array([0])).dtype
    return Teacher.of(target, HIDDEN_BYTES, lambda example: cache.get(example, dtype))


def settings(
    options: Mapping[str, Any], begin: Origin | None
) -> tuple[TrainConfig, dict[str, Any]]:
    """Return how to train, and what of a new drafter's sizes was chosen.

    Args:
        options: Of the command.
        begin: From `origin`.

    Raises:
        UsageError: A setting is unknown, out of its range, or for nothing.
    """
    steps = options["iters"]
    preset = options["preset"] or PRESET_OF["flash" if begin is None else begin.kind]
    changes: dict[str, Any] = {
        "iterations": steps,
        "batch_size": options["batch_size"],
        "accumulate": options["accumulate"],
        "warmup": min(50, steps // 10),
        "compile": mx.default_device() != mx.Device(mx.cpu),
        "seed": options["seed"],
        "save_every": options["save_every"],
        "report_every": max(1, min(10, steps // 20)),
        "validate_every": options["validate_every"] or max(10, steps // 10),
        "best_by": BEST_BY,
        "patience": options["patience"],
    }
    if options["learning_rate"]:
        changes["learning_rate"] = options["learning_rate"]
    elif begin is not None:
        changes["learning_rate"] = rate_for_going_on(preset, begin.config.hidden_size)
    sizes = {"draft_vocab_size": options["draft_vocab"]} if options["draft_vocab"] else {}
    for name, value in options["settings"].items():
        if name in ("drafter.hidden_size", "drafter.vocab_size"):
            raise click.UsageError(f"{name} is the target's own; leave it out.")
        if name.startswith("drafter."):
            sizes[name.removeprefix("drafter.")] = value
        else:
            changes[name] = value
    if changes["best_by"] not in ("", BEST_BY, f"{BEST_BY}_t1"):
        raise click.UsageError(
            f"best_by must be {BEST_BY}, {BEST_BY}_t1 or empty; got {changes['best_by']!r}."
        )
    if sizes and begin is not None:
        raise click.UsageError("With --init-from, a drafter's sizes are its own; leave them out.")
    try:
        return configure(preset, changes), sizes
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _train(trainer: Trainer, reporter: TrainingCallback, *, is_begun: bool) -> bool:
    """Begin or go on; SIGINT ends the run with a checkpoint."""
    with interruptible() as interrupted:
        if is_begun:
            click.echo(f"Going on after step {trainer.resume()}.", err=True)
        else:
            trainer.save()  # from here on there is something to resume
        bar = Bar(trainer.step, trainer.config.iterations)
        trainer.callback = Several((bar, reporter))
        try:
            finished = trainer.run(lambda: bool(interrupted))
        finally:
            bar.close()  # what is said of an error has a line of its own
    if not finished:
        click.echo(f"Interrupted after step {trainer.step}; --resume goes on.", err=True)
    return finished


def _describe(
    model: Model,
    trainer: Trainer,
    data: Data,
    target: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Measure the drafter that was kept, draw the curves and write the card."""
    output: Path = options["output"]
    best = load_network(output)[0]
    rows: list[dict[str, Any]] = []
    if options["bench"]:
        drafters = {"this": drafter_of(best, model.target, trees=model.loaded.target.supports_tree)}
        prompts = [one.prompt for one in data.held_out]
        how = bench.Settings(max_tokens=options["max_tokens"])
        with progress("Measuring", len(prompts) + 1, "prompt") as bar:
            rows = bench.run(model.loaded, drafters, prompts, how, bar.update)
    begin = options["init_from"]
    metrics = read_metrics(output)
    training = [row for row in metrics if row["kind"] == "training"]
    try:
        plot(metrics, output / PLOT)
    except ImportError:
        click.echo("No curves: they need matplotlib (pip install 'flash-mlx[train]').", err=True)
    facts = Facts(
        target=target,
        data=data.facts,
        config=trainer.config,
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in training),
        target_share=statistics.median(row["target_share"] for row in training),
        drafter=best.config,
        start=f"the drafter {begin}" if begin else options["start"] or BEST_START,
        best=trainer.best,
        bench=rows,
        machine=f"{mx.device_info().get('device_name', 'unknown')}, {platform.system()}",
    )
    write_card(facts, output)
    speed = next(
        (
            f", {row['speedup']:.2f}x plain decoding's speed"
            for row in rows
            if row["drafter"] == "this" and row["error"] is None
        ),
        "",
    )
    length = "" if trainer.best is None else f": {trainer.best:.2f} tokens per pass"
    click.echo(f"{output}{length} on held-out questions{speed}")
