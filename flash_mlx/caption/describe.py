"""Pictures in, captions out, one after the other.

While the text of a picture is decoded, a thread prepares the next ones. A picture that cannot be
read, and whatever else goes wrong with one, is an error of its own and stops nothing.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_mlx.caption.listing import Item
from flash_mlx.generate import Model, join, stream_generate
from flash_mlx.messages import Media, opened
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import LoadedTarget
from flash_mlx.video import FPS, MAX_FRAMES, VIDEOS, Video

AHEAD = 2  # pictures that are prepared while one is described


@dataclass(frozen=True)
class Caption:
    """What was said about a picture, or why nothing was.

    Attributes:
        path: The picture, as the input names it.
        prompt: What was asked.
        sha256: Of the bytes that were described; None if they could not be read.
        text: The caption; None after an error.
        error: What went wrong; None if nothing did.
        finish_reason: `stop`, or `length` where the text was cut off.
        generation_tokens: Tokens of the caption, a stop token included.
        mean_acceptance_length: Tokens for each pass of the target.
        seconds: From the prompt to the last token [s].
    """

    path: str
    prompt: str
    sha256: str | None = None
    text: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    generation_tokens: int = 0
    mean_acceptance_length: float = 0.0
    seconds: float = 0.0

    def to_row(self) -> dict[str, str | int | float | None]:
        """Return what is written down: the caption and its figures, or the error."""
        start = {"path": self.path, "prompt": self.prompt, "sha256": self.sha256}
        if self.text is None:
            return {**start, "error": self.error}
        return {
            **start,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "generation_tokens": self.generation_tokens,
            "mean_acceptance_length": self.mean_acceptance_length,
            "seconds": self.seconds,
        }


def describe(
    model: Model,
    items: Iterable[Item],
    *,
    system: str | None = None,
    fps: float = FPS,
    max_frames: int = MAX_FRAMES,
    **settings: Any,
) -> Iterator[Caption]:
    """Describe pictures in order; the arguments and errors are those of `Job.run`."""
    # A tokenizer may not encode in one thread while it decodes in another.
    loaded = replace(model.loaded, processor=copy.deepcopy(model.processor))
    prepare = partial(_prepare, loaded, system, partial(Video, fps=fps, max_frames=max_frames))
    left = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        ready: deque[Future[_Ready]] = deque()
        try:
            ready.extend(pool.submit(prepare, e) for e in islice(left, AHEAD))
            while ready:
                picture = ready.popleft().result()
                ready.extend(pool.submit(prepare, e) for e in islice(left, 1))
                yield _describe(model, picture, settings)
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, eq=False)
class _Ready:
    """A picture as the target reads it, or what is wrong with it."""

    item: Item
    sha256: str | None
    prompt: Prompt | None
    error: str | None = None


def _prepare(
    loaded: LoadedTarget,
    system: str | None,
    open_video: Callable[[Path], Video],
    item: Item,
) -> _Ready:
    sha256 = None
    try:
        if item.file is None:
            return _Ready(item, None, None, item.error)
        if not item.file.is_file():
            raise FileNotFoundError(f"A picture must be a file; {item.path} is none.")
        images: list[Media]
        if item.file.suffix.lower() in VIDEOS:
            before = item.file.stat()
            sha256 = hash_file(item.file)
            images = [opened(open_video(item.file), native=loaded.family.video_token is not None)]
            after = item.file.stat()
            if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
                raise ValueError(
                    f"{item.path} must not change while it is read; it did. Try again."
                )
        else:
            content = item.file.read_bytes()  # once: what is described is what `sha256` is of
            sha256 = hashlib.sha256(content).hexdigest()
            images = [content]
        prompt = make_prompt(loaded, item.prompt, images, system)
        # Another thread cannot compute what was only planned in this one.
        mx.eval(*prompt.inputs.values())
    except Exception as error:  # noqa: BLE001  no file may stop the others, whatever is in it
        return _Ready(item, sha256, None, _one_line(error))
    return _Ready(item, sha256, prompt)


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        OSError: If it cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe(model: Model, picture: _Ready, settings: dict[str, Any]) -> Caption:
    item, start = picture.item, time.perf_counter()
    unsaid = Caption(item.path, item.prompt, picture.sha256)
    if picture.prompt is None:
        return replace(unsaid, error=picture.error)
    responses = stream_generate(model, picture.prompt, **settings)  # wrong settings stop the job
    try:
        answer = join(list(responses))
    except Exception as error:  # noqa: BLE001  such as too little memory for this picture
        return replace(unsaid, error=_one_line(error))
    return replace(
        unsaid,
        text=answer.text,
        finish_reason=answer.finish_reason,
        generation_tokens=answer.stats.generation_tokens,
        mean_acceptance_length=answer.stats.mean_acceptance_length,
        seconds=time.perf_counter() - start,
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = isinstance(error, ValueError | OSError) and text
    return text if expected else f"{type(error).__name__}: {text}"
