"""Text in, text out: load a target with its drafter, and let it answer about pictures.

    model = load("path/to/target", draft="path/to/drafter")
    for response in stream_generate(model, "What is this?", image="cat.jpg"):
        print(response.text, end="", flush=True)

The text is the target's own, with or without a drafter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import mlx.core as mx
from PIL import Image

from flash_mlx.batch import Seat
from flash_mlx.decode import NoDrafter, Target, decode
from flash_mlx.draft import AdaptiveDrafter
from flash_mlx.loading import Model, load, untapped, with_drafter
from flash_mlx.penalties import CONTEXT_SIZE, make_penalties
from flash_mlx.processed import LogitsProcessor, processed
from flash_mlx.processing import Media, make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler, make_sampler
from flash_mlx.stats import GenerationStats, Phases, clocked
from flash_mlx.store import Reading, TextStore
from flash_mlx.transcript import Transcript, check_stop_strings, hidden_ids
from flash_mlx.video import Frames, Video

__all__ = [
    "GenerationResponse",
    "Model",
    "generate",
    "join",
    "load",
    "make_sampler",
    "stream_generate",
    "with_drafter",
]

DEFAULT_MAX_TOKENS = 2048
CLOCKED = 16  # every so many rounds one is clocked, which costs it the overlap with the host

Finish = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class GenerationResponse:
    """A piece of the answer, and what it took so far.

    Attributes:
        text: New text; the whole text from `generate`.
        token_ids: New ids, a stop token included; all ids from `generate`.
        finish_reason: `stop` after a stop token or a stop string, `length` where the budget or the
            context ended; None before the end.
        prompt_tokens: Rows of the prompt, visual tokens included.
        visual_tokens: Rows that hold images.
        latents: Rows that the drafter reads in their place.
        stats: Counts and times so far; one object for the whole answer.
        peak_memory: Most memory that MLX has used in this process [GB].
        num_drafted: Of `text`, characters at its start that accepted drafts brought; 0 from
            `generate`.
        kept_tokens: Rows of the prompt that a store had, so they were not read again.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Finish | None
    prompt_tokens: int
    visual_tokens: int
    latents: int
    stats: GenerationStats
    peak_memory: float
    num_drafted: int = 0
    kept_tokens: int = 0

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second."""
        seconds = self.stats.prefill_seconds
        return self.prompt_tokens / seconds if seconds > 0 else 0.0

    @property
    def generation_tps(self) -> float:
        """Generated tokens per second of decoding, the prefill's own token excluded."""
        return self.stats.generation_tps


def stream_generate(
    model: Model,
    prompt: str | Prompt,
    image: Media | Sequence[Media] | None = None,
    *,
    system: str | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    repetition_context_size: int = CONTEXT_SIZE,
    presence_context_size: int = CONTEXT_SIZE,
    frequency_context_size: int = CONTEXT_SIZE,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    store: TextStore | None = None,
    seat: Seat | None = None,
) -> Iterator[GenerationResponse]:
    """Answer piece by piece, one for each pass of the target.

    Args:
        model: From `load`.
        prompt: What the user says; or a prompt from `make_prompt`, which holds all else already.
        image: One picture or several: files, their bytes, or PIL images; and videos (`Video`).
        system: A message before the conversation.
        max_tokens: Most tokens to generate.
        temperature: 0 takes the most likely token. None, here and below: what the checkpoint's
            `generation_config.json` says, else 0, and all tokens kept.
        top_p: Keep the most likely tokens up to this total probability.
        top_k: Keep that many of the most likely tokens; 0 keeps all.
        min_p: Keep tokens at least this share as likely as the most likely one; None keeps all.
        repetition_penalty: Above 1, tokens said lately become less likely; None, here and below:
            no penalty, whatever the checkpoint says, as in mlx-vlm. See `Penalties`.
        presence_penalty: Taken off the logits of tokens said lately.
        frequency_penalty: Taken off once for each time that they were said.
        logit_bias: Token id to what is added to its logit; `-inf` bans the token.
        logits_processors: Called in order as `logits = f(tokens, logits)`, as in mlx-lm, after the
            penalties, for each token and each draft of it. See `LogitsProcessor`.
        repetition_context_size: Tokens that "lately" means, the prompt's last one included.
        presence_context_size: Likewise.
        frequency_context_size: Likewise.
        stop: Strings that end the text, which is cut before them; the name of a special token is
            that token.
        seed: Of the random numbers; the same seed gives the same text.
        store: Keeps what is read, so that a later prompt that begins alike is not read again.
            Not used with a seat.
        seat: This text's place among others that are decoded at the same time; see `batch`.

    Returns:
        New text and ids, piece by piece; the last piece has a `finish_reason`.

    Raises:
        OSError: An image cannot be opened.
        ValueError: A setting is out of its range, an image is damaged, the prompt is longer than
            the context, or a ready prompt comes with an image or a system message.
    """
    require_whole("The number of tokens to generate", max_tokens, 1)
    require_whole("The seed", seed, 0)
    strings = check_stop_strings(stop)
    defaults = model.loaded.generation_defaults
    sampler = make_sampler(defaults, temperature, top_p, top_k, min_p)
    penalties = make_penalties(
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
        repetition_context_size=repetition_context_size,
        presence_context_size=presence_context_size,
        frequency_context_size=frequency_context_size,
    )
    process = partial(processed, penalties=penalties, processors=logits_processors or ())
    process(model.target)  # refuses what does not fit before anything is read
    if isinstance(prompt, str):
        pictures, digests = as_pictures(image), store is not None
        prompt = make_prompt(model.loaded, prompt, pictures, system, digests=digests)
    elif image is not None or system is not None:
        raise ValueError("A ready prompt must hold its images and its system message already.")
    drafter = NoDrafter() if model.drafter is None else model.drafter
    if seat is not None or untapped(model.loaded).target.family.prefix:
        store = None  # a seat is of one text; prompts with a prefix are read whole, never in parts
    reading = Reading(store, model.target if seat is None else seat, drafter, prompt)
    return _respond(
        model, reading, process, sampler, max_tokens=max_tokens, stop=strings, seed=seed, seat=seat
    )


