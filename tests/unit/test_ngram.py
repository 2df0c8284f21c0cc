"""Lookup drafts: the rule against examples and a naive search, states as values, any target."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_mlx.decode import NoDrafter, decode
from flash_mlx.draft import NgramDrafter, NgramRule, NgramState
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets import LoadedTarget
from tiny import random_image
from toy import GREEDY, KEY, ToyTarget, generate, greedy_oracle, steady

VECTORS = Path(__file__).parents[3] / "shared/data/golden_vectors/vectors.json"
NO_HIDDEN = mx.zeros((1, 1))
IMAGE = 99
V = 4


def drafts(tokens: Sequence[int], num_drafts: int = 3, **rule: Any) -> list[int]:
    """Return the drafts after a text of prompt and root."""
    drafter = NgramDrafter(num_drafts, NgramRule(**rule))
    state = drafter.prefill(Prompt(tuple(tokens[:-1])), NO_HIDDEN, tokens[-1])
    tree = drafter.draft(tokens[-1], state, GREEDY, KEY)
    assert tree.topology.is_chain
    assert tree.probs is None
    assert tree.tokens.dtype == mx.int32
    root, *found = tree.tokens.tolist()
    assert root == tokens[-1]
    assert tuple(found) == state.drafts
    return found


def vllm(tokens: Sequence[int], min_n: int, max_n: int, k: int) -> list[int]:
    return drafts(tokens, k, min_n=min_n, max_n=max_n, occurrence="earliest", drafts_per_match=None)


@pytest.mark.skipif(not VECTORS.is_file(), reason="third-party test data is not here")
def test_vllms_own_cases() -> None:
    cases = json.loads(VECTORS.read_text(encoding="utf-8"))["vllm_ngram"]["cases"]
    assert len(cases) == 13
    for case in cases:
        assert vllm(case["tokens"], case["min_n"], case["max_n"], case["k"]) == case["expect"], case


def test_the_longest_ngram_is_tried_first() -> None:
    text = [7, 2, 3, 4, 9, 3, 5, 9, 2, 3]  # "2 3" before "4", and a later "3" before "5"
    assert vllm(text, 1, 2, 1) == drafts(text, 1, max_n=2) == [4]
    assert drafts(text, 1, max_n=1) == [5]
    assert vllm([8, 1, 2, 3, 8, 4, 4, 3], 2, 3, 2) == []


def test_of_equal_matches_the_latest_counts_or_the_earliest() -> None:
    text = [1, 2, 5, 1, 2, 6, 1, 2]
    assert drafts(text, 1) == [6]
    assert vllm(text, 1, 3, 1) == [5]


def test_a_longer_match_brings_more_drafts() -> None:
    text = [*range(20), 50, 7]
    assert drafts(text, 20) == [8, 9]
    assert drafts([*text, 8], 20) == [9, 10, 11, 12]
    assert drafts([*text, *range(8, 15)], 20) == [*range(15, 20), 50, 7, 8]  # n = 4
    assert drafts([*text, *range(8, 15)], 3) == [15, 16, 17]
    assert drafts(text, 20, drafts_per_match=None) == [*range(8, 20), 50, 7]


def test_drafts_end_where_the_text_ends() -> None:
    assert drafts([1, 1], 5) == [1]
    assert drafts([3, 1, 2, 1, 2], 5) == [1, 2]


def test_without_a_match_there_is_the_root_alone() -> None:
    assert drafts([1, 2]) == []
    assert drafts([1, 2, 3, 4, 5]) == []
    assert drafts([1, 2, 1], min_n=2) == []


def test_the_newest_tokens_do_not_match_themselves() -> None:
    assert drafts([1, 2, 3], min_n=1, max_n=3) == []
    assert vllm([5, 5, 5], 2, 2, 4) == [5]


def written(text: Sequence[int | None]) -> Prompt:
    """Return a prompt in which each None is an image of two rows."""
    tokens: list[int] = []
    spans = []
    for token in text:
        tokens += [IMAGE, IMAGE] if token is None else [token]
        spans += [(len(tokens) - 2, len(tokens))] if token is None else []
    return Prompt(tuple(tokens), tuple(spans))


@pytest.mark.parametrize(
    ("text", "root", "expected"),
    [
        ([1, 2, None, 3, 1], 2, ()),  # "1 2" and "2" end at the image, so nothing follows them
        ([1, None, 2, 7, 1], 2, (7, 1, 2)),  # "1 2" is torn by the image, "2" is not
        ([1, 2, 8, None, 9, 1], 2, (8,)),  # drafts end at the image
        ([5, 3, 1, None, 3, 2, 4, None], 3, (2, 4)),  # by "3"; "image, 3" would be the same
        ([3, 6, 5, None, 3, 2, 3, 7, None], 3, (7,)),  # by "3", not by "image, 3"
        ([None, IMAGE, 4], IMAGE, (4, IMAGE)),  # only rows that hold an image are set aside
        ([5, 6, None, None], 5, (6,)),
        ([None], IMAGE, ()),
    ],
)
def test_images_are_neither_matched_nor_drafted(
    text: list[int | None], root: int, expected: tuple[int, ...]
) -> None:
    drafter = NgramDrafter(9, NgramRule(drafts_per_match=None))
    assert drafter.prefill(written(text), NO_HIDDEN, root).drafts == expected


def naive(text: Sequence[int | None], num_drafts: int, rule: NgramRule) -> tuple[int | None, ...]:
    """Return what `NgramDrafter` must draft after a text; None stands for an image."""
    for n in range(rule.max_n, rule.min_n - 1, -1):
        suffix = text[len(text) - n :]
        if len(text) < n or None in suffix:
            continue
        places = [
            p for p in range(n, len(text)) if text[p - n : p] == suffix and text[p] is not None
        ]
        if places:
            place = places[-1] if rule.occurrence == "latest" else places[0]
            limit = num_drafts
            if rule.drafts_per_match is not None:
                limit = min(limit, n * rule.drafts_per_match)
            following = [*text[place : place + limit], None]
            return tuple(following[: following.index(None)])
    return ()


rules = st.builds(
    lambda low, more, occurrence, per_match: NgramRule(low, low + more, occurrence, per_match),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from(["latest", "earliest"]),
    st.none() | st.integers(1, 3),
)
pieces = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=8)


@steady
@given(
    text=st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=12),
    rounds=pieces,
    other_rounds=pieces,
    num_drafts=st.integers(1, 6),
    rule=rules,
)
def test_drafts_are_those_of_a_naive_search_and_states_are_values(
    text: list[int | None],
    rounds: list[list[int]],
    other_rounds: list[list[int]],
    num_drafts: int,
    rule: NgramRule,
) -> None:
    drafter = NgramDrafter(num_drafts, rule)
    state = drafter.prefill(written(text), NO_HIDDEN, 1)
    said: list[tuple[list[int | None], NgramState]] = [([*text, 1], state)]
    for each in rounds:
        before, state = said[-1]
        state = drafter.extend(NO_HIDDEN, tuple(each), state)
        said.append((before + each, state))
    # From every state the text goes on in another way, too, and comes back.
    for (before, state), each in zip(list(said), other_rounds, strict=False):
        said.append((before + each, drafter.extend(NO_HIDDEN, tuple(each), state)))
    for whole, state in said:
        expected = naive(whole, num_drafts, rule)
        assert state.drafts == expected
        again = drafter.draft(7, state, GREEDY, KEY)
        assert again.tokens.tolist() == [7, *expected]


def lines_run(drafter: NgramDrafter, state: NgramState) -> int:
    """Return how many lines of Python a round takes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        drafter.extend(NO_HIDDEN, (0, 1, 2), state)
    finally:
        sys.settrace(before)
    return count


