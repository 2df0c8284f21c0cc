"""Pictures in, captions out: one after the other, or several texts decoded together.

While texts are decoded, a thread prepares the next pictures: it reads, decodes and scales them. A
picture that cannot be read, and whatever else goes wrong with one, is an error of its own and stops
nothing.

The target's vision tower does not run ahead. On one device it would take its time from the passes
of the text under way, which its rounds would wait for; all that it could fill is the device's pause
between two texts, while the host writes a row and plans the next pass: for the demo, 12 of 740 ms a
picture on a busy core.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from flash_mlx.batch import Batch, Seat
from flash_mlx.caption.listing import Item
from flash_mlx.generate import (
    GenerationResponse,
    Model,
    join,
    make_sampler,
    require_whole,
    stream_generate,
)
from flash_mlx.messages import Media, opened
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import LoadedTarget
from flash_mlx.throughput import best_together, together
from flash_mlx.video import FPS, MAX_FRAMES, VIDEOS, Video

AHEAD = 2  # pictures that are prepared while others are described
WAITING = 2  # batches of texts under way, or ended and waiting for those before them
FEWEST = 4  # batches of them, for which it is worth measuring what batches bring

BatchSize = int | Literal["auto"]


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
        seconds: From the prompt to the last token, other texts' shares of that time included [s].
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
    items: Sequence[Item],
    *,
    system: str | None = None,
    fps: float = FPS,
    max_frames: int = MAX_FRAMES,
    batch_size: BatchSize = "auto",
    note: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Iterator[tuple[Item, Caption]]:
    """Describe pictures in order; arguments and errors as for `Job.run`."""
    # A tokenizer may not encode in one thread while it decodes in another.
    loaded = replace(model.loaded, processor=copy.deepcopy(model.processor))
    prepare = partial(_prepare, loaded, system, partial(Video, fps=fps, max_frames=max_frames))
    seed, greedy = settings.pop("seed", 0), _is_greedy(model, settings)
    require_whole("The seed", seed, 0)
    how = None if batch_size == "auto" else together(model, batch_size, greedy=greedy)
    active: list[tuple[_Text, list[Caption]]] = []
    line: deque[tuple[Item, list[Caption]]] = deque()  # in order; a caption once it has ended
    with closing(_prepared(prepare, items)) as pictures:
        more = True
        while more or line:
            size = 1 if how is None else how.size
            while more and len(active) < size and len(line) < WAITING * size:
                picture = next(pictures, None)
                if picture is None:
                    more = False
                    break
                line.append((picture.item, []))
                if picture.prompt is None:
                    line[-1][1].append(picture.caption())
                    continue
                if how is None:
                    most, rows = len(items) // FEWEST, len(picture.prompt)
                    how = best_together(model, rows, most, greedy=greedy)
                if not active:
                    note(how.reason)
                    batch, size = how.batch(), how.size
                own = {**settings, "seed": picture.seed(seed)}
                active.append((_Text(how.model, model, picture, own, batch), line[-1][1]))
            for each in tuple(active):
                caption = each[0].go_on()
                if caption is not None:
                    each[1].append(caption)
                    active.remove(each)
            while line and line[0][1]:
                item, found = line.popleft()
                yield item, found[0]


def _prepared(
    prepare: Callable[[Item], _Ready], items: Sequence[Item]
) -> Generator[_Ready, None, None]:
    """Yield pictures in order; a thread prepares the next ones meanwhile."""
    left, ready = iter(items), deque[Future[_Ready]]()
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        try:
            ready.extend(pool.submit(prepare, each) for each in islice(left, AHEAD))
            while ready:
                picture = ready.popleft().result()
                ready.extend(pool.submit(prepare, each) for each in islice(left, 1))
                yield picture
        finally:
            pool.shutdown(cancel_futures=True)


def _is_greedy(model: Model, settings: Mapping[str, Any]) -> bool:
    """Return whether the texts are; without a setting, what the checkpoint says."""
    drawn = [settings.get(name) for name in ("temperature", "top_p", "top_k", "min_p")]
    return make_sampler(model.loaded.generation_defaults, *drawn).greedy


@dataclass(frozen=True, eq=False)
class _Ready:
    """A picture as the target reads it, or what is wrong with it."""

    item: Item
    sha256: str | None
    prompt: Prompt | None
    error: str | None = None

    def caption(self, error: str | None = None) -> Caption:
        """Return what is written down if there is no text."""
        item = self.item
        return Caption(item.path, item.prompt, self.sha256, error=error or self.error)

    def seed(self, seed: int) -> int:
        """Return the seed of this picture's text, which no other picture and no order changes."""
        what = json.dumps([seed, self.sha256, self.item.prompt])
        return int(hashlib.sha256(what.encode()).hexdigest()[:15], 16)


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


class _Text:
    """The text of a picture, under way."""

    def __init__(
        self,
        model: Model,
        alone: Model,
        picture: _Ready,
        settings: dict[str, Any],
        batch: Batch | None,
    ) -> None:
        """Begin; wrong settings are raised here, and stop the job.

        Args:
            model: As it drafts in the batch.
            alone: The model as it drafts for one text.
            picture: What to describe.
            settings: For `stream_generate`.
            batch: Texts that are decoded with this one; None: none are.
        """
        self._alone, self._picture, self._settings = alone, picture, settings
        self._begin(model, None if batch is None else batch.seat())

    def _begin(self, model: Model, seat: Seat | None) -> None:
        prompt: Any = self._picture.prompt
        self._together, self._start = seat is not None, time.perf_counter()
        self._pieces: list[GenerationResponse] = []
        self._responses = stream_generate(model, prompt, seat=seat, **self._settings)

    def go_on(self) -> Caption | None:
        """Decode a piece; a text alone is decoded to its end. Returns the caption at the end."""
        try:
            piece = next(self._responses, None)
            if piece is not None and self._together:
                self._pieces.append(piece)
                return None
            rest = [] if piece is None else [piece, *self._responses]
            answer = join(self._pieces + rest)
        except Exception as error:  # noqa: BLE001  such as too little memory for this picture
            if not self._together:
                return self._picture.caption(_one_line(error))
            self._begin(self._alone, None)  # the fault may be of all texts together: again, alone
            return None
        return replace(
            self._picture.caption(),
            text=answer.text,
            finish_reason=answer.finish_reason,
            generation_tokens=answer.stats.generation_tokens,
            mean_acceptance_length=answer.stats.mean_acceptance_length,
            seconds=time.perf_counter() - self._start,
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = isinstance(error, ValueError | OSError) and text
    return text if expected else f"{type(error).__name__}: {text}"