def generate(
    model: Model,
    prompt: str | Prompt,
    image: Media | Sequence[Media] | None = None,
    **settings: Any,
) -> GenerationResponse:
    """Answer at once; the arguments and errors are those of `stream_generate`.

    Returns:
        The whole answer.
    """
    return join(list(stream_generate(model, prompt, image, **settings)))


def join(responses: Sequence[GenerationResponse]) -> GenerationResponse:
    """Put the pieces of an answer together.

    Args:
        responses: One or more, in order, from one `stream_generate`.

    Returns:
        All their text and ids, with the figures of the last.
    """
    return replace(
        responses[-1],
        text="".join(response.text for response in responses),
        token_ids=tuple(token for response in responses for token in response.token_ids),
    )


def require_whole(name: str, value: object, least: int) -> None:
    """Require now what would otherwise be refused only when the text begins."""
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}.")


def as_pictures(image: Media | Sequence[Media] | None) -> Sequence[Media]:
    """Return no picture, one or several as a list."""
    if image is None:
        return ()
    single = isinstance(image, str | bytes | os.PathLike | Image.Image | Video | Frames)
    return [cast(Media, image)] if single else cast(Sequence[Media], image)


def _respond(
    model: Model,
    reading: Reading,
    process: Callable[[Target], Target],
    sampler: Sampler,
    *,
    max_tokens: int,
    stop: Sequence[str],
    seed: int,
    seat: Seat | None,
) -> Iterator[GenerationResponse]:
    prompt, phases = reading.prompt, Phases(CLOCKED)
    target, drafter = process(reading.target), reading.drafter
    if model.drafter is not None and seat is None:
        target, drafter = clocked(target, drafter, phases)
    stop_ids = frozenset(model.loaded.eos_ids) | hidden_ids(model.processor, stop)
    stats = GenerationStats(phases=phases)
    transcript = Transcript(model.processor, stop_ids, stop)
    latents = model.num_latents(prompt)

    def response(
        text: str,
        tokens: tuple[int, ...] = (),
        finish_reason: Finish | None = None,
        num_drafted: int = 0,
    ) -> GenerationResponse:
        return GenerationResponse(
            text=text,
            token_ids=tokens,
            finish_reason=finish_reason,
            prompt_tokens=len(prompt),
            visual_tokens=prompt.num_visual_tokens,
            latents=latents,
            stats=stats,
            peak_memory=mx.get_peak_memory() / 1e9,
            num_drafted=num_drafted,
            kept_tokens=reading.num_kept,
        )

    if isinstance(model.drafter, AdaptiveDrafter):  # measured now, if at all: before the clocks
        model.drafter.costs(len(prompt), greedy=sampler.greedy)
    rounds = (decode if seat is None else seat.decode)(
        target,
        drafter,
        prompt,
        sampler=sampler,
        key=mx.random.key(seed),
        max_tokens=max_tokens,
        stop_ids=stop_ids,
    )
    said: list[int] = []
    try:
        for each in stats.watch(transcript.watch(rounds)):
            said += each.tokens
            yield response(transcript.take(), each.tokens, num_drafted=transcript.num_drafted)
    finally:
        reading.close()
        if model.observer is not None:
            model.observer(prompt, tuple(said))
    rest = transcript.finish()
    yield response(rest, finish_reason="stop" if transcript.stopped else "length")
