"""`flash-mlx bench --roofline`: what drafting would bring on machines that are not here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from flash_mlx.cli.options import above, at_least, between

if TYPE_CHECKING:
    from flash_mlx.bench.roofline import Machine, Shape

Command = TypeVar("Command", bound=Callable[..., Any])

HERE = "here"
CHIPS = ("M1 Max", "M2 Max", "M3 Max", "M4 Pro", "M5 Max")
NAMES = ("roofline", "bits", "chips", "bandwidth", "contexts", "acceptance", "draft_vocab")
LISTS = ("--chip", "--context")


def roofline_options(command: Command) -> Command:
    """Options of the projection; the command gets them as `projection`."""

    @wraps(command)
    def gathered(**given: Any) -> Any:
        if not given["roofline"]:
            _refuse_alone(click.get_current_context())
        return command(projection={name: given.pop(name) for name in NAMES}, **given)

    wrapped: Any = gathered
    for option in (
        click.option(
            "--acceptance",
            type=float,
            default=0.8,
            show_default=True,
            callback=between(0, 1),
            help="With --roofline: chance of a draft if those before it were accepted.",
        ),
        click.option(
            "--draft-vocab",
            type=int,
            callback=at_least(1),
            help="With --roofline: tokens that the drafter may propose.  [default: all]",
        ),
        click.option(
            "--context",
            "contexts",
            type=int,
            multiple=True,
            default=(2048,),
            show_default=True,
            callback=at_least(0),
            help="With --roofline: rows in the cache.",
        ),
        click.option(
            "--bandwidth",
            type=float,
            callback=above(0),
            help="With --roofline: GB/s instead of the chips' own.",
        ),
        click.option(
            "--chip",
            "chips",
            multiple=True,
            default=CHIPS,
            show_default=True,
            help="With --roofline: M1, ..., M5 Max, or here (measured now).",
        ),
        click.option(
            "--bits",
            type=click.Choice(["4", "8", "16", "32"]),
            default="4",
            show_default=True,
            help="With --roofline: of a weight.",
        ),
        click.option(
            "--roofline",
            is_flag=True,
            help="Project what drafting brings --model (a config.json is enough); measure nothing.",
        ),
    ):
        wrapped = option(wrapped)
    made: Command = wrapped
    return made


def _refuse_alone(context: click.Context) -> None:
    """Require the options of the projection to come with --roofline."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in NAMES and source is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} must stand with --roofline.")


def show(
    model: str,
    projection: Mapping[str, Any],
    drafts: int | None,
    output: Path | None,
    *,
    markdown: bool,
) -> None:
    """Print the projection and, if wanted, write it as JSON; the arguments are those of `run`."""
    report = run(model, projection, drafts)
    if output is not None:
        write(report, output)
    click.echo(table(report, markdown=markdown))


def run(model: str, projection: Mapping[str, Any], drafts: int | None) -> dict[str, Any]:
    """Return the projected rows, with what they rest on.

    Args:
        model: As for `bench`; the demo, as nobody names it, stands for five known models.
        projection: From `roofline_options`.
        drafts: Drafts of a round; None: as many as pay most.
    """
    from flash_mlx.bench.roofline import best

    rows = [
        best(
            shape,
            machine,
            bits=int(projection["bits"]),
            context=context,
            acceptance=projection["acceptance"],
            drafts=drafts,
            draft_vocab=projection["draft_vocab"],
        )
        for machine in _machines(projection["chips"], projection["bandwidth"], projection["bits"])
        for shape in _shapes(model)
        for context in projection["contexts"]
    ]
    return {"projected": True, "rows": rows}


def table(report: Mapping[str, Any], *, markdown: bool) -> str:
    """Return the rows as a table, the arithmetic of each below it, and the sources."""
    from flash_mlx.bench.roofline import arithmetic, is_extrapolated
    from flash_mlx.bench.table import aligned, as_markdown

    head = ["model", "bits", "chip", "context", "drafts", "C(k+1)", "tokens/pass"]
    head += ["projected tok/s", "projected speed-up"]
    rows: Sequence[Mapping[str, Any]] = report["rows"]
    cells = [head] + [
        [
            row["model"],
            str(row["bits"]),
            row["machine"],
            str(row["context"]),
            str(row["drafts"]),
            f"{row['pass_cost']:.2f}{'*' if is_extrapolated(row) else ''}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['projected_plain_tps']:.1f} -> {row['projected_tps']:.1f}",
            f"{row['projected_speedup']:.2f}",
        ]
        for row in rows
    ]
    sources = {row["machine"]: row["cost_source"] for row in rows}
    lines = [
        "Nothing here was measured on these machines. A draft is taken to be accepted with chance "
        f"{rows[0]['acceptance']:g} if those before it were.",
        *(["* beyond the rows that were measured."] if any(map(is_extrapolated, rows)) else []),
        *map(arithmetic, rows),
        *(f"C(m) of {name}: {source}" for name, source in sources.items()),
    ]
    if markdown:
        return "\n".join([*as_markdown(cells), "", *(f"- {line}" for line in lines)])
    return "\n".join([*aligned(cells), *lines])


def _shapes(model: str) -> Sequence[Shape]:
    from flash_mlx.bench.roofline import MODELS, Shape
    from flash_mlx.files import read_json

    if model == "demo":
        return MODELS
    known = [shape for shape in MODELS if shape.name == model]
    if known:
        return known
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise click.UsageError(
            f"--model must be a folder with a config.json, or one of "
            f"{', '.join(shape.name for shape in MODELS)}; got {model}."
        )
    return (Shape.from_config(model, read_json(file)),)


def _machines(chips: Sequence[str], bandwidth: float | None, bits: str) -> list[Machine]:
    from flash_mlx.bench.macs import BANDWIDTH, curve_of
    from flash_mlx.bench.roofline import Machine

    machines = []
    for chip in chips:
        if chip == HERE:
            here = _here()
            machines.append(Machine(HERE, bandwidth or here.bandwidth, here.costs, here.source))
            continue
        try:
            curve = curve_of(chip)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        wider = (
            "" if bits == "4" else f"; of 4-bit weights, whose rows are dearer than {bits}-bit ones"
        )
        machines.append(
            Machine(chip, bandwidth or BANDWIDTH[chip], curve.costs, curve.source + wider)
        )
    return machines


def _here() -> Machine:
    """Return this machine, by a product of its own."""
    from flash_mlx.bench.roofline import Machine
    from flash_mlx.cost import Costs
    from flash_mlx.doctor import matmul_seconds
    from flash_mlx.measure import ROWS

    size = 2048
    seconds = matmul_seconds(ROWS, size=size)
    costs = Costs(seconds[1], tuple(seconds.items()))
    read = 4 * size * size / seconds[1] / 1e9
    return Machine(HERE, read, costs, f"measured now: a {size} x {size} float32 product")


def write(report: Mapping[str, Any], output: Path) -> None:
    """Write a report as JSON, at once or not at all."""
    from flash_mlx.files import replacing

    text = json.dumps(report, indent=1, default=str)
    with replacing(output) as file:
        file.write_text(text + "\n", encoding="utf-8")
