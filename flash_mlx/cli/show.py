"""Options of `generate` that show what drafting does: colours in the text, a picture of latents."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from flash_mlx.generate import GenerationResponse

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


def has_colours() -> bool:
    """Whether stdout is a terminal whose user has nothing against colours (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def coloured(piece: GenerationResponse) -> str:
    """Return the text with what accepted drafts brought in green."""
    drafted, own = piece.text[: piece.num_drafted], piece.text[piece.num_drafted :]
    return (click.style(drafted, fg="green") if drafted else "") + own
