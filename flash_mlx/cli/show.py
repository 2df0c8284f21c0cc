"""Options of `generate` that show what drafting does: colours in the text, a picture of latents."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flash_mlx.cli.options import require_writable

if TYPE_CHECKING:
    from PIL.Image import Image

    from flash_mlx.generate import GenerationResponse, Model

Command = TypeVar("Command", bound=Callable[..., Any])


def show_options(command: Command) -> Command:
    """`--show-drafts` and `--show-latents`."""
    for option in (
        click.option(
            "--show-latents",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="PNG",
            help="Draw which parts of a picture each of the drafter's latents reads.",
        ),
        click.option(
            "--show-drafts", is_flag=True, help="Drafted text is green, where stdout has colours."
        ),
    ):
        command = option(command)
    return command


def require_drawable(file: Path, shown: Sequence[str]) -> None:
    """Find out before the model is loaded whether latents can be drawn there.

    Args:
        file: Where to.
        shown: Pictures and videos of the prompt.

    Raises:
        OSError: The file cannot be written.
        UsageError: It is none, or there is nothing to draw on.
    """
    if not shown:
        raise click.UsageError("--show-latents draws on a picture; give --image.")
    require_writable("--show-latents", file)
    if file.exists() and not file.is_file():
        raise click.UsageError(f"--show-latents must name a file; {file} is none.")


def draw(
    file: Path, model: Model, pictures: Sequence[Image], prompt: str, system: str | None
) -> None:
    """Draw what the drafter's latents read of pictures; after a failure an old file stays."""
    from flash_mlx.files import replacing
    from flash_mlx.viz import draw_latents

    with replacing(file) as new:
        draw_latents(model, pictures, prompt, system).save(new, format="PNG")


def has_colours() -> bool:
    """Whether stdout is a terminal whose user has nothing against colours (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def coloured(piece: GenerationResponse) -> str:
    """Return the text with what accepted drafts brought in green."""
    drafted, own = piece.text[: piece.num_drafted], piece.text[piece.num_drafted :]
    return (click.style(drafted, fg="green") if drafted else "") + own
