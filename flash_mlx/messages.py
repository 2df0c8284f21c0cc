"""What is said in a conversation, and how a checkpoint writes it.

Each message passes mlx-vlm's template on its own before the checkpoint's joins them, so that
pictures stay with the message they came with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from flash_mlx.images import ImageSource, load_image
from flash_mlx.targets import LoadedTarget
from flash_mlx.video import FPS, MAX_FRAMES, VIDEOS, Frames, Video

Media = ImageSource | Video | Frames
Shown = Image.Image | Frames


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: Who says it.
        text: What is said.
        images: Pictures and videos that come with it, in order.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Media, ...] = ()


@dataclass(frozen=True)
class OpenMessage:
    """A message whose pictures and videos have been read.

    Attributes:
        role: Who says it.
        text: What is said.
        shown: What comes with it, in order.
    """

    role: str
    text: str
    shown: tuple[Shown, ...]

    @classmethod
    def of(cls, message: Message, *, native: bool) -> OpenMessage:
        """Read what comes with a message.

        Args:
            message: Any.
            native: Whether the model reads videos as such, and not as pictures.
        """
        shown = tuple(opened(each, native=native) for each in message.images)
        return cls(message.role, message.text, shown)

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """All pictures, frames of videos among them."""
        return tuple(picture for each in self.shown for picture in frames(each))


def default_prompt(*, video: bool) -> str:
    """Return what is asked about a picture or a video of which nothing is said."""
    return f"Describe this {'video' if video else 'image'} in detail."


def as_media(file: Path, *, fps: float = FPS, max_frames: int = MAX_FRAMES) -> Media:
    """Return a file as what its name's ending says: a picture, or a video as `Video` reads it."""
    return Video(file, fps, max_frames) if file.suffix.lower() in VIDEOS else file


def opened(media: Media, *, native: bool) -> Shown:
    """Read a picture or a video; `native` as in `OpenMessage.of`."""
    if isinstance(media, Video):
        return media.read(pairs=native)
    return media if isinstance(media, Frames) else load_image(media)


def frames(shown: Shown) -> tuple[Image.Image, ...]:
    """Return a video's frames, or a picture alone."""
    return shown.pictures if isinstance(shown, Frames) else (shown,)


def digest(picture: Image.Image) -> str:
    """Return what tells the content of a picture from that of others."""
    content = hashlib.blake2b(repr((picture.mode, picture.size)).encode(), digest_size=16)
    content.update(picture.tobytes())
    return content.hexdigest()


def digests_of(shown: Sequence[Shown], counts: Sequence[int]) -> tuple[str, ...]:
    """Return what tells apart the contents of the spans in a prompt.

    Args:
        shown: Pictures and videos, in order.
        counts: Spans of each.
    """
    found: list[str] = []
    for each, count in zip(shown, counts, strict=True):
        whole = "".join(map(digest, frames(each)))
        if isinstance(each, Frames):  # when they are seen matters as well
            whole += f"{each.numbers} {each.rate}"
        found += [
            whole if count == 1 else f"{number} of {count}: {whole}" for number in range(count)
        ]
    return tuple(found)


def video_ranges(shown: Sequence[Shown], counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return which spans of a prompt belong to each video; the arguments are `digests_of`'s."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return tuple(
        (end - count, end)
        for each, count, end in zip(shown, counts, ends, strict=True)
        if isinstance(each, Frames)
    )


def write(loaded: LoadedTarget, messages: Sequence[OpenMessage]) -> str:
    """Return the text of a conversation, up to where its next answer begins.

    Args:
        loaded: Whose template to use.
        messages: What was said, one message or more.

    Raises:
        ValueError: If the template refuses them.
    """
    from jinja2 import TemplateError
    from mlx_vlm.prompt_utils import apply_chat_template

    config = {"model_type": loaded.family.template_as or loaded.model_type}
    native = loaded.family.video_token is not None
    laid_out: list[Any] = []
    try:
        for message in messages:
            shown = message.shown if native else message.pictures
            laid_out += apply_chat_template(
                loaded.processor,
                config,
                [{"role": message.role, "content": message.text}],
                num_images=len(shown),
                return_messages=True,
            )
            if native:
                _mark_videos(laid_out[-1], shown)
        if isinstance(laid_out[-1], str):  # a family that has no template
            if len(laid_out) > 1:
                raise ValueError("there is none for more than a single question.")
            return laid_out[-1]
        return _joined(loaded.processor, laid_out)
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(
            f"The checkpoint's chat template must take the prompt; it says: {error}"
        ) from error


def _joined(processor: Any, laid_out: list[dict[str, Any]]) -> str:
    """Return the conversation that messages, laid out as parts or as strings, make.

    Some templates, such as Mistral's, take parts from users, but only a string from the assistant.
    """
    from mlx_vlm.prompt_utils import get_chat_template

    try:
        return str(get_chat_template(processor, laid_out, add_generation_prompt=True))
    except TypeError:
        as_strings = [
            each | {"content": "".join(part["text"] for part in each["content"])}
            if each["role"] == "assistant" and not isinstance(each["content"], str)
            else each
            for each in laid_out
        ]
        return str(get_chat_template(processor, as_strings, add_generation_prompt=True))


def _mark_videos(laid_out: dict[str, Any], shown: Sequence[Shown]) -> None:
    """Say which of a message's pictures are videos; with videos, the text always comes last."""
    kinds = ["video" if isinstance(each, Frames) else "image" for each in shown]
    if "video" in kinds:
        rest = [part for part in laid_out["content"] if part["type"] != "image"]
        laid_out["content"] = [{"type": kind} for kind in kinds] + rest
