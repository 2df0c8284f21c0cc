"""Broken drafters: the text is the target's all the same, and the user hears of it once."""

import warnings
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.guard import FAULT, guard
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology
from law import assert_law
from toy import GREEDY, RandomDrafter, ToyTarget, exact_law, generate, greedy_oracle

V = 5
TREE = Topology((-1, 0, 0, 1))
TARGET = ToyTarget(vocab_size=V)
WARM = Sampler(temperature=0.9)
DRAFTER = RandomDrafter(TREE, V, laws=True)


def laws(rows: list[list[float]]) -> mx.array:
    return mx.array(rows, dtype=mx.float32)


SOUND = laws([[0.2] * V, [0.5, 0.5, 0, 0, 0], [0.0] * V, [0.0] * V])


@dataclass(frozen=True)
class Breaking:
    """Drafts soundly until the text has some length, then what `spoil` makes of the draft."""

    spoil: object
    after: int = 3
    drafter: RandomDrafter = DRAFTER

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> int:
        return 1

    def draft(self, root: int, state: int, sampler: Sampler, key: mx.array) -> DraftTree:
        tree = self.drafter.draft(root, None, sampler, key)
        return tree if state < self.after else self.spoil(tree)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: int) -> int:
        return state + len(tokens)


def with_token(token: int):
    return lambda tree: replace(tree, tokens=mx.where(mx.arange(4) == 2, token, tree.tokens))


def with_law(value: float):
    return lambda tree: replace(tree, probs=mx.where(mx.arange(V) == 1, value, tree.probs))


SPOILS = {
    "id too large": with_token(V),
    "id far too large": with_token(2**31 - 1),
    "negative id": with_token(-1),
    "NaN": with_law(float("nan")),
    "infinite": with_law(float("inf")),
    "no law": with_law(0.9),
    "negative": with_law(-0.3),
    "negative, with a sum of 1": lambda tree: replace(
        tree, probs=mx.broadcast_to(mx.array([-0.2, 1.2, 0.0, 0.0, 0.0]), tree.probs.shape)
    ),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_broken_drafter_is_dropped_with_one_warning(spoil: object) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = generate(TARGET, Breaking(spoil), (1, 2), 20)
    assert text == greedy_oracle(TARGET, (1, 2), 20)
    assert [str(each.message) for each in caught] == [FAULT]


@pytest.mark.parametrize("spoil", ["NaN", "no law"])
def test_the_law_stays_that_of_the_target(spoil: str) -> None:
    counts = np.zeros((V, V))
    drafter = Breaking(SPOILS[spoil], after=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key in mx.random.split(mx.random.key(3), 400):
            counts[tuple(generate(TARGET, drafter, (1, 2), 2, sampler=WARM, key=key))] += 1
    assert_law(counts, exact_law(TARGET, (1, 2), WARM, 2))


def test_sound_trees_pass_as_they_are() -> None:
    tree = DraftTree(TREE, mx.array([0, 4, 1, 2], dtype=mx.int32), SOUND)
    checked, fault = guard(tree, V)
    assert fault is not None
    assert not fault.item()
    assert checked.tokens.tolist() == [0, 4, 1, 2]
    alone = DraftTree(Topology.chain(0), mx.array([3], dtype=mx.int32))
    assert guard(alone, V) == (alone, None)


def test_laws_that_nobody_reads_may_be_anything() -> None:
    unread = mx.where(mx.arange(4)[:, None] < 2, SOUND, mx.nan)
    _, fault = guard(DraftTree(TREE, mx.array([0, 4, 1, 2], dtype=mx.int32), unread), V)
    assert fault is not None
    assert not fault.item()


def test_no_draft_is_read_outside_of_the_vocabulary() -> None:
    for token in (-1, V, 2**31 - 1):
        checked, fault = guard(with_token(token)(DraftTree(TREE, mx.zeros(4, mx.int32))), V)
        assert fault is not None
        assert fault.item()
        assert 0 <= min(checked.tokens.tolist()) <= max(checked.tokens.tolist()) < V


def test_a_sound_drafter_is_kept() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sampler in (GREEDY, WARM):
            assert len(generate(TARGET, DRAFTER, (1, 2), 20, sampler=sampler)) == 20
