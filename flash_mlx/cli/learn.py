"""`--learn`: collecting what a model is asked, for `flash-mlx train --from-traffic`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flash_mlx.cli.options import above

if TYPE_CHECKING:
    from flash_mlx.loading import Model

Command = TypeVar("Command", bound=Callable[..., Any])


def learn_options(command: Command) -> Command:
    """Options that say whether to collect; the command gets them as `learn`."""

    @wraps(command)
    def gathered(learn: Path | None, learn_limit_mb: float, **given: Any) -> Any:
        if learn is not None:
            _require_folder(learn)  # before the model is loaded: fails soon
        return command(learn=(learn, learn_limit_mb), **given)

    wrapped: Any = gathered
    for option in (
        click.option(
            "--learn-limit-mb",
            type=float,
            default=500,
            show_default=True,
            callback=above(0),
            help="Most that --learn may collect in its folder.",
        ),
        click.option(
            "--learn",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Collect prompts, pictures and answers in DIR, for train --from-traffic. They are "
            "private data: they stay there, readable, until you delete them. Off by default.",
        ),
    ):
        wrapped = option(wrapped)
    made: Command = wrapped
    return made


def _require_folder(folder: Path) -> None:
    """Make the folder of --learn.

    Raises:
        OSError: If it cannot be made or written.
    """
    from flash_mlx.train.traffic import make_folder

    try:
        make_folder(folder)
    except OSError as error:
        raise OSError(
            f"--learn must be a folder that can be written; got {folder} ({error.strerror})."
        ) from error


def observed(model: Model, learn: tuple[Path | None, float]) -> Model:
    """Return the model, which writes down what it is asked if that was wanted.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder, megabytes = learn
    if folder is None:
        return model
    from flash_mlx.train.traffic import TrafficLog, identify

    log = TrafficLog(folder, int(megabytes * 1e6), identify(model.loaded.path))
    return replace(model, observer=log)
