"""Texts decoded together are the texts that they are alone."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flash_mlx.batch import Batch, JoiningTarget
from flash_mlx.decode import NoDrafter, Output, decode
from flash_mlx.draft import NgramDrafter
from flash_mlx.generate import Model, generate, join, load, stream_generate
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import LoadedTarget, MlxVlmTarget
from flash_mlx.targets.taps import TappedTarget
from flash_mlx.tree import DraftTree
from passes import after, assert_same, mixed_trees
from tiny import random_image
from toy import GREEDY, KEY, ToyTarget


def prompts_of(loaded: LoadedTarget) -> list[Prompt]:
    """Prompts of different lengths, with a picture, with two, and without one."""
    some = [random_image(seed=number) for number in range(2)]
    pictures: tuple[list[Any], ...] = ([], some[:1], some, [])
    return [
        make_prompt(loaded, "What is there? " * count, each)
        for count, each in enumerate(pictures, start=1)
    ]


def test_a_tapped_target_hands_out_the_rows_of_each_text(llava: LoadedTarget) -> None:
    tapped = TappedTarget(llava.target, [1, 0])
    prompts = prompts_of(llava)
    trees = mixed_trees(tapped, len(prompts))
    caches = [after(tapped, prompt) for prompt in prompts]
    alone = [tapped.verify(tree, cache) for tree, cache in zip(trees, caches, strict=True)]
    mx.eval([out.hidden for out in alone])
    for out, expected in zip(tapped.verify_together(trees, caches), alone, strict=True):
        assert_same(out, expected)


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Model:
    return load(tiny_llava, "ngram", draft_block_size=3)


def run_together(
    model: Model, prompts: Sequence[Prompt], size: int, **settings: Any
) -> list[tuple[int, ...]]:
    """Decode prompts, at most `size` at a time, each taking the place of one that has ended."""
    batch = Batch(model.target)
    waiting, active = list(enumerate(prompts)), []
    said: dict[int, list[Any]] = {number: [] for number, _ in waiting}
    while waiting or active:
        while waiting and len(active) < size:
            number, prompt = waiting.pop(0)
            answer = stream_generate(model, prompt, seat=batch.seat(), seed=number, **settings)
            active.append((number, answer))
        for each in list(active):
            number, answer = each
            piece = next(answer, None)
            if piece is None:
                active.remove(each)
            else:
                said[number].append(piece)
        assert len(batch) <= size
    assert len(batch) == 0
    return [join(pieces).token_ids for pieces in said.values()]


@pytest.mark.parametrize("settings", [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"temperature": 1.0},
])  # fmt: skip
def test_texts_are_those_that_they_are_alone(model: Model, settings: dict[str, Any]) -> None:
    prompts = [*prompts_of(model.loaded), *prompts_of(model.loaded)[::-1]]

    def words(each: Prompt, number: int) -> tuple[int, ...]:
        return generate(model, each, seed=number, max_tokens=20, **settings).token_ids

    alone = [words(each, number) for number, each in enumerate(prompts)]
    for size in (1, 3, 8):
        assert run_together(model, prompts, size, max_tokens=20, **settings) == alone
    assert len(set(alone)) > 1


class Counting(MlxVlmTarget):
    """A target that counts its passes."""

    def __init__(self, target: MlxVlmTarget) -> None:
        self.__dict__.update(vars(target))
        self.alone, self.together = 0, []  # type: ignore[var-annotated]

    def verify(self, tree: DraftTree, cache: Any) -> Output:
        self.alone += 1
        return super().verify(tree, cache)

    def verify_together(self, trees: Sequence[DraftTree], caches: Sequence[Any]) -> list[Output]:
        self.together.append(len(trees))
        return super().verify_together(trees, caches)


def decode_all(batch: Batch, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[list[int]]:
    def start(prompt: Prompt, budget: int) -> Any:
        seat = batch.seat()
        settings: dict[str, Any] = {"sampler": GREEDY, "key": KEY, "stop_ids": ()}
        return seat.decode(seat, NoDrafter(), prompt, max_tokens=budget, **settings)

    loops = [start(prompt, budget) for prompt, budget in zip(prompts, budgets, strict=True)]
    said: list[list[int]] = [[] for _ in loops]
    open_loops = dict(enumerate(loops))
    while open_loops:
        for number, loop in list(open_loops.items()):
            each = next(loop, None)
            if each is None:
                del open_loops[number]
            else:
                said[number] += each.tokens
    return said


def test_all_texts_share_a_pass_and_leave_it_when_they_end(llava: LoadedTarget) -> None:
    target = Counting(llava.target)
    prompts = prompts_of(llava)
    budgets = [5, 3, 8, 3]
    said = decode_all(Batch(target), prompts, budgets)
    assert [len(tokens) for tokens in said] == budgets
    # Two end after 2 passes, one after 4; the last goes on alone, as it does without a batch.
    assert target.together == [4, 4, 2, 2]
    assert target.alone == 3


def test_an_error_is_that_texts_own(model: Model) -> None:
    batch = Batch(model.target)
    prompts = prompts_of(model.loaded)[:3]
    calls = itertools.count()

    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        if next(calls) == 4:
            raise RuntimeError("broken")
        return logits

    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    answers = [
        stream_generate(model, prompt, seat=batch.seat(), **settings, **more)
        for prompt, more in zip(prompts, ({}, {"logits_processors": [broken]}, {}), strict=True)
    ]
    pieces: list[list[Any]] = [[], [], []]
    failed = []
    for _ in range(20):
        for number, answer in enumerate(answers):
            try:
                pieces[number] += [piece for piece in [next(answer, None)] if piece]
            except RuntimeError as error:
                failed.append((number, str(error)))
    assert failed == [(1, "broken")]
    assert len(batch) == 0
    for number in (0, 2):
        expected = generate(model, prompts[number], **settings).token_ids
        assert join(pieces[number]).token_ids == expected


def test_who_leaves_early_holds_nobody_up(model: Model) -> None:
    batch = Batch(model.target)
    first, second = (
        stream_generate(model, each, seat=batch.seat(), max_tokens=9, temperature=0.0)
        for each in prompts_of(model.loaded)[:2]
    )
    next(first), next(second), next(first)
    assert len(batch) == 2
    first.close()  # type: ignore[attr-defined]
    assert len(batch) == 1
    assert len(list(second)) > 0
    assert len(batch) == 0


def test_a_target_that_cannot_join_is_refused(llava: LoadedTarget) -> None:
    packed = MlxVlmTarget(llava.target.model, llava.family, kv_bits=8, kv_group_size=32)
    with pytest.raises(ValueError, match="one text at a time"):
        Batch(packed)
    toy = ToyTarget()
    assert not isinstance(toy, JoiningTarget)
    with pytest.raises(ValueError, match="one text at a time"):
        Batch(toy)


def test_pauses_come_before_each_pass_and_change_nothing() -> None:
    toy = ToyTarget()
    settings: dict[str, Any] = {"sampler": GREEDY, "key": KEY, "max_tokens": 30, "stop_ids": ()}
    for drafter in (NoDrafter(), NgramDrafter(3)):
        plain = list(decode(toy, drafter, Prompt((1, 2, 3)), **settings))
        before, toy.passes = toy.passes, 0
        paused = list(decode(toy, drafter, Prompt((1, 2, 3)), **settings, pauses=True))
        rounds = [each for each in paused if each.due is None]
        assert [each.tokens for each in rounds] == [each.tokens for each in plain]
        pauses = [each for each in paused if each.due is not None]
        assert len(pauses) == len(rounds) - 1  # none before the prompt is read
        assert [each.due is not None for each in paused[1:]] == [True, False] * len(pauses)
        assert toy.passes <= before
