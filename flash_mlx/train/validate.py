"""How good a drafter is: the mean acceptance length that decoding itself reaches."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import mlx.core as mx

from flash_mlx.checkpoint import drafter_of
from flash_mlx.decode import Drafter, Target, decode
from flash_mlx.draft.kinds import DraftModel
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats

BEST_BY = "mean_acceptance_length"

T = TypeVar("T")


def mean_acceptance_length(
    target: Target,
    drafter: Drafter[Any],
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    max_tokens: int,
    stop_ids: Sequence[int],
) -> float:
    """Return the tokens per pass of the target when it answers these prompts.

    Args:
        target: Answers.
        drafter: Drafts.
        prompts: What to answer; number i is drawn with key i.
        temperature: 0 is greedy.
        max_tokens: Most tokens of an answer.
        stop_ids: Ids that end one.
    """
    stats = GenerationStats()
    tokens = 0
    for number, prompt in enumerate(prompts):
        rounds = decode(
            target,
            drafter,
            prompt,
            sampler=Sampler(temperature=temperature),
            key=mx.random.key(number),
            max_tokens=max_tokens,
            stop_ids=frozenset(stop_ids),
        )
        tokens += sum(len(each.tokens) for each in stats.watch(rounds)) - 1
    return tokens / stats.rounds if stats.rounds else 0.0


def validator(
    target: Target,
    prompts: Sequence[Prompt],
    max_tokens: int,
    stop_ids: Sequence[int],
    *,
    trees: bool = True,
) -> Callable[[DraftModel], Mapping[str, float]]:
    """Return what measures a model on prompts: greedily (`BEST_BY`) and at temperature 1.

    Args:
        target: Answers, and hands out what the drafter reads.
        prompts: What to answer.
        max_tokens: Most tokens of an answer.
        stop_ids: Ids that end one.
        trees: Whether the target takes trees.
    """

    def validate(model: DraftModel) -> Mapping[str, float]:
        drafter = drafter_of(model, target, trees=trees)
        return {
            name: mean_acceptance_length(
                target,
                drafter,
                prompts,
                temperature=temperature,
                max_tokens=max_tokens,
                stop_ids=stop_ids,
            )
            for name, temperature in ((BEST_BY, 0.0), (f"{BEST_BY}_t1", 1.0))
        }

    return validate


def expected_acceptance(length: float, block_size: int) -> float:
    """Return the chance a that a draft is accepted if those before it are, alike for all slots.

    Of a block of k drafts, a + a^2 + ... + a^k are then accepted, which is the length but for the
    target's own token.

    Args:
        length: Mean acceptance length, in which each round drafted a whole block.
        block_size: k.
    """
    low, high = 0.01, 0.99
    for _ in range(20):
        middle = (low + high) / 2
        accepted = sum(middle**slot for slot in range(1, block_size + 1))
        low, high = (middle, high) if accepted < length - 1 else (low, middle)
    return round(low, 3)


def hold_out(
    items: Sequence[T], group_of: Callable[[T], object], most: int, seed: int
) -> tuple[list[T], list[T]]:
    """Split items so that a group (a picture) is on one side.

    Args:
        items: To split.
        group_of: Tells the group of an item.
        most: Most groups to hold out; a tenth of them are, at least one.
        seed: Of which ones.

    Returns:
        Items to train on, and those held out: none if there is only one group.
    """
    groups = list(dict.fromkeys(group_of(item) for item in items))
    count = min(most, max(1, len(groups) // 10)) if len(groups) > 1 else 0
    chosen = set(random.Random(seed).sample(groups, count))  # noqa: S311  nothing secret
    kept = [item for item in items if group_of(item) not in chosen]
    return kept, [item for item in items if group_of(item) in chosen]
