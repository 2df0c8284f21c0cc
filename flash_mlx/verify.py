"""Is the text of this target, with this drafter and these settings, on this machine, its own?

Temperature 0: each answer is decoded plainly and with the drafter, and the ids must be the same.
Where they differ, the drafted text is read one row at a time, which says at each of its places what
plain decoding would have said. A place may differ for one reason only: the two logits are closer
there than a pass over several rows differs from a pass over one. Such a near tie is told, and does
no harm. Any other difference is a failure.

Above temperature 0: two tokens are drawn many times, where it is least certain that the likeliest
ones come, and must have the law of plain sampling (`joint_law`).

Shapes:
    A: rows of an answer.    V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from flash_mlx.decode import Drafter, NoDrafter, Target, decode
from flash_mlx.draft.adaptive import unpaced
from flash_mlx.joint_law import LawTest, check_law
from flash_mlx.measure import first_difference, read_answer
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets.selftest import TOLERANCE, TOLERANCE_16_BIT


@dataclass(frozen=True)
class Divergence:
    """A place where the drafted text is not what plain decoding says.

    Attributes:
        prompt: Index.
        position: Tokens of the answer before it.
        tokens: The drafted id and the plain one; one of them alone if the other text has ended.
        logit_gap: How far apart their logits are in a pass over one row; None if a text has ended.
        pass_gap: How much a pass over several rows may change such a gap, as measured on this text.
        near_tie: Whether that explains it.
    """

    prompt: int
    position: int
    tokens: tuple[int, ...]
    logit_gap: float | None
    pass_gap: float
    near_tie: bool


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        greedy_identical: Whether all ids were the same; None if that was not asked for.
        prompts: Number of answers compared.
        tokens: Tokens compared.
        drafted: Drafts that the target read meanwhile.
        accepted: Drafts that were emitted.
        divergences: Places where ids differ.
        near_ties: How many of these are explained.
        total_variation: Distance of draws and law, of the test that came closest to failing; None
            without one.
        noise_floor: What chance explains there.
        laws: All tests of laws.
        passed: Whether nothing is left unexplained.
    """

    greedy_identical: bool | None
    prompts: int
    tokens: int
    drafted: int
    accepted: int
    divergences: tuple[Divergence, ...]
    near_ties: int
    total_variation: float | None
    noise_floor: float | None
    laws: tuple[LawTest, ...]
    passed: bool


@dataclass(frozen=True)
class Settings:
    """What is tried.

    Attributes:
        temperatures: 0 compares ids; each other one tests a law.
        sampler: Top-p, top-k and min-p of these laws.
        max_tokens: Most tokens of an answer.
        draws: Of each law.
        seed: Of the random numbers.
        stop_ids: Ids that end an answer.
    """

    temperatures: Sequence[float] = (0.0, 1.0)
    sampler: Sampler = field(default_factory=Sampler)
    max_tokens: int = 64
    draws: int = 1000
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Text:
    """A greedy answer, [A] ids, and what drafting took and brought meanwhile."""

    tokens: tuple[int, ...]
    drafted: int
    accepted: int


def greedy_text(
    target: Target,
    drafter: Drafter[Any],
    prompt: Prompt,
    max_tokens: int,
    stop_ids: Collection[int] = (),
) -> Text:
    """Decode greedily. Args, errors: see `decode`."""
    rounds = list(
        decode(
            target,
            drafter,
            prompt,
            sampler=Sampler(),
            key=mx.random.key(0),  # not used
            max_tokens=max_tokens,
            stop_ids=stop_ids,
        )
    )
    return Text(
        tuple(token for each in rounds for token in each.tokens),
        sum(each.num_drafted for each in rounds),
        sum(each.num_accepted for each in rounds),
    )


