"""Options for videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flash_mlx.cli.options import above, between

if TYPE_CHECKING:
    from PIL import Image

Command = TypeVar("Command", bound=Callable[..., Any])


def video_options(command: Command) -> Command:
    """How many frames of a video are read."""
    for option in (
        click.option(
            "--max-frames",
            type=int,
            default=8,
            show_default=True,
            callback=between(1, 768),
            help="Most frames to read of a video.",
        ),
        click.option(
            "--fps",
            type=float,
            default=1.0,
            show_default=True,
            callback=above(0),
            help="Frames to read of a second of video.",
        ),
    ):
        command = option(command)
    return command


def load_pictures(
    images: Sequence[str], videos: Sequence[str], *, fps: float, max_frames: int
) -> list[Image.Image]:
    """Return pictures, then the frames of videos, in order."""
    from flash_mlx.images import load_image
    from flash_mlx.video import load_video

    frames = (
        frame for each in videos for frame in load_video(each, fps=fps, max_frames=max_frames)
    )
    return [*map(load_image, images), *frames]
