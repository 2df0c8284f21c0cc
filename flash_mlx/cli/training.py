"""What `flash-mlx train` does: questions, answers, training, measuring, each with its progress."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
import mlx.core as mx

from flash_mlx import bench
from flash_mlx.checkpoint import load_model, resolve_path
from flash_mlx.cli.progress import Bar, interruptible, progress
from flash_mlx.draft import FlashDrafter, FlashModel
from flash_mlx.loading import DEMO, Model, load
from flash_mlx.train import Example, Teacher, TrainConfig, Trainer
from flash_mlx.train.answers import (
    AnswerFile,
    AnswerSettings,
    Asked,
    PromptMaker,
    answer_all,
    given_answers,
)
from flash_mlx.train.card import Facts, write_card
from flash_mlx.train.config import configure
from flash_mlx.train.folder import (
    ANSWERS,
    PLOT,
    SKIPPED,
    check,
    claim,
    describe_target,
    list_skipped,
)
from flash_mlx.train.initial import Start, drafter_config, new_model
from flash_mlx.train.plan import chunk_for
from flash_mlx.train.plot import plot, read_metrics
from flash_mlx.train.source import Found, find_questions
from flash_mlx.train.validate import BEST_BY, hold_out, validator

DTYPES: Mapping[mx.Dtype, Literal["float32", "bfloat16", "float16"]] = {
    mx.float32: "float32",
    mx.bfloat16: "bfloat16",
    mx.float16: "float16",
}
HIDDEN_BYTES = 1 << 30  # of the target's states that stay in memory
NOT_ASKED = ("resume", "overwrite", "plan", "save_every", "bench", "output", "answer_cache")


@dataclass(frozen=True, eq=False)
class _Data:
    """What a run learns from and is measured on; `facts` tell about it."""

    examples: list[Example]
    held_out: list[Asked]
    facts: dict[str, Any]


def run(options: Mapping[str, Any]) -> bool:
    """Train as the options of the command say.

    Returns:
        Whether the run is finished; else it was interrupted and can be resumed.

    Raises:
        OSError: A file is missing, or the output cannot be written or belongs to something else.
        ValueError: Data, target, drafter or settings do not fit, or the loss is no number.
    """
    output: Path = options["output"]
    config, sizes = settings(options)
    wanted = {name: value for name, value in options.items() if name not in NOT_ASKED}
    request = {name: str(v) if isinstance(v, Path) else v for name, v in wanted.items()}
    resume = bool(options["resume"])
    is_begun = check(output, request, resume=resume, overwrite=options["overwrite"])
    begin = options["init_from"]
    folder = None if not begin else DEMO / "drafter" if begin == "demo" else resolve_path(begin)
    model = load(options["model"], folder or "auto", revision=options["revision"])
    start: Start = options["start"] or "random"
    if folder is None:
        shape = drafter_config(model.loaded, start, sizes)
        drafter = new_model(model.loaded, shape, start, config.seed)
    else:
        drafter = load_model(folder)
    target = describe_target(model)
    found, asked = _ask(model, options, config, str(target["sha256"]))
    claim(output, request, resume=resume)
    data = _answer(model, options, found, asked)
    if "dtype" not in options["settings"]:
        narrow = DTYPES[model.target.embed(mx.array([0])).dtype]
        config = replace(config, dtype=narrow)
    if "chunk" not in options["settings"]:
        config = replace(config, chunk=chunk_for(drafter.config))
    trainer = Trainer(
        drafter,
        Teacher.of(model.target, HIDDEN_BYTES),
        data.examples,
        output,
        config,
        target_info=target,
        validate=validator(
            model.target,
            [one.prompt for one in data.held_out],
            options["max_tokens"],
            model.loaded.eos_ids,
        ),
    )
    finished = _train(trainer, is_begun=is_begun)
    if finished:
        origin = f"the drafter {begin}" if begin else start
        _describe(model, trainer, data, target, origin, options)
    return finished


def settings(options: Mapping[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """Return how to train, and what of a new drafter's sizes was chosen.

    Raises:
        UsageError: A setting is unknown, out of its range, or for nothing.
    """
    steps = options["iters"]
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
    elif options["init_from"]:
        changes["learning_rate"] = configure(options["preset"]).learning_rate / 10
    sizes = {}
    for name, value in options["settings"].items():
        if name.startswith("drafter."):
            sizes[name.removeprefix("drafter.")] = value
        else:
            changes[name] = value
    if sizes and options["init_from"]:
        raise click.UsageError("With --init-from, a drafter's sizes are its own; leave them out.")
    try:
        return configure(options["preset"], changes), sizes
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _ask(
    model: Model, options: Mapping[str, Any], config: TrainConfig, target_hash: str
) -> tuple[Found, list[Asked]]:
    """Find the questions, and read their pictures once.

    Raises:
        ValueError: None can be used.
    """
    found = find_questions(
        options["data"],
        prompts=options["prompts"],
        prompts_per_image=options["prompts_per_image"],
        image_folder=options["image_folder"],
        text_rows=config.order == "text_first",
        limit=options["limit"],
        seed=options["seed"],
    )
    with progress("Reading", len(found.questions), "question") as bar:
        asked = PromptMaker(model.loaded, target_hash).ask_all(found, bar.update)
    if not asked:
        raise ValueError(
            f"There must be something to learn from; nothing in {options['data']} can be used: "
            f"{_some(found)}."
        )
    return found, asked


def _answer(
    model: Model,
    options: Mapping[str, Any],
    found: Found,
    asked: list[Asked],
) -> _Data:
    """Hold some questions out and answer the others.

    Raises:
        ValueError: No answer can be used.
    """
    output, most, seed = options["output"], options["validation_prompts"], options["seed"]
    kept, held_out = hold_out(asked, lambda one: one.question.images or one.digest, most, seed)
    facts = {"source": options["data"], "questions": len(asked), "held out": len(held_out)}
    facts["answers of"] = options["answers"]
    cut = 0
    if options["answers"] == "dataset":
        examples, cut = given_answers(model.loaded, kept, found, options["max_tokens"])
        facts["answers cut off"] = cut
    else:
        how = AnswerSettings(options["temperatures"], options["max_tokens"], seed)
        facts["at temperatures"] = ", ".join(f"{t:g}" for t in how.temperatures)
        file = AnswerFile(options["answer_cache"] or output / ANSWERS)
        count = len(kept) * len(how.temperatures)
        with progress("Answering", count, "answer") as bar:
            examples = answer_all(model, kept, how, file, lambda _: bar.update())
    facts |= {"examples": len(examples), "tokens": sum(len(e.answer) for e in examples)}
    facts["left out"] = len(found.skipped)
    list_skipped(output, found.skipped)
    if found.skipped:
        click.echo(
            f"Left out {len(found.skipped)}, listed in {output / SKIPPED}: {_some(found)}.",
            err=True,
        )
    if cut:
        click.echo(f"Cut off {cut} answers that were too long.", err=True)
    if not held_out:
        click.echo("There is one picture only, so the drafter is measured on it too.", err=True)
    return _Data(examples, (held_out or asked)[:most], facts)


def _some(found: Found) -> str:
    return "; ".join(f"{source}: {reason.rstrip('.')}" for source, reason in found.skipped[:3])


def _train(trainer: Trainer, *, is_begun: bool) -> bool:
    """Begin or go on; SIGINT ends the run with a checkpoint."""
    with interruptible() as interrupted:
        if is_begun:
            click.echo(f"Going on after step {trainer.resume()}.", err=True)
        else:
            trainer.save()  # from here on there is something to resume
        bar = Bar(trainer.step, trainer.config.iterations)
        trainer.callback = bar
        finished = trainer.run(lambda: bool(interrupted))
        bar.close()
    if not finished:
        click.echo(f"Interrupted after step {trainer.step}; --resume goes on.", err=True)
    return finished


def _describe(
    model: Model,
    trainer: Trainer,
    data: _Data,
    target: Mapping[str, Any],
    origin: str,
    options: Mapping[str, Any],
) -> None:
    """Measure the drafter that was kept, draw the curves and write the card."""
    output: Path = options["output"]
    best: FlashModel = load_model(output)
    rows: list[dict[str, Any]] = []
    if options["bench"]:
        lends = model.target
        drafters = {"this": FlashDrafter(best, lends.embed, lends.lm_head)}
        prompts = [one.prompt for one in data.held_out]
        how = bench.Settings(max_tokens=options["max_tokens"])
        with progress("Measuring", len(prompts) + 1, "prompt") as bar:
            rows = bench.run(model.loaded, drafters, prompts, how, bar.update)
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
        start=origin,
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
    click.echo(f"{output}: {trainer.best:.2f} tokens per pass on held-out questions{speed}")
