"""From pictures and text to a prompt, and from token ids back to text.

The chat template and the processor are those of the checkpoint. The processor is called directly:
mlx-vlm's own input preparation passes LLaVA's image processor options that it refuses.

Shapes:
    T: prompt rows.    I: images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from flash_mlx.images import ImageSource, load_image
from flash_mlx.messages import (
    Media,
    Message,
    OpenMessage,
    Shown,
    digests_of,
    frames,
    video_ranges,
    write,
)
from flash_mlx.prompt import Prompt
from flash_mlx.targets import LoadedTarget
from flash_mlx.targets.quiet import quiet
from flash_mlx.targets.rows import Inputs, Read
from flash_mlx.video import Frames

__all__ = [
    "Detokenizer",
    "ImageSource",
    "Media",
    "image_spans",
    "load_image",
    "make_chat_prompt",
    "make_prompt",
]

MAX_SIDE_RATIO = 200  # of Qwen's processor; LLaVA's would need gigabytes for such strips
# The attention mask of one sequence says nothing, and would not fit a prompt with an answer; types
# and labels of rows are for training.
NOT_FOR_THE_MODEL = ("input_ids", "attention_mask", "token_type_ids", "labels")
REPLACEMENT = "\ufffd"


def make_prompt(
    loaded: LoadedTarget,
    text: str,
    images: Sequence[Media] = (),
    system: str | None = None,
    *,
    digests: bool = False,
) -> Prompt:
    """Write one user turn, with its images, as the target reads it.

    Args:
        loaded: Target whose template and processor to use.
        text: What the user says. Images come before it, or where the template puts them.
        images: Pictures and videos, in order. Where the family does not read videos, their
            frames are pictures.
        system: System message; None leaves it to the template.
        digests: Whether to tell the images' contents apart (`Prompt.image_digests`).

    Returns:
        The prompt, with the rows of each image in `image_spans`.

    Raises:
        OSError: If a picture is missing.
        ValueError: If a picture is damaged or too thin, the text holds an image placeholder, the
            template refuses it, or the prompt exceeds the context.
    """
    messages = [] if system is None else [Message("system", system)]
    messages.append(Message("user", text, tuple(images)))
    return make_chat_prompt(loaded, messages, digests=digests)


def make_chat_prompt(
    loaded: LoadedTarget, messages: Sequence[Message], *, digests: bool = False
) -> Prompt:
    """Write a conversation as the target reads it, up to where its next answer begins.

    Args:
        loaded: Target whose template and processor to use.
        messages: What was said, in order.
        digests: See `make_prompt`; so are the errors.
    """
    for message in messages:
        _check_text(loaded, message.text)
    native = loaded.family.video_token is not None
    opened = [OpenMessage.of(message, native=native) for message in messages]
    pictures = [each for message in opened for each in message.pictures]
    shown = [each for message in opened for each in message.shown]
    given: Sequence[Shown] = shown if native else pictures
    system = next((each.text for each in messages if each.role == "system"), None)
    _check_images(loaded, len(given), system)
    for number, picture in enumerate(pictures, start=1):
        _check_shape(picture, number)
    tokens, inputs = _process(loaded, write(loaded, opened), given)
    if shown and loaded.family.placed is not None:
        tokens = _expand(loaded, tokens, inputs)
    rows = _rows(loaded, tokens, inputs, given)
    spans = image_spans(
        tokens, loaded.visual_ids, [each for part in rows for each in part], loaded.family.marks
    )
    if shown and loaded.family.prepare is not None:
        inputs = dict(loaded.family.prepare(loaded.config, inputs))
    counts = [len(part) for part in rows] if native else [len(each) for each in map(frames, shown)]
    prompt = Prompt(
        tokens=tokens,
        image_spans=spans,
        inputs=inputs if shown else {},
        image_digests=digests_of(shown, counts) if digests else (),
        videos=video_ranges(shown, counts),
    )
    prompt.require_fits(loaded.target.max_context)
    return prompt


def image_spans(
    tokens: Sequence[int],
    visual_ids: Collection[int],
    rows_per_image: Sequence[int],
    marks: bool = False,
) -> tuple[tuple[int, int], ...]:
    """Find the rows of each image.

    Args:
        tokens: [T] ids with placeholders expanded.
        visual_ids: Ids of visual rows.
        rows_per_image: [I] visual rows of each image.
        marks: Whether other rows may stand between the visual rows of an image, and belong to it.

    Returns:
        [I] half-open row ranges, in order; two images may touch.

    Raises:
        ValueError: If the visual rows are not those of the images, each in one piece.
    """
    spans: list[tuple[int, int]] = []
    visual = [row for row, token in enumerate(tokens) if token in visual_ids]
    if len(visual) == sum(rows_per_image) and all(rows_per_image):
        done = 0
        for rows in rows_per_image:
            start, end = visual[done], visual[done + rows - 1] + 1
            if end - start != rows and not marks:
                break
            spans.append((start, end))
            done += rows
    if len(spans) != len(rows_per_image) or len(visual) != sum(rows_per_image):
        raise ValueError(
            f"The prompt must hold {len(rows_per_image)} images with "
            f"{', '.join(map(str, rows_per_image)) or 'no'} rows, each in one piece; it has "
            f"{len(visual)} visual rows otherwise. The chat template and the processor of this "
            "checkpoint do not fit its model."
        )
    return tuple(spans)


class Detokenizer:
    """Text of a growing list of ids, as far as it is certain.

    A character of several tokens comes out when its last byte has; special tokens do not show. All
    pieces joined are the tokenizer's own text of all ids. (Of bytes that are no UTF-8, the two may
    differ in how many replacement characters stand for them.)
    """

    def __init__(self, processor: Any) -> None:
        """Start with no ids.

        Args:
            processor: A target's, for its `tokenizer`.
        """
        self._tokenizer = processor.tokenizer
        self._ids: list[int] = []  # from the start of the piece before the last one
        self._shown = 0  # of these, ids whose text has been returned

    def add(self, tokens: Iterable[int]) -> str:
        """Return the new text that these ids complete."""
        return "".join(self._add(token) for token in tokens)

    def finish(self) -> str:
        """Return what was held back; bytes of an unfinished character become U+FFFD."""
        text = self._new_text()
        self._ids, self._shown = [], 0
        return text

    def _add(self, token: int) -> str:
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        # Keep the last piece: whether a word starts with a space depends on what precedes it.
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def _new_text(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _check_text(loaded: LoadedTarget, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"The prompt must be valid Unicode; {error}.") from error
    token = loaded.processor.tokenizer.convert_ids_to_tokens(loaded.image_token_id)
    placeholders = {*loaded.family.placeholders, *([token] if token else [])}
    for placeholder in sorted(placeholders):
        if placeholder in text:
            raise ValueError(
                f"The prompt must not contain {placeholder!r}, which stands for a picture in this "
                "model; pass pictures as images and leave it out."
            )


def _check_images(loaded: LoadedTarget, number: int, system: str | None) -> None:
    fewest, most = loaded.family.num_images
    if number < fewest or (most is not None and number > most):
        wanted = f"{fewest}" if fewest == most else f"{fewest} to {most or 'many'}"
        raise ValueError(
            f"A prompt of a {loaded.model_type} model must have {wanted} image(s); got {number}."
        )
    if system is not None and not loaded.family.system:
        raise ValueError(f"A {loaded.model_type} model takes no system message; leave it out.")


def _check_shape(picture: Image.Image, number: int) -> None:
    width, height = picture.size
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise ValueError(
            f"An image's longer side must be at most {MAX_SIDE_RATIO} times its shorter one; image "
            f"{number} is {width} x {height}. Crop it or cut it into pieces."
        )


def _process(
    loaded: LoadedTarget, written: str, shown: Sequence[Shown]
) -> tuple[tuple[int, ...], dict[str, mx.array]]:
    """Return the ids [T] of a written prompt, and the processor's other arrays."""
    options: dict[str, Any] = {}
    tokenizer = loaded.processor.tokenizer
    bos, first = tokenizer.bos_token, tokenizer([""])["input_ids"][0][:1]
    # LLaVA's processor does not take the option, so it is only given where it changes something.
    if bos and written.startswith(bos) and list(first) == [tokenizer.bos_token_id]:
        options["add_special_tokens"] = False  # the template has written it already
    videos = [each for each in shown if isinstance(each, Frames)]
    pictures = [each for each in shown if not isinstance(each, Frames)]
    if pictures:
        options["images"] = pictures
        if loaded.max_pixels is not None:
            options["max_pixels"] = loaded.max_pixels
    if videos:
        options["videos"] = [list(each.pictures) for each in videos]
    if videos and loaded.family.timed:
        options["video_metadata"] = [
            {"frames_indices": each.numbers, "fps": each.rate} for each in videos
        ]
    try:
        with quiet():
            arrays = (
                loaded.processor(text=[written], **options)
                if shown
                else loaded.processor.tokenizer([written], **options)
            )
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
        raise ValueError(f"The checkpoint's processor must take the prompt: {error}") from error
    tokens = tuple(np.array(arrays["input_ids"])[0].tolist())
    inputs = {
        name: mx.array(value)
        for name, value in arrays.items()
        if name not in NOT_FOR_THE_MODEL and isinstance(value, mx.array | np.ndarray | int)
    }
    if videos:
        inputs["video_fps"] = mx.array([each.fps for each in videos])
    return tokens, inputs


