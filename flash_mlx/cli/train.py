"""`flash-mlx train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flash_mlx.cli.options import INTERRUPTED, ListOptions, above, at_least, require_hub_id

BATCH_SIZE = 8


class _Command(ListOptions):
    """Its lists: prompts, temperatures and settings."""

    lists = ("--prompt", "--temperature", "--set")


def _settings(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    """Read `name=value` pairs; what is no JSON is text.

    Raises:
        UsageError: A pair has no `=`.
    """
    settings: dict[str, Any] = {}
    for word in values:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise click.UsageError(
                f"{parameter.opts[0]} must be name=value, such as losses.slot_decay=0.8; got "
                f"{word!r}.",
                context,
            )
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


@click.command("train", cls=_Command)
@click.option("--model", default="demo", show_default=True, help="Target: demo, folder or hub id.")
@click.option("--revision", help="Branch, tag or commit of the target's hub id.")
@click.option(
    "--data",
    help="Folder or glob of pictures, or a data set (LLaVA or messages): a JSON, JSONL or Parquet "
    "file, a folder of Parquet files, or a hub id.",
)
@click.option(
    "--split", default="train", show_default=True, help="Part of a Parquet or hub data set."
)
@click.option(
    "--from-traffic",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Learn from what --learn DIR of generate, caption and chat collected; with --data or "
    "without.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the drafter and the run; new, or that of the run to resume.",
)
@click.option("--iters", type=int, default=1000, show_default=True, callback=at_least(1))
@click.option("--save-every", type=int, default=100, show_default=True, callback=at_least(1))
@click.option("--resume", is_flag=True, help="Go on with the run in --output, if there is one.")
@click.option("--overwrite", is_flag=True, help="Begin again there; answers are kept.")
@click.option("--plan", is_flag=True, help="Print what memory and time it takes, and stop.")
@click.option(
    "--init-from",
    help="FLASH, EAGLE, MSD or ViSpec drafter to go on training: demo, folder or hub id.",
)
@click.option(
    "--init",
    "start",
    type=click.Choice(["random", "last-layer", "embeddings"]),
    help="Where a new drafter's weights begin.  [default: embeddings]",
)
@click.option(
    "--draft-vocab",
    type=int,
    callback=at_least(1),
    metavar="N",
    help="Let a new drafter propose only the N most frequent tokens of the answers: drafting reads "
    "fewer rows of the LM head.  [default: all tokens]",
)
@click.option(
    "--preset",
    type=click.Choice(["ours", "flash", "eagle", "msd", "vispec"]),
    help="Objectives and optimiser of a method.  [default: ours; with --init-from an EAGLE, MSD or "
    "ViSpec drafter its published one]",
)
@click.option(
    "--answers",
    type=click.Choice(["target", "dataset"]),
    default="target",
    show_default=True,
    help="Whose answers teach.",
)
@click.option(
    "--answer-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of the target's answers, which runs may share; answers.jsonl in --output if unset.",
)
@click.option(
    "--cache-features",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep the target's hidden states in DIR, for this run and later ones; large.",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="What they are stored as.",
)
@click.option("--prompt", "prompts", multiple=True, help="What to ask about pictures.")
@click.option("--prompts-per-image", type=int, default=1, show_default=True, callback=at_least(1))
@click.option(
    "--image-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where a data set's pictures are; its own folder if unset.",
)
@click.option(
    "--limit",
    type=int,
    callback=at_least(1),
    help="Most pictures or rows; of a hub id all are downloaded.",
)
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    multiple=True,
    default=(0.0, 1.0),
    show_default=True,
    callback=at_least(0),
    help="The target answers once at each.",
)
@click.option(
    "--max-tokens",
    type=int,
    default=256,
    show_default=True,
    callback=at_least(2),
    help="Most tokens of an answer.",
)
@click.option("--batch-size", type=int, default=BATCH_SIZE, show_default=True, callback=at_least(1))
@click.option("--accumulate", type=int, default=1, show_default=True, callback=at_least(1))
@click.option(
    "--learning-rate",
    type=float,
    callback=above(0),
    help="Default: the preset's; with --init-from one for going on.",
)
@click.option(
    "--validate-every",
    type=int,
    callback=at_least(1),
    help="Default: a tenth of the steps, at least 10.",
)
@click.option("--validation-prompts", type=int, default=8, show_default=True, callback=at_least(1))
@click.option(
    "--patience",
    type=int,
    default=0,
    show_default=True,
    callback=at_least(0),
    help="Validations without a better one that end the run; 0: none do.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option(
    "--set",
    "settings",
    multiple=True,
    callback=_settings,
    metavar="NAME=VALUE...",
    help="Any setting of TrainConfig, losses.NAME, or drafter.NAME (FlashConfig).",
)
@click.option(
    "--report-to", type=click.Choice(["wandb"]), help="Report there too; WANDB_MODE=offline works."
)
@click.option("--bench/--no-bench", default=True, help="Measure the speed-up at the end.")
def command(**options: Any) -> int:
    """Train a drafter for a model, on this machine, from pictures.

    The model answers questions about them, and the drafter learns to say the same. The output is a
    folder for --draft-model, which can be used at every moment.
    """
    if options["init_from"] and options["start"]:
        raise click.UsageError(
            "--init-from and --init exclude each other: a drafter begins at one place."
        )
    require_hub_id(options["model"], options["revision"])
    if options["resume"] and options["overwrite"]:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    if options["plan"]:
        from flash_mlx.cli.planning import show_plan

        show_plan(options)
        return 0
    if not (options["data"] or options["from_traffic"]):
        raise click.UsageError(
            "--data or --from-traffic must be given; only --plan can do without."
        )
    if not options["output"]:
        raise click.UsageError("--output must be given; only --plan can do without.")
    from flash_mlx.cli.training import run

    return 0 if run(options) else INTERRUPTED
