from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

import flash_mlx.decode as decoding
from flash_mlx.decode import Cache, NoDrafter, Output, Round, decode
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology
from toy import (
    GREEDY,
    KEY,
    OracleDrafter,
    RandomDrafter,
    ToyTarget,
    continuation,
    generate,
    greedy_oracle,
)

PROMPT = (1, 2, 3)
TARGET = ToyTarget()
TEXT = continuation(TARGET, PROMPT, 30)
CHAIN = Topology.chain(4)

Seen = tuple[tuple[int, ...], mx.array]


def oracle(topology: Topology = CHAIN, corruption: float = 0.0) -> OracleDrafter:
    return OracleDrafter(topology, TARGET, laws=False, corruption=corruption)


def rounds_of(drafter: object, max_tokens: int, stop_ids: tuple[int, ...] = ()) -> list[Round]:
    return list(
        decode(
            TARGET,
            drafter,
            Prompt(PROMPT),
            sampler=GREEDY,
            key=KEY,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
        )
    )


def test_right_drafts_bring_a_token_more_than_there_are_drafts() -> None:
    rounds = rounds_of(oracle(), 11)
    assert rounds[0] == Round((TEXT[0],), 0, 0)
    assert rounds[1] == Round(tuple(TEXT[1:6]), 4, 4)
    assert rounds[2] == Round(tuple(TEXT[6:11]), 4, 4)
    assert len(rounds) == 3


def test_the_budget_cuts_a_round_and_its_count() -> None:
    # A chain is cut before the pass: the root and 2 drafts bring the 3 tokens that are left.
    assert rounds_of(oracle(), 9)[-1] == Round(tuple(TEXT[6:9]), 2, 2)
    assert rounds_of(oracle(), 7)[-1] == Round((TEXT[6],), 0, 0)
    # Other trees are read whole, for their first rows may be siblings.
    tree = Topology((-1, 0, 0, 0, 1, 4, 5))
    assert rounds_of(oracle(tree), 9)[-1] == Round(tuple(TEXT[6:9]), 6, 3)


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(temperature=1)])
def test_the_target_reads_no_draft_of_a_chain_that_the_budget_has_no_room_for(
    sampler: Sampler,
) -> None:
    class Watched(ToyTarget):
        def verify(self, tree: DraftTree, cache: Cache) -> Output:
            sizes.append(len(tree))
            return super().verify(tree, cache)

    for budget in range(1, 12):
        sizes: list[int] = []
        drafter = OracleDrafter(CHAIN, TARGET, laws=True, corruption=0.3)
        said = generate(Watched(), drafter, PROMPT, budget, sampler=sampler)
        assert len(said) == budget
        assert not sizes or sizes[-1] <= budget - 1
        if budget <= 6:
            assert max(sizes, default=0) <= budget - 1


def test_one_token_needs_the_prefill_alone() -> None:
    target = ToyTarget()
    assert generate(target, oracle(), PROMPT, 1) == TEXT[:1]
    assert target.passes == 0


@pytest.mark.parametrize("place", [0, 3, 5, 6])
def test_the_stop_token_is_the_last_one(place: int) -> None:
    # Place 0 is the prefill's own token, 3 is drafted, 5 is the target's own.
    stop = TEXT[place]
    end = TEXT.index(stop) + 1
    rounds = rounds_of(oracle(), 30, (stop,))
    assert [token for each in rounds for token in each.tokens] == TEXT[:end]
    assert all(each.num_accepted <= len(each.tokens) for each in rounds)


def test_a_stop_token_in_the_prompt_stops_nothing() -> None:
    prompt = (PROMPT[0], 9, *PROMPT)
    text = continuation(TARGET, prompt, 5)
    stop = next(token for token in prompt if token not in text)
    for drafter in (oracle(), NoDrafter()):
        assert generate(TARGET, drafter, prompt, 5, stop_ids=(stop,)) == text


@pytest.mark.parametrize("max_context", [3, 4, 5, 6, 9])
@pytest.mark.parametrize("lookahead", [True, False])
def test_the_context_ends_the_text_where_plain_decoding_ends(
    max_context: int, lookahead: bool
) -> None:
    target = ToyTarget(max_context=max_context)
    expected = TEXT[: max_context - len(PROMPT) + 1]
    assert generate(target, oracle(), PROMPT, 30) == expected
    assert generate(target, NoDrafter() if lookahead else Plain(), PROMPT, 30) == expected


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="context of 2 tokens; it has 3"):
        generate(ToyTarget(max_context=2), NoDrafter(), PROMPT, 5)


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_at_least_one_token_is_asked_for(max_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"1 or more; got {max_tokens}"):
        generate(TARGET, NoDrafter(), PROMPT, max_tokens)


