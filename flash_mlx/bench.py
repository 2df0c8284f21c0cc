"""The honest harness: drafters against plain decoding, in one process, on the same prompts.

For each prompt every contender answers once, in an order that rotates from prompt to prompt, so
that a drift of the machine meets all of them. Speed-ups are ratios of the same prompt's times. The
plain baseline stands beside `mlx_vlm.stream_generate` on the same model in memory, so that nobody
need believe that it is a good one.

Shapes:
    T: prompt rows.    A: rows of an answer.    V: vocabulary.    m: rows of a pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from flash_mlx.decode import Drafter, NoDrafter, Round, Target, decode
from flash_mlx.loading import read_by
from flash_mlx.measure import bootstrap_interval, first_difference, mean_entropy, read_answer
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats, Phases, clocked
from flash_mlx.targets import LoadedTarget
from flash_mlx.targets.stock import stock_inputs

PLAIN, MLX_VLM = "none", "mlx-vlm"
TIMED_PROMPTS = 5  # prompts of the run that splits a round's time into phases


@dataclass(frozen=True, eq=False)
class Answer:
    """What one contender made of one prompt.

    Attributes:
        tokens: Its ids.
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
        seed: Prompt i is answered with `seed + i`.
    """

    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0


def run(
    loaded: LoadedTarget,
    drafters: Mapping[str, Drafter[Any]],
    prompts: Sequence[Prompt],
    settings: Settings,
    progress: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Let all contenders answer all prompts.

    Plain decoding always runs, and mlx-vlm's own generation if greedy.

    Args:
        loaded: The target.
        drafters: Name to drafter.
        prompts: What to answer; the first one is also the warm-up.
        settings: How to measure.
        progress: Told of each prompt done, the warm-up included.

    Returns:
        One row a contender, in the format of `bench --json`; the plain one first, with the entropy
        of the target's text besides. A contender that fails has a row with `error` and no figures;
        if plain decoding fails, that is all of them.

    Raises:
        ValueError: If no answer is long enough to be timed.
    """
    contenders: dict[str, Drafter[Any] | None] = {PLAIN: NoDrafter(), **drafters}
    if settings.temperature == 0:
        contenders[MLX_VLM] = None
    answers: dict[str, list[Answer]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    names = list(contenders)
    for place, prompt in enumerate([prompts[0], *prompts]):
        shift = place % len(names)
        for name in names[shift:] + names[:shift]:
            if name in errors:
                continue
            try:
                answer = _answer(loaded, contenders[name], prompt, settings, max(0, place - 1))
            except (ValueError, RuntimeError) as error:
                errors[name] = f"{type(error).__name__}: {error}"
                continue
            if place:
                answers[name].append(answer)
        progress(1)
    rows = []
    for name, drafter in contenders.items():
        row: dict[str, Any] = {"drafter": name, "temperature": settings.temperature}
        row["error"] = errors.get(name, errors.get(PLAIN))
        if row["error"] is None:
            row |= _compare(loaded, prompts, answers[name], answers[PLAIN])
            row |= _phases(loaded, drafter, prompts[:TIMED_PROMPTS], settings)
        if name == PLAIN and PLAIN not in errors:
            row["target_entropy"] = mean_entropy(
                loaded.target, [(p, a.tokens) for p, a in zip(prompts, answers[name], strict=True)]
            )
        rows.append(row)
    return rows


def _answer(
    loaded: LoadedTarget,
    drafter: Drafter[Any] | None,
    prompt: Prompt,
    settings: Settings,
    index: int,
) -> Answer:
    mx.reset_peak_memory()
    if drafter is None:
        return _mlx_vlm_answer(loaded, prompt, settings.max_tokens)
    stats = GenerationStats()
    rounds = stats.watch(
        _decode(loaded, read_by(drafter, loaded).target, drafter, prompt, settings, index)
    )
    tokens = tuple(token for each in rounds for token in each.tokens)
    return Answer(tokens, stats.prefill_seconds, stats.decode_seconds, stats, _peak_memory_gb())


def _decode(
    loaded: LoadedTarget,
    target: Target,
    drafter: Drafter[Any],
    prompt: Prompt,
    settings: Settings,
    index: int,
) -> Iterator[Round]:
    return decode(
        target,
        drafter,
        prompt,
        sampler=Sampler(temperature=settings.temperature),
        key=mx.random.key(settings.seed + index),
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


def _compare(
    loaded: LoadedTarget, prompts: Sequence[Prompt], ours: list[Answer], plain: list[Answer]
) -> dict[str, Any]:
    """Return a contender's figures beside plain decoding of the same prompts.

    Raises:
        ValueError: If no pair of answers has a second token, which is the first to be timed.
    """
    pairs = list(zip(ours, plain, strict=True))
    timed = [(a, b) for a, b in pairs if min(len(a.tokens), len(b.tokens)) > 1]
    if not timed:
        raise ValueError(
            f"Answers must have two tokens or more to be timed; all {len(pairs)} have one. "
            "Ask for longer ones."
        )
    speedups = [b.seconds_per_token / a.seconds_per_token for a, b in timed]
    low, high = bootstrap_interval(speedups)
    per_token = [(b.seconds / len(b.tokens)) / (a.seconds / len(a.tokens)) for a, b in pairs]
    total = GenerationStats()
    for answer in ours:
        total.generation_tokens += len(answer.tokens)
        total.accept_lengths += answer.stats.accept_lengths
        total.outcomes += answer.stats.outcomes
    rounds = total.rounds
    latencies = sorted(answer.seconds for answer in ours)
    return {
        "samples": len(ours),
        "tokens": total.generation_tokens,
        "generation_tps": 1 / statistics.median(a.seconds_per_token for a, _ in timed),
        "speedup": statistics.median(speedups),
        "speedup_low": low,
        "speedup_high": high,
        "end_to_end_speedup": statistics.median(per_token),
        "ttft_ratio": statistics.median(a.prefill_seconds / b.prefill_seconds for a, b in pairs),
        "latency_p50": float(np.percentile(latencies, 50)),
        "latency_p95": float(np.percentile(latencies, 95)),
        "mean_acceptance_length": (
            (total.generation_tokens - len(ours)) / rounds if rounds else 1.0
        ),
        "accepted_per_round": total.accepted / rounds if rounds else 0.0,
        "acceptance_by_position": list(total.acceptance_by_position),
        "peak_memory_gb": max(answer.peak_memory_gb for answer in ours),
        "identical": statistics.mean(a.tokens == b.tokens for a, b in pairs),
        "first_divergence": _first_divergence(loaded, prompts, pairs),
    }


def _first_divergence(
    loaded: LoadedTarget, prompts: Sequence[Prompt], pairs: list[tuple[Answer, Answer]]
) -> dict[str, Any] | None:
    """Return where ids first differ, and how close the target's logits of the two ids are."""
    for index, (ours, plain) in enumerate(pairs):
        if ours.tokens == plain.tokens:
            continue
        place = first_difference(ours.tokens, plain.tokens)
        if place == min(len(ours.tokens), len(plain.tokens)):
            return {"prompt": index, "position": place, "tokens": [], "logit_gap": None}
        ids = [ours.tokens[place], plain.tokens[place]]
        logits = read_answer(loaded.target, prompts[index], plain.tokens).logits[place]
        gap = (logits[ids[0]] - logits[ids[1]]).abs().item()
        return {"prompt": index, "position": place, "tokens": ids, "logit_gap": gap}
    return None


def _phases(
    loaded: LoadedTarget,
    drafter: Drafter[Any] | None,
    prompts: Sequence[Prompt],
    settings: Settings,
) -> dict[str, float | None]:
    """Return seconds per round spent drafting, verifying and on the host, in a run of their own.

    None for mlx-vlm, whose rounds are its own affair.
    """
    phases = Phases()
    for index, prompt in enumerate(prompts if drafter is not None else ()):
        target, timed = clocked(loaded.target, drafter or NoDrafter(), phases)
        phases.begun = 0
        stats = GenerationStats(phases=phases)
        for _ in stats.watch(_decode(loaded, target, timed, prompt, settings, index)):
            pass
    return phases.per_round()
