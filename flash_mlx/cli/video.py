"""Options for videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flash_mlx.cli.options import ListOptions, above, between, spread

if TYPE_CHECKING:
    from PIL import Image

    from flash_mlx.video import Video

ORDER = "flash_mlx.order"  # in a context's `meta`: names of options, one for each value

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


class MediaOptions(ListOptions):
    """A command that shows pictures and videos in the order of its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the order, which click does not keep between different options."""
        _, _, order = self.make_parser(ctx).parse_args(spread(args, self.lists))
        ctx.meta[ORDER] = [each.name for each in order if f"--{each.name}" in self.lists]
        return super().parse_args(ctx, args)


def open_media(
    context: click.Context,
    images: Sequence[str],
    videos: Sequence[str],
    *,
    fps: float,
    max_frames: int,
) -> list[Image.Image | Video]:
    """Return pictures, and videos that were found to be some, in the order of the options."""
    from flash_mlx.images import load_image
    from flash_mlx.video import Video

    media: list[Image.Image | Video] = []
    left = {"image": iter(images), "video": iter(videos)}
    for option in context.meta[ORDER]:
        file = next(left[option])
        if option == "video":
            video = Video(file, fps, max_frames)
            video.check()
            media.append(video)
        else:
            media.append(load_image(file))
    return media


def frames_of(media: Sequence[Image.Image | Video]) -> list[Image.Image]:
    """Return pictures, and the frames of videos as such, in order."""
    from flash_mlx.video import Video

    parts = (each.read().pictures if isinstance(each, Video) else (each,) for each in media)
    return [picture for part in parts for picture in part]
