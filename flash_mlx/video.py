"""Videos as a few pictures: frames at even distances, in order.

Frames are sought, not decoded one after the other, so memory and time do not grow with the length
of the video.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flash_mlx.images import MAX_PIXELS

VIDEOS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".mpeg")  # by suffix
FPS = 1.0
MAX_FRAMES = 8
MOST_FRAMES = 768
FEWEST_OF_PAIRS = 4
FRAME_PIXELS = 768 * 28 * 28  # larger frames are scaled down, as Qwen's own sampler does
# Other formats of FFmpeg are lists of files and addresses, which it would open.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg"
READER = {
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": f"protocol_whitelist;file|format_whitelist;{FORMATS}",
    "OPENCV_FFMPEG_LOGLEVEL": "-8",
}


@dataclass(frozen=True)
class Frames:
    """Frames of one video, in order.

    Attributes:
        pictures: RGB, one or more.
        numbers: Which frames of the file these are, from 0.
        rate: Frames per second of the file.
        total: Frames of the file.
    """

    pictures: tuple[Image.Image, ...]
    numbers: tuple[int, ...]
    rate: float
    total: int

    @property
    def fps(self) -> float:
        """Frames taken of a second."""
        return len(self.numbers) / self.total * self.rate


@dataclass(frozen=True)
class Video:
    """A video file, and how much of it is to be read.

    Attributes:
        source: The file.
        fps: Frames to take of a second.
        max_frames: Most frames to take; of a longer video they stand farther apart.

    Raises:
        ValueError: If a number is out of its range.
    """

    source: str | os.PathLike[str]
    fps: float = FPS
    max_frames: int = MAX_FRAMES

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.fps < math.inf:
            raise ValueError(f"Frames per second must be above 0; got {self.fps}.")
        if not 1 <= self.max_frames <= MOST_FRAMES:
            raise ValueError(
                f"A video must bring 1 to {MOST_FRAMES} frames; got {self.max_frames}."
            )

    def check(self) -> None:
        """Open the file without reading frames; raise what `read` would if it is no video."""
        with self._open() as video:
            self._extent(video)

    def read(self, *, pairs: bool = False) -> Frames:
        """Read the frames.

        Args:
            pairs: Whether to take an even number, at least four if there are as many, the first
                and the last frame among them, as models do that see two frames at once; otherwise
                each frame is the middle one of its share of the time.

        Raises:
            OSError: If the file is missing or cannot be opened.
            ValueError: If it is no video, damaged, cut off or too large.
        """
        with self._open() as video:
            total, rate = self._extent(video)
            numbers = self._pairs(total, rate) if pairs else self._middles(total, rate)
            pictures = tuple(_frame(video, number, self._name) for number in numbers)
        return Frames(pictures, tuple(numbers), rate, total)

    @property
    def _name(self) -> str:
        return os.fspath(self.source)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        path = Path(self.source)
        if not path.is_file():
            raise FileNotFoundError(
                f"A video must be a file; {self._name} is none. Check the path."
            )
        if path.stat().st_size == 0:
            raise ValueError(f"{self._name} must be a video; it is empty (0 bytes).")
        with path.open("rb"), _plain_name(path) as file, _reader(file) as video:
            if video is None:
                raise ValueError(
                    f"{self._name} must be a whole video with pictures ({FORMATS}); it is damaged, "
                    "cut off, holds sound only, or is something else."
                )
            yield video

    def _extent(self, video: Any) -> tuple[int, float]:
        """Return how many frames there are, and how many a second."""
        import cv2

        name = self._name
        total, rate = video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)
        width, height = video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)
        if not (1 <= total < math.inf and 0 < rate < math.inf):
            raise ValueError(
                f"{name} must say how many frames it has, and how many a second; it says "
                f"{total:g} and {rate:g}. Convert it to MP4."
            )
        if not 0 < width * height <= MAX_PIXELS:
            raise ValueError(
                f"{name} must have frames of at most {MAX_PIXELS} pixels; they are "
                f"{width:g} x {height:g}. Scale it down."
            )
        return int(total), float(rate)

    def _middles(self, total: int, rate: float) -> list[int]:
        count = min(max(round(total / rate * self.fps), 1), self.max_frames, total)
        return [int((i + 0.5) * total / count) for i in range(count)]

    def _pairs(self, total: int, rate: float) -> list[int]:
        """Source: Qwen's sampler of frames (`smart_nframes` of qwen-vl-utils)."""
        most = min(self.max_frames, total) // 2 * 2
        count = int(min(max(total / rate * self.fps, FEWEST_OF_PAIRS), most)) // 2 * 2
        return [int(x) for x in np.linspace(0, total - 1, max(count, 1)).round()]


def load_video(
    source: str | os.PathLike[str], *, fps: float = FPS, max_frames: int = MAX_FRAMES
) -> list[Image.Image]:
    """Return frames of a video as pictures, each from the middle of its share of the time.

    Args:
        source: The file.
        fps: Frames to take of a second.
        max_frames: Most frames to take; of a longer video they stand farther apart.

    Returns:
        One RGB image or more.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If it is no video, damaged, cut off or too large, or a setting is out of its
            range.
    """
    return list(Video(source, fps, max_frames).read().pictures)


def _frame(video: Any, number: int, name: str) -> Image.Image:
    import cv2

    video.set(cv2.CAP_PROP_POS_FRAMES, number)
    reached = video.get(cv2.CAP_PROP_POS_FRAMES) == number
    found, pixels = video.read()  # [height, width, 3] uint8: blue, green, red
    if not (reached and found):
        raise ValueError(
            f"{name} must be a whole video; frame {number} cannot be read, so it is damaged or cut "
            "off. Copy it again."
        )
    frame = Image.fromarray(pixels[:, :, ::-1])
    scale = math.sqrt(FRAME_PIXELS / (frame.width * frame.height))
    if scale < 1:
        frame = frame.resize([max(round(side * scale), 1) for side in frame.size])
    return frame


@contextmanager
def _plain_name(path: Path) -> Iterator[str]:
    """Give the file a name that OpenCV takes for a file: absolute, UTF-8, without patterns."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "video")
        link.symlink_to(path.resolve())
        yield str(link)


@contextmanager
def _reader(file: str) -> Iterator[Any | None]:
    """Open a video, without a word on stderr and without anything that it may point to."""
    import cv2

    before = {name: os.environ.get(name) for name in READER}
    level = cv2.utils.logging.getLogLevel()
    os.environ.update(READER)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    video = None
    try:
        video = cv2.VideoCapture(file, cv2.CAP_FFMPEG)
        yield video if video.isOpened() else None
    finally:
        if video is not None:
            video.release()
        cv2.utils.logging.setLogLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