def test_a_round_costs_the_same_in_a_long_text() -> None:
    drafter = NgramDrafter()
    short, long = (
        drafter.prefill(Prompt(tuple(range(3)) * repeats), NO_HIDDEN, 0) for repeats in (10, 3000)
    )
    assert lines_run(drafter, long) == lines_run(drafter, short) < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_n": 0}, "1 token or more.*got 0 to 4"),
        ({"min_n": 3, "max_n": 2}, "max_n must not be below min_n; got 3 to 2"),
        ({"drafts_per_match": 0}, "1 draft or more; got 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NgramRule(**arguments)


def test_at_least_one_draft_is_asked_for() -> None:
    with pytest.raises(ValueError, match="1 or more; got 0"):
        NgramDrafter(0)


@steady
@given(
    target=st.builds(
        ToyTarget,
        vocab_size=st.just(V),
        max_context=st.none() | st.integers(8, 24),
        seed=st.integers(0, 50),
    ),
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=8),
    budget=st.integers(1, 24),
    stop_ids=st.sets(st.integers(0, V - 1), max_size=1),
    num_drafts=st.integers(1, 6),
    rule=rules,
)
def test_greedy_tokens_are_the_targets(
    target: ToyTarget,
    prompt: list[int],
    budget: int,
    stop_ids: set[int],
    num_drafts: int,
    rule: NgramRule,
) -> None:
    expected = greedy_oracle(target, prompt, budget, stop_ids)
    drafter = NgramDrafter(num_drafts, rule)
    assert generate(target, drafter, prompt, budget, stop_ids=stop_ids) == expected


def test_text_that_repeats_takes_fewer_passes_and_none_for_nothing() -> None:
    target, prompt = ToyTarget(), (1, 2, 3)
    rounds = list(
        decode(
            target,
            NgramDrafter(),
            Prompt(prompt),
            sampler=GREEDY,
            key=KEY,
            max_tokens=60,
            stop_ids=(),
        )
    )
    assert [token for r in rounds for token in r.tokens] == greedy_oracle(target, prompt, 60)
    assert len(rounds) < 45
    assert {r.num_drafted > 0 for r in rounds[1:]} == {True, False}
    assert target.passes == len(rounds) - 1  # none was launched ahead of a draft


def answer(loaded: LoadedTarget, drafter: Any, prompt: Prompt) -> tuple[list[int], int, int]:
    """Return 240 greedy ids, and how many drafts were accepted and rejected."""
    rounds = list(
        decode(
            loaded.target,
            drafter,
            prompt,
            sampler=Sampler(),
            key=KEY,
            max_tokens=240,
            stop_ids=(),
        )
    )
    accepted = sum(each.num_accepted for each in rounds)
    rejected = sum(each.num_drafted for each in rounds) - accepted
    return [token for each in rounds for token in each.tokens], accepted, rejected


def test_models_say_the_same(loaded: LoadedTarget) -> None:
    accepted = rejected = 0
    for num_images in (0, 1, 2):
        images = [random_image(70, 90, seed=i) for i in range(num_images)]
        prompt = make_prompt(loaded, "one two one two three one two one", images)
        expected, *_ = answer(loaded, NoDrafter(), prompt)
        ids, kept, dropped = answer(loaded, NgramDrafter(), prompt)
        assert ids == expected
        accepted, rejected = accepted + kept, rejected + dropped
    assert accepted >= 100
    assert rejected >= 100