def verify(
    target: Target,
    drafter: Drafter[Any],
    prompts: Sequence[Prompt],
    settings: Settings,
    progress: Callable[[int], object] = lambda _: None,
) -> Report:
    """Compare drafted with plain decoding.

    Args:
        target: The model, its logits processed or not.
        drafter: What drafts.
        prompts: What to answer; one or more.
        settings: What is tried.
        progress: Told of each answer and of each draw; see `num_steps`.

    Raises:
        ValueError: If no prompt leaves room for the draws, or a setting is out of its range.
    """

    def answer(drafter: Drafter[Any], prompt: Prompt) -> Text:
        return greedy_text(target, drafter, prompt, settings.max_tokens, settings.stop_ids)

    plain = []
    for prompt in prompts:
        plain.append(answer(NoDrafter(), prompt))
        progress(1)
    ours: list[Text] = []
    divergences: list[Divergence] = []
    greedy = 0 in settings.temperatures
    for index, prompt in enumerate(prompts if greedy else ()):
        ours.append(answer(drafter, prompt))
        texts = ours[-1].tokens, plain[index].tokens
        divergences += diverging(target, index, prompt, *texts)
        progress(1)
    samplers = [replace(settings.sampler, temperature=t) for t in settings.temperatures if t > 0]
    laws: list[LawTest] = []
    for sampler in samplers:
        prompt, first = least_certain(target, prompts, [text.tokens for text in plain], sampler)
        key = mx.random.key(settings.seed)
        laws += check_law(
            target,
            unpaced(drafter) or drafter,  # a parked drafter would prove nothing
            prompt,
            first,
            sampler,
            draws=settings.draws,
            key=key,
            progress=progress,
        )
    worst = max(laws, key=lambda law: law.total_variation - law.noise_floor, default=None)
    near_ties = sum(each.near_tie for each in divergences)
    return Report(
        greedy_identical=not divergences if greedy else None,
        prompts=len(prompts) if greedy else 0,
        tokens=sum(len(text.tokens) for text in ours),
        drafted=sum(text.drafted for text in ours),
        accepted=sum(text.accepted for text in ours),
        divergences=tuple(divergences),
        near_ties=near_ties,
        total_variation=None if worst is None else worst.total_variation,
        noise_floor=None if worst is None else worst.noise_floor,
        laws=tuple(laws),
        passed=near_ties == len(divergences) and all(law.passed for law in laws),
    )


def num_steps(num_prompts: int, settings: Settings) -> int:
    """Return what the numbers that `verify` tells its `progress` add up to."""
    laws = sum(temperature > 0 for temperature in settings.temperatures)
    return num_prompts * (1 + (0 in settings.temperatures)) + laws * settings.draws


def diverging(
    target: Target, index: int, prompt: Prompt, ours: tuple[int, ...], plain: tuple[int, ...]
) -> list[Divergence]:
    """Return the places at which a drafted text is not what plain decoding says.

    Args:
        target: Reads the drafted text again.
        index: The prompt's, for the report.
        prompt: What both texts answer.
        ours: The drafted text.
        plain: The plain one.
    """
    if ours == plain:
        return []
    logits = read_answer(target, prompt, ours, rows=1).logits.astype(mx.float32)
    together = read_answer(target, prompt, ours).logits
    shift = np.array(together.astype(mx.float32) - logits)
    finite = np.isfinite(shift)  # a banned token has no logit, and takes part in no choice
    largest = np.where(finite, shift, -np.inf).max(-1) - np.where(finite, shift, np.inf).min(-1)
    # A pass that differs by more than a self-test would let pass is no excuse.
    table = np.array(logits)
    limit = (
        TOLERANCE.get(together.dtype, TOLERANCE_16_BIT) * np.abs(table[np.isfinite(table)]).max()
    )
    pass_gap = float(min(largest.max(), limit))

    def divergence(position: int, *tokens: int) -> Divergence:
        gap = abs(float(table[position, tokens[1]] - table[position, tokens[0]]))
        return Divergence(index, position, tokens, gap, pass_gap, gap <= pass_gap)

    choices = table.argmax(-1).tolist()
    both = enumerate(zip(ours, choices, strict=True))
    found = [divergence(place, token, choice) for place, (token, choice) in both if token != choice]
    if found:
        return found
    # Each token is right where it stands: one text goes on where the other has ended, or it is the
    # plain one that differs.
    place = first_difference(ours, plain)
    if place < min(len(ours), len(plain)):
        return [divergence(place, ours[place], plain[place])]
    tokens = (ours[place:] or plain[place:])[:1]
    return [Divergence(index, place, tokens, None, pass_gap, near_tie=False)]


def least_certain(
    target: Target,
    prompts: Sequence[Prompt],
    answers: Sequence[tuple[int, ...]],
    sampler: Sampler,
) -> tuple[Prompt, int]:
    """Return the place, of all plain answers, after which the likeliest tokens are least certain.

    There a wrong rule of acceptance shows most: drafts are neither always right nor always wrong.

    Args:
        target: Reads the answers.
        prompts: What they answer.
        answers: [A] ids each.
        sampler: Gives the laws.

    Returns:
        The prompt with the beginning of its answer, and the id that follows it.

    Raises:
        ValueError: If no prompt leaves room for three tokens.
    """
    best: tuple[float, Prompt, int] | None = None
    for prompt, answer in zip(prompts, answers, strict=True):
        likeliest = sampler.probs(read_answer(target, prompt, answer).logits).max(axis=-1)
        doubts = np.array(likeliest * (1 - likeliest))
        for place, token in enumerate(answer):
            before = replace(prompt, tokens=(*prompt.tokens, *answer[:place]))
            if target.max_context is not None and len(before) + 3 > target.max_context:
                break
            doubt = float(doubts[place + 1 : place + 3].sum())
            if best is None or doubt > best[0]:
                best = doubt, before, token
    if best is None:
        raise ValueError(
            f"A prompt must leave room for three tokens in the context of {target.max_context}; "
            "none does. Shorten the prompts or use smaller images."
        )
    return best[1:]