def _expand(loaded: LoadedTarget, tokens: tuple[int, ...], inputs: Inputs) -> tuple[int, ...]:
    """Return ids with one for each visual row, where the processor writes one an image."""
    read = Read(loaded.config, inputs, tokens, loaded.image_token_id, loaded.processor)
    rows = iter(loaded.family.rows_per_image(read))
    expanded: list[int] = []
    for token in tokens:
        here = token == loaded.family.placed
        expanded += [loaded.image_token_id] * next(rows, 1) if here else [token]
    return tuple(expanded)


def _rows(
    loaded: LoadedTarget, tokens: tuple[int, ...], inputs: Inputs, shown: Sequence[Shown]
) -> list[tuple[int, ...]]:
    """Return the visual rows of what is shown: one number a picture, one each frame of a video."""
    family = loaded.family
    read = Read(loaded.config, inputs, tokens, loaded.image_token_id, loaded.processor)
    num_videos = sum(isinstance(each, Frames) for each in shown)
    num_pictures = len(shown) - num_videos
    pictures = family.rows_per_image(read) if num_pictures else ()
    videos = family.frame_rows(read) if family.frame_rows is not None and num_videos else ()
    if (len(pictures), len(videos)) != (num_pictures, num_videos):
        raise ValueError(
            f"The processor must return one entry an image; it returned {len(pictures)} for "
            f"{num_pictures}, and {len(videos)} for {num_videos} videos."
        )
    each_picture, each_video = iter(pictures), iter(videos)
    return [
        next(each_video) if isinstance(each, Frames) else (next(each_picture),) for each in shown
    ]
