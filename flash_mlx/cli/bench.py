"""`flash-mlx bench`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from flash_mlx.cli import roofline
from flash_mlx.cli.options import ListOptions, at_least, loading_options, require_writable
from flash_mlx.cli.roofline import roofline_options, write
from flash_mlx.cli.video import video_options

if TYPE_CHECKING:
    from flash_mlx.bench import Question, Settings
    from flash_mlx.decode import Drafter
    from flash_mlx.generate import Model
    from flash_mlx.loading import Drafting
    from flash_mlx.targets import LoadedTarget


ARGV = "flash_mlx.argv"  # where a context keeps the command's words

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

    lists = (
        "--draft-model",
        "--draft-block-size",
        "--drafting",
        "--temperature",
        "--prompt",
        *roofline.LISTS,
    )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words for the report."""
        ctx.meta[ARGV] = ["bench", *args]
        return super().parse_args(ctx, args)


@click.command("bench", cls=_Command)
@click.option("--model", default="demo", show_default=True, help="Target: demo, folder or hub id.")
@click.option(
    "--draft-model",
    "drafts",
    multiple=True,
    default=("auto",),
    show_default=True,
    help="Drafters: auto, none, ngram, folders or hub ids; each runs against plain decoding.",
)
@click.option(
    "--data",
    default="scenes",
    show_default=True,
    help="Folder of pictures and videos, rows (.jsonl of MMSpec, LLaVA-Bench, ...), lines of text "
    "(.txt), or scenes: the bundled pictures.",
)
@click.option(
    "--image-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the rows' pictures are.  [default: beside the rows, or in images/ there]",
)
@video_options
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
@click.option(
    "--repeats",
    type=int,
    default=1,
    show_default=True,
    callback=at_least(1),
    help="Answers of each drafter to each prompt.",
)
@click.option(
    "--draft-block-size",
    "blocks",
    type=int,
    multiple=True,
    callback=at_least(1),
    help="Always as many drafts; several sizes run against each other, and against --drafting.",
)
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
@click.option(
    "--plot", "picture", type=click.Path(dir_okay=False, path_type=Path), help="PNG to draw."
)
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option(
    "--replay-costs",
    is_flag=True,
    help="Also project what the rounds would bring at published costs of Macs.",
)
@roofline_options
@click.pass_context
def command(
    context: click.Context,
    model: str,
    drafts: tuple[str, ...],
    data: str,
    image_folder: Path | None,
    fps: float,
    max_frames: int,
    prompts: tuple[str, ...],
    limit: int,
    temperatures: tuple[float, ...],
    max_tokens: int,
    repeats: int,
    blocks: tuple[int, ...],
    loading: dict[str, Any],
    modes: tuple[Drafting, ...],
    seed: int,
    output: Path | None,
    picture: Path | None,
    markdown: bool,
    replay_costs: bool,
    projection: dict[str, Any],
) -> None:
    """Measure drafters against plain decoding, interleaved in one process."""
    for name, file in (("--json", output), ("--plot", picture)):
        if file is not None:
            require_writable(name, file)
    if projection["roofline"]:
        if picture is not None:
            raise click.UsageError("--plot must stand without --roofline, which draws nothing.")
        if len(blocks) > 1:
            raise click.UsageError("--roofline takes one --draft-block-size.")
        roofline.show(model, projection, next(iter(blocks), None), output, markdown=markdown)
        return
    from flash_mlx import bench, doctor, measure
    from flash_mlx.bench.plot import plot, require_matplotlib
    from flash_mlx.bench.report import build
    from flash_mlx.bench.table import render
    from flash_mlx.generate import load

    if picture is not None:
        require_matplotlib()
    questions = bench.read_questions(
        data, prompts, limit, image_folder, fps=fps, max_frames=max_frames
    )
    typed = context.get_parameter_source("modes") is not ParameterSource.DEFAULT
    ways: list[Drafting | int] = [*(modes if typed or not blocks else ()), *blocks]
    first = load(model, drafts[0], **_way(ways[0]), **loading)
    loaded = first.loaded
    drafters = _drafters(first, drafts, ways)
    prompt = bench.first_prompt(loaded, questions)
    machine = doctor.examine()
    settings = [bench.Settings(t, max_tokens, seed, repeats, replay_costs) for t in temperatures]
    rows, skipped = _ask(loaded, drafters, questions, settings)
    report = build(
        rows,
        {**context.params, "argv": context.meta[ARGV]},
        machine,
        measure.verify_cost(loaded, prompt),
        skipped,
        replay_costs=replay_costs,
    )
    if output is not None:
        write(report, output)
    if picture is not None:
        plot(report, picture)
    click.echo(render(report, markdown=markdown))


def _ask(
    loaded: LoadedTarget,
    drafters: Mapping[str, Drafter[Any]],
    questions: Sequence[Question],
    settings: Sequence[Settings],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the rows of all temperatures, and what was skipped and why; shows a bar of each."""
    from flash_mlx.bench import run

    skipped: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    length = 1 + sum(len(question.turns) for question in questions)
    for how in settings:
        label = f"Temperature {how.temperature:g}"
        with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
            rows += run(loaded, drafters, questions, how, bar.update, skipped.update)
    return rows, skipped


def _way(way: Drafting | int) -> dict[str, Any]:
    """Return the arguments of `load` that draft this way: a mode, or always as many."""
    return {"draft_block_size": way} if isinstance(way, int) else {"drafting": way}


def _drafters(
    model: Model, names: Sequence[str], ways: Sequence[Drafting | int]
) -> dict[str, Drafter[Any]]:
    """Name, and way to draft if there are several, to drafter; plain decoding is none.

    The model's own drafter is that of the first name and way.
    """
    from flash_mlx.generate import with_drafter

    drafters: dict[str, Drafter[Any]] = {}
    for name in names:
        for way in ways:
            first = (name, way) == (names[0], ways[0])
            each = model if first else with_drafter(model, name, **_way(way))
            if each.drafter is not None:
                how = f"fixed {way}" if isinstance(way, int) else way
                label = each.draft_name if len(ways) == 1 else f"{each.draft_name} {how}"
                drafters[label] = each.drafter
    return drafters