@dataclass(frozen=True)
class Recorder:
    """Drafts what another drafter drafts; its state is all that it was shown."""

    drafter: OracleDrafter

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> Seen:
        return (*prompt.tokens, root), hidden

    def draft(self, root: int, state: Seen, sampler: Sampler, key: mx.array) -> DraftTree:
        return self.drafter.draft(root, state[0], sampler, key)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: Seen) -> Seen:
        text, seen = state[0] + tokens, mx.concatenate([state[1], hidden])
        reread = TARGET.prefill(Prompt(text[:-1]), TARGET.make_cache()).hidden
        np.testing.assert_allclose(np.array(seen), np.array(reread), atol=1e-5)
        return text, seen


def test_the_drafter_sees_the_hidden_state_of_every_token_but_the_newest() -> None:
    topology = Topology((-1, 0, 0, 0, 1, 2, 2, 3, 3))
    rounds = rounds_of(Recorder(oracle(topology, corruption=0.4)), 25)
    assert {each.num_accepted for each in rounds} == {0, 1, 2}


class Plain(NoDrafter):
    """The root alone, and no pass ahead of its token."""

    def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:
        return replace(super().draft(root, state, sampler, key), lookahead=False)


@dataclass(frozen=True)
class Fickle:
    """Promises the root alone and drafts a chain every third time."""

    drafter: OracleDrafter

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> tuple[int, ...]:
        return self.drafter.prefill(prompt, hidden, root)

    def draft(
        self, root: int, state: tuple[int, ...], sampler: Sampler, key: mx.array
    ) -> DraftTree:
        tree = self.drafter.draft(root, state, sampler, key)
        return replace(tree.head(5 if len(state) % 3 == 0 else 1), lookahead=True)

    def extend(
        self, hidden: mx.array, tokens: tuple[int, ...], state: tuple[int, ...]
    ) -> tuple[int, ...]:
        return self.drafter.extend(hidden, tokens, state)


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(temperature=1)])
def test_passes_launched_ahead_change_nothing(sampler: Sampler) -> None:
    ahead = generate(TARGET, NoDrafter(), PROMPT, 20, sampler=sampler)
    assert ahead == generate(TARGET, Plain(), PROMPT, 20, sampler=sampler)


def test_a_pass_ahead_for_nothing_is_harmless() -> None:
    assert generate(TARGET, Fickle(oracle(corruption=0.2)), PROMPT, 25) == TEXT[:25]


def test_plain_decoding_takes_one_pass_a_token() -> None:
    target = ToyTarget()
    assert generate(target, NoDrafter(), PROMPT, 20) == TEXT[:20]
    assert target.passes == 19


def test_the_key_fixes_the_text() -> None:
    sampler = Sampler(temperature=1)
    drafter = RandomDrafter(CHAIN, TARGET.vocab_size, laws=True)

    def text(seed: int) -> list[int]:
        return generate(TARGET, drafter, PROMPT, 20, sampler=sampler, key=mx.random.key(seed))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_no_key_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, ...]] = []

    def remember(key: mx.array) -> mx.array:
        used.append(tuple(np.array(key).tolist()))
        return key

    class Remembering(NoDrafter):
        def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:
            return super().draft(root, state, sampler, remember(key))

    for name in ("judge", "accept"):
        original = getattr(decoding, name)
        monkeypatch.setattr(decoding, name, lambda t, x, s, k, f=original: f(t, x, s, remember(k)))
    generate(TARGET, Remembering(), PROMPT, 20, sampler=Sampler(temperature=1))
    assert len(used) == 1 + 2 * 19
    assert len(set(used)) == len(used)


def test_the_global_random_state_is_left_alone() -> None:
    mx.random.seed(5)
    before = [np.array(state) for state in mx.random.state]
    generate(TARGET, NoDrafter(), PROMPT, 5, sampler=Sampler(temperature=1))
    for state, kept in zip(mx.random.state, before, strict=True):
        np.testing.assert_array_equal(np.array(state), kept)


def test_an_interrupted_text_can_be_left_and_started_anew() -> None:
    def start() -> Iterator[Round]:
        return decode(
            TARGET,
            oracle(),
            Prompt(PROMPT),
            sampler=GREEDY,
            key=KEY,
            max_tokens=30,
            stop_ids=(),
        )

    first = start()
    next(first), next(first)
    del first
    assert [token for each in start() for token in each.tokens] == TEXT


def test_trees_and_chains_tell_the_same_text() -> None:
    tree = Topology.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
    assert greedy_oracle(TARGET, PROMPT, 30) == TEXT
    for topology in (CHAIN, tree):
        assert generate(TARGET, oracle(topology, corruption=0.5), PROMPT, 30) == TEXT
