"""What one contender makes of one prompt, timed.

Shapes:
    A: rows of an answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flash_mlx.decode import Drafter, Round, Target, decode
from flash_mlx.loading import read_by
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats, Phases, clocked
from flash_mlx.targets import LoadedTarget
from flash_mlx.targets.stock import stock_inputs

PLAIN, MLX_VLM = "none", "mlx-vlm"


@dataclass(frozen=True, eq=False)
class Answer:
    """What one contender made of one prompt.

    Attributes:
        tokens: [A] ids.
        prefill_seconds: Time to the first token, vision included [s].
        decode_seconds: Time from the first token to the last [s].
        stats: Counts; empty for mlx-vlm.
        peak_memory_gb: Most memory that MLX used meanwhile, weights included [GB].
    """

    tokens: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    stats: GenerationStats
    peak_memory_gb: float

    @property
    def seconds_per_token(self) -> float:
        """Decoding time per token after the first [s]."""
        return self.decode_seconds / max(1, len(self.tokens) - 1)

    @property
    def seconds(self) -> float:
        """Time of the whole answer [s]."""
        return self.prefill_seconds + self.decode_seconds


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        temperature: Of all contenders; 0 is greedy.
        max_tokens: Most tokens of an answer.
        seed: Of the order in which contenders answer, and of what they draw.
        repeats: How often each prompt is answered by each contender.
        record: Whether to find out, of greedy answers to a few prompts, which drafts are right.
    """

    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    repeats: int = 1
    record: bool = False


def answer(
    loaded: LoadedTarget,
    drafter: Drafter[Any] | None,
    prompt: Prompt,
    settings: Settings,
    seed: int,
) -> Answer:
    """Answer a prompt and take the time.

    Args:
        loaded: The target.
        drafter: Of the contender; None: mlx-vlm's own generation, greedy, from the same arrays.
        prompt: What to answer.
        settings: How.
        seed: Of the random numbers.
    """
    mx.reset_peak_memory()
    if drafter is None:
        return _mlx_vlm_answer(loaded, prompt, settings.max_tokens)
    stats = GenerationStats()
    target = read_by(drafter, loaded).target
    rounds = stats.watch(_decode(loaded, target, drafter, prompt, settings, seed))
    tokens = tuple(token for each in rounds for token in each.tokens)
    return Answer(tokens, stats.prefill_seconds, stats.decode_seconds, stats, _peak_memory_gb())


def clock(
    loaded: LoadedTarget,
    drafter: Drafter[Any],
    prompt: Prompt,
    settings: Settings,
    seed: int,
    phases: Phases,
) -> None:
    """Answer a prompt once more, and add to `phases` where its rounds spend their time.

    Waiting for each phase costs the overlap of host and device, so this answer is not timed.
    """
    target, timed = clocked(read_by(drafter, loaded).target, drafter, phases)
    phases.begun = 0
    stats = GenerationStats(phases=phases)
    for _ in stats.watch(_decode(loaded, target, timed, prompt, settings, seed)):
        pass


def _decode(
    loaded: LoadedTarget,
    target: Target,
    drafter: Drafter[Any],
    prompt: Prompt,
    settings: Settings,
    seed: int,
) -> Iterator[Round]:
    return decode(
        target,
        drafter,
        prompt,
        sampler=Sampler(temperature=settings.temperature),
        key=mx.random.key(seed),
        max_tokens=settings.max_tokens,
        stop_ids=frozenset(loaded.eos_ids),
    )


def _peak_memory_gb() -> float:
    return mx.get_peak_memory() / 1e9


def _mlx_vlm_answer(loaded: LoadedTarget, prompt: Prompt, max_tokens: int) -> Answer:
    """Answer through `mlx_vlm.stream_generate`, greedily, from the same arrays."""
    from mlx_vlm import stream_generate

    inputs = stock_inputs(loaded, prompt)
    start = time.perf_counter()
    times, tokens = [], []
    for response in stream_generate(
        loaded.target.model,
        loaded.processor,
        "",
        max_tokens=max_tokens,
        temperature=0.0,
        **inputs,
    ):
        times.append(time.perf_counter())
        tokens.append(response.token)
    # Its last response only reports how the text ended, with the last id once more.
    tokens, times = tokens[: response.generation_tokens], times[: response.generation_tokens]
    prefill, decoding = times[0] - start, times[-1] - times[0]
    return Answer(tuple(tokens), prefill, decoding, GenerationStats(), _peak_memory_gb())
