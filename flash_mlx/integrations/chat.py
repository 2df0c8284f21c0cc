"""OpenAI's chat requests and answers as data: what is asked, and what is sent back.

Nothing is ever fetched for a request: pictures and videos come in it, as data URIs.

Source: OpenAI's public reference of chat completions; `timings` has llama.cpp's names.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from flash_mlx.generate import GenerationResponse
from flash_mlx.images import ImageSource
from flash_mlx.messages import Message
from flash_mlx.video import load_video

Role = Literal["system", "user", "assistant"]
ROLES: dict[object, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
# Settings of a request by the name that `stream_generate` has for them.
SETTINGS = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "logit_bias": "logit_bias",
}
WHOLE = ("max_tokens", "top_k", "seed")
# What clients send without meaning anything by it: the only values that change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "store": (False,),
}
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class RequestError(Exception):
    """A request that cannot be served.

    Attributes:
        status: HTTP status.
        code: One word for programs.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        """Say what is wrong."""
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, object]:
        """Return what is sent back."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {"message": str(self), "type": kind, "code": self.code, "param": None},
        }


@dataclass(frozen=True)
class Limits:
    """What a request may hold.

    Attributes:
        max_pixels: Of a picture.
        max_images: Pictures and frames of all messages.
        max_tokens: Of an answer; also what is taken if the request does not say.
    """

    max_pixels: int = 50_000_000
    max_images: int = 16
    max_tokens: int = 2048


@dataclass(frozen=True, eq=False)
class ChatRequest:
    """A request, checked.

    Attributes:
        messages: The conversation.
        settings: For `stream_generate`.
        stream: Whether the answer is sent piece by piece.
        include_usage: Whether a stream ends with a piece that holds the usage.
    """

    messages: tuple[Message, ...]
    settings: Mapping[str, Any]
    stream: bool
    include_usage: bool


def parse_request(body: bytes, model: str, limits: Limits) -> ChatRequest:
    """Read a chat request.

    Args:
        body: JSON.
        model: The name of the model that is served.
        limits: What the request may hold.

    Raises:
        RequestError: It is not JSON, has unknown or impossible parameters, asks for another model,
            names anything that would have to be fetched, or exceeds a limit.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "invalid_json", f"The body must be JSON; {error}.") from error
    if not isinstance(values, dict):
        raise _bad("The body must be a JSON object.")
    values = {name: value for name, value in values.items() if value is not None}
    wanted = values.pop("model", model)
    if wanted != model:
        raise RequestError(404, "model_not_found", f"This server has {model!r}; got {wanted!r}.")
    stream = _flag(values.pop("stream", False), "stream")
    options = values.pop("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise _bad(f"stream_options must hold include_usage only; got {options!r}.")
    messages = _messages(values.pop("messages", None), limits)
    settings: dict[str, Any] = {"max_tokens": limits.max_tokens}
    for name, value in values.items():
        if name in SETTINGS:
            settings[SETTINGS[name]] = _setting(name, value)
        elif name in NEUTRAL and value not in NEUTRAL[name]:
            raise _bad(f"{name} must be {NEUTRAL[name][0]!r} here; got {value!r}.")
        elif name not in NEUTRAL and name not in IGNORED:
            raise _bad(f"The parameter {name!r} is not known; leave it out.")
    if settings["max_tokens"] > limits.max_tokens:
        raise _bad(f"max_tokens must be at most {limits.max_tokens}; got {settings['max_tokens']}.")
    usage = _flag(options.get("include_usage", False), "include_usage")
    return ChatRequest(messages, settings, stream, usage)


def _bad(message: str) -> RequestError:
    return RequestError(400, "invalid_value", message)


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _bad(f"{name} must be true or false; got {value!r}.")
    return value


def _setting(name: str, value: object) -> object:
    """Return a setting of the right type; its range is checked where it is used."""
    setting = SETTINGS[name]
    if setting == "stop":
        return value
    if setting == "logit_bias":
        try:
            biases = {int(token): float(bias) for token, bias in dict(value).items()}  # type: ignore[call-overload]
        except (TypeError, ValueError) as error:
            raise _bad(f"logit_bias must map token ids to numbers; got {value!r}.") from error
        return biases
    kinds = (int,) if setting in WHOLE else (int, float)
    if type(value) not in kinds or not math.isfinite(float(value)):  # type: ignore[arg-type]
        raise _bad(f"{name} must be a {'whole ' * (setting in WHOLE)}number; got {value!r}.")
    return value


def _messages(values: object, limits: Limits) -> tuple[Message, ...]:
    if not isinstance(values, list) or not values:
        raise _bad("messages must be a list with at least one message.")
    messages: list[Message] = []
    room = limits.max_images
    for number, value in enumerate(values):
        if not isinstance(value, dict) or value.get("role") not in ROLES:
            raise _bad(f"messages[{number}] must have a role of {', '.join(map(str, ROLES))}.")
        message = _message(ROLES[value["role"]], value.get("content"), number, limits, room)
        room -= len(message.images)
        messages.append(message)
    if messages[-1].role != "user":
        raise _bad("The last message must be the user's.")
    return tuple(messages)


def _message(role: Role, content: object, number: int, limits: Limits, room: int) -> Message:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _bad(f"The content of messages[{number}] must be text or a list of parts.")
    texts: list[str] = []
    images: list[ImageSource] = []
    for part in parts:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in READERS and role == "user":
            images += READERS[kind](_data(part.get(kind), number), limits, room - len(images))
            if len(images) > room:
                raise _bad(f"A request may hold at most {limits.max_images} pictures and frames.")
        else:
            raise _bad(
                f"A part of messages[{number}] must be text, or of a user's message image_url or "
                f"video_url; got {kind!r}."
            )
    return Message(role, "\n".join(texts), tuple(images))


def _data(value: object, number: int) -> bytes:
    """Return the bytes of a data URI."""
    uri = value.get("url") if isinstance(value, dict) else value
    if not isinstance(uri, str) or not uri.startswith("data:"):
        raise _bad(
            f"A picture in messages[{number}] must be a data URI (data:image/png;base64,...): this "
            "server fetches nothing and opens no files."
        )
    head, _, payload = uri.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it does not say base64")
        return base64.b64decode(payload, validate=True)
    except (ValueError, binascii.Error) as error:
        raise _bad(f"A data URI in messages[{number}] must hold base64; {error}.") from error


def _read_image(content: bytes, limits: Limits, room: int) -> list[ImageSource]:  # noqa: ARG001
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.width * image.height
    except Exception:  # noqa: BLE001  whatever is wrong, `load_image` says it better
        return [content]
    if pixels > limits.max_pixels:
        raise _bad(f"A picture must have at most {limits.max_pixels} pixels; it has {pixels}.")
    return [content]


def _read_video(content: bytes, limits: Limits, room: int) -> list[ImageSource]:  # noqa: ARG001
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        Path(file.name).write_bytes(content)
        try:
            return [*load_video(file.name, max_frames=max(min(room, 8), 1))]
        except ValueError as error:
            raise _bad(str(error).replace(file.name, "The video")) from error


READERS: dict[object, Callable[[bytes, Limits, int], list[ImageSource]]] = {
    "image_url": _read_image,
    "video_url": _read_video,
}


def usage(answer: GenerationResponse) -> dict[str, object]:
    """Return the tokens of prompt and answer; what was not read again and drafts included."""
    stats = answer.stats
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": stats.generation_tokens,
        "total_tokens": answer.prompt_tokens + stats.generation_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.kept_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": stats.accepted,
            "rejected_prediction_tokens": stats.drafted - stats.accepted,
        },
    }


def timings(answer: GenerationResponse) -> dict[str, float]:
    """Return what the answer took [ms], and what drafting brought."""
    stats = answer.stats
    return {
        "prompt_n": answer.prompt_tokens,
        "prompt_ms": 1e3 * stats.prefill_seconds,
        "prompt_per_second": answer.prompt_tps,
        "predicted_n": stats.generation_tokens,
        "predicted_ms": 1e3 * stats.decode_seconds,
        "predicted_per_second": answer.generation_tps,
        "draft_n": stats.drafted,
        "draft_n_accepted": stats.accepted,
        "mean_acceptance_length": stats.mean_acceptance_length,
    }
