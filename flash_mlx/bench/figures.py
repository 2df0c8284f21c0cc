"""From answers to figures: arithmetic alone, so that each can be checked by hand.

Speed-ups are ratios of times of the same prompt, plain over drafted: above 1 is faster. A prompt
that was answered several times counts once, with the median of its ratios, for its answers do not
tell more about other prompts.

Shapes:
    P: prompts.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flash_mlx.bench.answers import Answer
from flash_mlx.measure import bootstrap_interval
from flash_mlx.stats import GenerationStats


@dataclass(frozen=True)
class Asked:
    """A prompt as a report names it.

    Attributes:
        name: Of the row or the picture; a later turn has its number.
        topic: Of the row; may be empty.
        images: Pictures.
        prompt_tokens: Rows, visual ones included.
        visual_tokens: Rows that hold pictures.
    """

    name: str
    topic: str
    images: int
    prompt_tokens: int
    visual_tokens: int


@dataclass(frozen=True, eq=False)
class Sample:
    """What a contender made of a prompt, beside plain decoding.

    Attributes:
        asked: The prompt.
        ours: The contender's answers, one a repeat.
        plain: Plain decoding's, repeat by repeat.
    """

    asked: Asked
    ours: tuple[Answer, ...]
    plain: tuple[Answer, ...]

    @property
    def pairs(self) -> list[tuple[Answer, Answer]]:
        """(ours, plain) of each repeat."""
        return list(zip(self.ours, self.plain, strict=True))

    @property
    def speedup(self) -> float | None:
        """How many times faster decoding is a token; None where no answer has a second token."""
        timed = [(a, b) for a, b in self.pairs if min(len(a.tokens), len(b.tokens)) > 1]
        if not timed:
            return None
        return statistics.median(b.seconds_per_token / a.seconds_per_token for a, b in timed)

    @property
    def end_to_end(self) -> float:
        """How many times faster an answer is a token, vision and prefill included."""
        return statistics.median(
            (b.seconds / len(b.tokens)) / (a.seconds / len(a.tokens)) for a, b in self.pairs
        )


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return a contender's figures beside plain decoding of the same prompts.

    Args:
        samples: [P], one or more.

    Raises:
        ValueError: If no pair of answers has a second token, which is the first to be timed.
    """
    speedups = [sample.speedup for sample in samples]
    known = [each for each in speedups if each is not None]
    if not known:
        raise ValueError(
            f"Answers must have two tokens or more to be timed; all {len(samples)} have one. "
            "Ask for longer ones."
        )
    low, high = bootstrap_interval(known)
    end_to_end = [sample.end_to_end for sample in samples]
    whole_low, whole_high = bootstrap_interval(end_to_end)
    pairs = [pair for sample in samples for pair in sample.pairs]
    ours = [answer for answer, _ in pairs]
    latencies = [answer.seconds for answer in ours]
    timed = [answer for answer in ours if len(answer.tokens) > 1]
    return {
        "samples": len(samples),
        "repeats": len(samples[0].ours),
        **counts(ours),
        "generation_tps": 1 / statistics.median(answer.seconds_per_token for answer in timed),
        "speedup": statistics.median(known),
        "speedup_low": low,
        "speedup_high": high,
        "speedups": speedups,
        "end_to_end_speedup": statistics.median(end_to_end),
        "end_to_end_low": whole_low,
        "end_to_end_high": whole_high,
        "ttft_seconds": statistics.median(answer.prefill_seconds for answer in ours),
        "ttft_ratio": statistics.median(a.prefill_seconds / b.prefill_seconds for a, b in pairs),
        "latency_p50": float(np.percentile(latencies, 50)),
        "latency_p95": float(np.percentile(latencies, 95)),
        "peak_memory_gb": max(answer.peak_memory_gb for answer in ours),
        "identical": statistics.mean(a.tokens == b.tokens for a, b in pairs),
        "by_topic": _by_topic(samples),
    }


def counts(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return what was said and accepted, in both conventions.

    `mean_acceptance_length` counts the target's own token of each round, `accepted_per_round` does
    not. `outcomes` has [drafted, accepted, rounds], from which any cost curve can be replayed.
    """
    total = GenerationStats()
    for answer in answers:
        total.generation_tokens += len(answer.tokens)
        total.accept_lengths += answer.stats.accept_lengths
        total.outcomes += answer.stats.outcomes
        total.parked += answer.stats.parked
    rounds = total.rounds
    decoded = total.generation_tokens - len(answers)
    return {
        "tokens": total.generation_tokens,
        "rounds": rounds,
        "parked_rounds": total.parked,
        "drafted": total.drafted,
        "accepted": total.accepted,
        "mean_acceptance_length": decoded / rounds if rounds else 1.0,
        "accepted_per_round": total.accepted / rounds if rounds else 0.0,
        "acceptance_rate": total.acceptance_rate,
        "acceptance_by_position": list(total.acceptance_by_position),
        "outcomes": [[*pair, number] for pair, number in sorted(total.outcomes.items())],
    }


def describe(asked: Iterable[Asked]) -> dict[str, Any]:
    """Return how many prompts of which sizes there were."""
    every = list(asked)
    topics = Counter(each.topic for each in every if each.topic)
    return {
        "prompts": [asdict(each) for each in every],
        "pictures": sum(each.images for each in every),
        "text_only": sum(not each.images for each in every),
        "prompt_tokens": statistics.median(each.prompt_tokens for each in every),
        "visual_tokens": statistics.median(each.visual_tokens for each in every),
        "topics": dict(topics),
    }


def _by_topic(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Return a few figures for the samples of each topic; empty if there is but one."""
    topics: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        topics[sample.asked.topic].append(sample)
    if len(topics) < 2:
        return {}
    found = {}
    for topic, some in sorted(topics.items()):
        speedups = [sample.speedup for sample in some]
        known = [each for each in speedups if each is not None]
        count = counts([answer for sample in some for answer in sample.ours])
        kept = ("tokens", "rounds", "accepted", "mean_acceptance_length", "accepted_per_round")
        found[topic] = {
            "samples": len(some),
            "speedup": statistics.median(known) if known else None,
            **{name: count[name] for name in kept},
        }
    return found
