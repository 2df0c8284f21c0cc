"""What is said in a conversation, and how a checkpoint writes it.

Each message passes mlx-vlm's template on its own before the checkpoint's joins them, so that
pictures stay with the message they came with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from flash_mlx.images import ImageSource
from flash_mlx.targets import LoadedTarget


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: Who says it.
        text: What is said.
        images: Pictures that come with it, in order.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[ImageSource, ...] = ()


def digest(picture: Image.Image) -> str:
    """Return what tells the content of a picture from that of others."""
    content = hashlib.blake2b(repr((picture.mode, picture.size)).encode(), digest_size=16)
    content.update(picture.tobytes())
    return content.hexdigest()


def write(loaded: LoadedTarget, messages: Sequence[Message]) -> str:
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
    laid_out: list[Any] = []
    try:
        for message in messages:
            laid_out += apply_chat_template(
                loaded.processor,
                config,
                [{"role": message.role, "content": message.text}],
                num_images=len(message.images),
                return_messages=True,
            )
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
