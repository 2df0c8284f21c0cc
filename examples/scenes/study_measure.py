"""What a trained drafter is worth: it drafts for the target on held-out scenes, in the library's loop.

Every round is clocked, so draft and verification are told apart. What is reported of time is the
bound that follows from them, tau / (C + draft): tau tokens a round, C what a verification costs in
plain passes, draft what the drafts cost in the same unit.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx

from flash_mlx.decode import Drafter, NoDrafter, decode
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats, Phases, clocked
from flash_mlx.targets import LoadedTarget

MAX_TOKENS = 160


def measure(
    loaded: LoadedTarget,
    drafter: Drafter[Any],
    prompts: Mapping[str, Sequence[Prompt]],
    temperatures: Sequence[float] = (0.0, 1.0),
) -> dict[str, dict[str, Any]]:
    """Let the target answer all prompts.

    Args:
        loaded: The target, with the taps that the drafter reads.
        drafter: Drafts.
        prompts: By family.
        temperatures: Of the target.

    Returns:
        By "family t=temperature": `tokens` and `rounds` of each prompt, `draft_ms` and
        `verify_ms` of a round (medians over the prompts).
    """
    results: dict[str, dict[str, Any]] = {}
    for family, asked in prompts.items():
        for temperature in temperatures:
            stats = [_answer(loaded, drafter, p, temperature, i) for i, p in enumerate(asked)]
            results[f"{family} t={temperature:g}"] = {
                "tokens": [each.generation_tokens - 1 for each in stats],
                "rounds": [each.rounds for each in stats],
                "by_position": _by_position(stats),
                "draft_ms": _median_ms(stats, "draft_seconds"),
                "verify_ms": _median_ms(stats, "verify_seconds"),
            }
    return results


def plain_ms(loaded: LoadedTarget, prompts: Sequence[Prompt]) -> float:
    """Milliseconds of a pass of plain decoding, clocked in the same way; the median of prompts."""
    stats = [_answer(loaded, NoDrafter(), prompt, 0.0, 0) for prompt in prompts]
    found = _median_ms(stats, "verify_seconds")
    assert found is not None
    return found


def _answer(
    loaded: LoadedTarget, drafter: Drafter[Any], prompt: Prompt, temperature: float, number: int
) -> GenerationStats:
    phases = Phases()
    stats = GenerationStats(phases=phases)
    target, timed = clocked(loaded.target, drafter, phases)
    rounds = decode(
        target,
        timed,
        prompt,
        sampler=Sampler(temperature=temperature),
        key=mx.random.key(number),
        max_tokens=MAX_TOKENS,
        stop_ids=frozenset(loaded.eos_ids),
    )
    for _ in stats.watch(rounds):
        pass
    return stats


def _by_position(stats: Sequence[GenerationStats]) -> list[float]:
    """Share of all rounds in which the draft of each slot is emitted."""
    together = GenerationStats()
    for each in stats:
        together.outcomes.update(each.outcomes)
    return [round(share, 4) for share in together.acceptance_by_position]


def _median_ms(stats: Sequence[GenerationStats], name: str) -> float | None:
    times = [each.phases.per_round()[name] for each in stats]
    known = [time * 1000 for time in times if time is not None]
    return round(statistics.median(known), 3) if known else None
