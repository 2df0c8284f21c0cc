"""`flash-mlx generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flash_mlx.cli.learn import learn_options, observed
from flash_mlx.cli.options import INTERRUPTED, at_least, between, loading_options
from flash_mlx.cli.penalties import penalty_options
from flash_mlx.cli.report import as_json_object, statistics, weights
from flash_mlx.cli.show import coloured, draw, has_colours, require_drawable, show_options
from flash_mlx.cli.video import MediaOptions, frames_of, open_media, video_options

if TYPE_CHECKING:
    from flash_mlx.generate import GenerationResponse, Model

UNSET = "unset: as generation_config.json says"

Command = TypeVar("Command", bound=Callable[..., Any])


def model_options(command: Command) -> Command:
    """Options that choose the target and its drafter, and those of `loading_options`."""
    command = loading_options(command)
    for option in (
        click.option(
            "--draft-block-size",
            "--num-draft-tokens",
            type=int,
            metavar="K",
            callback=at_least(1),
            help="Tokens drafted in each pass; default: as many as pay.",
        ),
        click.option(
            "--draft-model",
            default="auto",
            show_default=True,
            metavar="NAME",
            help="Drafter: a folder, a hub id, ngram (from the text so far), none, or auto.",
        ),
        click.option(
            "--model",
            default="demo",
            show_default=True,
            metavar="NAME",
            help="Target: a folder, a hub id, or the bundled demo.",
        ),
    ):
        command = option(command)
    return command


def filter_options(command: Command) -> Command:
    """Options that say which tokens may be drawn, and with which random numbers."""
    for option in (
        click.option(
            "--seed",
            type=click.IntRange(0, 2**63 - 1),
            default=0,
            show_default=True,
            help="Of the random numbers; the same seed gives the same text.",
        ),
        click.option(
            "--min-p",
            type=float,
            callback=between(0, 1),
            help="Keep tokens at least this share as likely as the best.",
        ),
        click.option(
            "--top-k",
            type=int,
            callback=at_least(0),
            help=f"Keep the k best tokens; 0: all; {UNSET}.",
        ),
        click.option(
            "--top-p",
            type=float,
            callback=between(0, 1, open_low=True),
            help=f"Keep the best tokens up to this total probability; {UNSET}.",
        ),
    ):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """Options that choose how tokens are drawn; unset ones follow generation_config.json."""
    command = click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        callback=_check_stop,
        help="End the text before this string. Repeatable.",
    )(command)
    command = filter_options(command)
    for option in (
        click.option(
            "--temperature",
            "--temp",
            type=float,
            callback=at_least(0),
            help=f"0 takes the most likely token; {UNSET}, else 0.",
        ),
        click.option(
            "--max-tokens",
            type=int,
            default=2048,
            show_default=True,
            callback=at_least(1),
            help="Most tokens to generate.",
        ),
    ):
        command = option(command)
    return command


def _check_stop(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001
    values: tuple[str, ...],
) -> tuple[str, ...]:
    if "" in values:
        raise click.UsageError("--stop must be text; got an empty string.", context)
    return values


@click.command("generate", cls=MediaOptions)
@model_options
@learn_options
@click.option("--image", multiple=True, metavar="FILE...", help="Pictures, one or more.")
@click.option("--video", multiple=True, metavar="FILE...", help="Videos, one or more.")
@video_options
@click.option("--prompt", help="What to say; - reads stdin.  [default: to describe it in detail]")
@click.option("--system", help="System message.")
@sampling_options
@penalty_options
@click.option("--verbose/--no-verbose", default=True, help="Statistics on stderr; default: on.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@show_options
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str,
    draft_model: str,
    draft_block_size: int | None,
    loading: dict[str, Any],
    learn: tuple[Path | None, float],
    image: tuple[str, ...],
    video: tuple[str, ...],
    fps: float,
    max_frames: int,
    prompt: str | None,
    system: str | None,
    verbose: bool,
    as_json: bool,
    show_drafts: bool,
    show_latents: Path | None,
    **settings: Any,
) -> int:
    """Say what a picture shows, or anything else about pictures and text.

    Text streams to stdout, statistics go to stderr.
    """
    text = _read_prompt(prompt, image, video)
    if show_latents is not None:
        require_drawable(show_latents, [*image, *video])
    from flash_mlx.draft import AdaptiveDrafter
    from flash_mlx.generate import join, load, stream_generate

    # Before the model: what is wrong with them should not take minutes to hear.
    images = open_media(context, image, video, fps=fps, max_frames=max_frames)
    loaded = observed(load(model, draft_model, draft_block_size=draft_block_size, **loading), learn)
    for line in notices(loaded, draft_model):
        click.echo(line, err=True)
    if show_latents is not None:
        draw(show_latents, loaded, frames_of(images), text, system)
    responses = stream_generate(loaded, text, images, system=system, **settings)
    show = coloured if show_drafts and has_colours() else None
    pieces, interrupted = _print_stream(responses, stream=not as_json, show=show)
    if pieces:
        answer = join(pieces)
        if as_json:
            click.echo(json.dumps(as_json_object(loaded, answer, interrupted=interrupted)))
        elif verbose:
            click.echo(f"{statistics(answer)}\n{weights(loaded)}", err=True)
            stats, drafter = answer.stats, loaded.drafter
            if stats.rounds and isinstance(drafter, AdaptiveDrafter):
                rows = answer.prompt_tokens
                click.echo(drafter.explain(rows, stats.outcomes, stats.parked), err=True)
    return INTERRUPTED if interrupted else 0


def _read_prompt(prompt: str | None, image: Sequence[str], video: Sequence[str]) -> str:
    """The prompt's text, from the option, stdin or the default.

    Raises:
        UsageError: There is none.
    """
    if prompt is None:
        if not (image or video):
            raise click.UsageError(
                "There must be something to answer; give --image, --video or --prompt."
            )
        from flash_mlx.messages import default_prompt

        return default_prompt(video=not image)
    if prompt == "-":
        prompt = _read_stdin()
    if not prompt.strip():
        raise click.UsageError("The prompt must hold text, and this one is empty.")
    return prompt


def _read_stdin() -> str:
    if sys.stdin is None:
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"A prompt on stdin must be UTF-8 text; {error}.") from error


def notices(model: Model, draft_model: str) -> Iterator[str]:
    """Yield what a user should know about what was loaded, a line each."""
    if model.is_demo:
        own = " with its own drafter" if model.draft_name == "demo" else ""
        yield (
            f"Using the bundled demo model{own}: it is for trying flash-mlx and only knows drawn "
            "scenes. Choose another with --model."
        )
    if draft_model == "auto" and not model.is_demo:
        yield f"Drafter: {model.draft_reason}."


def _print_stream(
    responses: Iterator[GenerationResponse],
    *,
    stream: bool,
    show: Callable[[GenerationResponse], str] | None = None,
) -> tuple[list[GenerationResponse], bool]:
    """Print pieces of text as they come, or as `show` puts them.

    Returns:
        The pieces, and whether the user interrupted them.
    """
    pieces: list[GenerationResponse] = []
    interrupted = False
    try:
        for response in responses:
            pieces.append(response)
            if stream:
                sys.stdout.write(show(response) if show else response.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    finally:  # an error too gets a line of its own
        if stream and pieces:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return pieces, interrupted
