"""Drafted text on real targets is the plain text at every edge: budgets, contexts, stops, seeds.

What onnxruntime-genai asks of speculative decoding is here too: no drafts are plain decoding, a
model that drafts for itself is always right, nothing comes after the end, a rejected block leaves
no trace, a seed fixes the text, and the counts agree with each other.

Shapes:
    V: vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import pytest

from flash_mlx.decode import Drafter, NoDrafter, decode
from flash_mlx.draft import NgramDrafter
from flash_mlx.generate import Model, generate
from flash_mlx.measure import read_answer
from flash_mlx.penalties import Penalties
from flash_mlx.processed import processed
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats
from flash_mlx.targets import LoadedTarget, MlxVlmTarget
from flash_mlx.tree import DraftTree, Topology
from flash_mlx.verify import greedy_text
from identity import SHAPES, CorruptedOracle, ask, run
from tiny import random_image

LENGTH = 40
STATIC = {
    "pair": Topology((-1, 0)),
    "fan": Topology((-1, 0, 0, 0, 0)),
    "binary": Topology((-1, 0, 0, 1, 1, 2, 2)),
    "spine": Topology((-1, 0, 0, 1, 3, 4, 5)),
    "two chains": Topology((-1, 0, 1, 2, 0, 4, 5)),
}
KINDS = (*SHAPES, "ngram")
PENALTIES = Penalties(repetition_penalty=1.2, presence_penalty=0.3)


@dataclass(frozen=True)
class Case:
    """A prompt and what the target says to it, greedily."""

    loaded: LoadedTarget
    prompt: Prompt
    text: tuple[int, ...]

    def drafter(self, kind: str, right: float = 0.8) -> Drafter[Any]:
        if kind == "ngram":
            return NgramDrafter(4)
        topology = (SHAPES | STATIC)[kind]
        return CorruptedOracle(self.text, topology, self.loaded.target.vocab_size, right)

    def model(self, drafter: Drafter[Any] | None = None) -> Model:
        """Return the target with a drafter; no id ends its texts."""
        loaded = replace(self.loaded, eos_ids=())
        return Model(loaded, drafter, "tiny", "a drafter", "none", is_demo=False)

    def says(self, kind: str, max_tokens: int = LENGTH, stop_ids: tuple[int, ...] = ()) -> list:
        drafter = self.drafter(kind)
        said = greedy_text(self.loaded.target, drafter, self.prompt, max_tokens, stop_ids)
        return list(said.tokens)


@pytest.fixture(scope="module")
def case(loaded: LoadedTarget) -> Case:
    prompt = ask(loaded, 1)
    return Case(loaded, prompt, tuple(run(loaded.target, NoDrafter(), prompt, 100)[0]))


def test_static_trees_change_nothing(case: Case) -> None:
    accepted = rejected = 0
    for kind in STATIC:
        drafter = case.drafter(kind)
        ids, kept, dropped = run(case.loaded.target, drafter, case.prompt, 100)
        assert tuple(ids) == case.text
        accepted, rejected = accepted + kept, rejected + dropped
    assert min(accepted, rejected) >= 100


@pytest.mark.parametrize("penalised", [False, True])
def test_drafts_from_the_text_so_far_change_nothing(case: Case, penalised: bool) -> None:
    target = processed(case.loaded.target, PENALTIES if penalised else Penalties())
    accepted = rejected = 0
    # Random targets fall into loops, which such drafts find; penalties keep them out of these.
    length = 100 if penalised else 150
    for num_images in (0, 1, 2):
        prompt = ask(case.loaded, num_images)
        expected, *_ = run(target, NoDrafter(), prompt, length)
        ids, kept, dropped = run(target, NgramDrafter(), prompt, length)
        assert ids == expected
        accepted, rejected = accepted + kept, rejected + dropped
    assert rejected >= 100
    assert accepted >= (20 if penalised else 100)


@pytest.mark.parametrize("kind", KINDS)
def test_budgets_are_never_overshot(case: Case, kind: str) -> None:
    for budget in (*range(1, 9), LENGTH):
        assert tuple(case.says(kind, budget)) == case.text[:budget]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_comes_after_a_stop_token(case: Case, kind: str) -> None:
    for place in (0, 1, 2, 3, 7, 12, 23):
        end = case.text.index(case.text[place]) + 1
        assert tuple(case.says(kind, stop_ids=(case.text[place],))) == case.text[:end]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalised", [False, True])
def test_the_context_ends_the_text_where_it_ends_plain_text(
    case: Case, kind: str, penalised: bool
) -> None:
    for room in (0, 1, 2, 3, 6, 11):
        target = MlxVlmTarget(case.loaded.target.model, case.loaded.family)
        target.max_context = len(case.prompt) + room
        narrow = processed(target, PENALTIES if penalised else Penalties())
        expected, *_ = run(narrow, NoDrafter(), case.prompt, LENGTH)
        assert len(expected) == room + 1
        assert penalised or tuple(expected) == case.text[: room + 1]
        # Under penalties the oracle knows the penalised text.
        known = replace(case, text=tuple(expected))
        assert run(narrow, known.drafter(kind), case.prompt, LENGTH)[0] == expected


def test_a_full_context_is_a_length_and_no_crash(case: Case) -> None:
    target = MlxVlmTarget(case.loaded.target.model, case.loaded.family)
    loaded = replace(case.loaded, target=target)
    for drafter in (None, NgramDrafter()):
        model = replace(case, loaded=loaded).model(drafter)
        target.max_context = case.loaded.target.max_context
        free = generate(model, "What is this?", random_image(), max_tokens=30, temperature=0.0)
        target.max_context = free.prompt_tokens + 9
        said = generate(model, "What is this?", random_image(), max_tokens=30, temperature=0.0)
        assert said.finish_reason == "length"
        assert said.token_ids == free.token_ids[:10]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_inside_a_block_ends_the_text_in_every_family(case: Case, kind: str) -> None:
    plain = case.model()
    settings: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0.0}
    free = generate(plain, "What is this?", random_image(), **settings)
    drafter = replace(case, text=free.token_ids).drafter(kind)
    stop = free.text[9:12]
    expected = generate(plain, "What is this?", random_image(), **settings, stop=stop)
    said = generate(
        replace(plain, drafter=drafter), "What is this?", random_image(), **settings, stop=stop
    )
    assert (said.text, said.token_ids, said.finish_reason) == (
        free.text[: free.text.index(stop)],
        expected.token_ids,
        "stop",
    )


def test_a_block_of_no_drafts_is_plain_decoding(case: Case) -> None:
    oracle = CorruptedOracle(case.text, Topology.chain(0), case.loaded.target.vocab_size)
    text = greedy_text(case.loaded.target, oracle, case.prompt, LENGTH)
    assert (text.tokens, text.drafted, text.accepted) == (case.text[:LENGTH], 0, 0)


@dataclass(frozen=True)
class Itself:
    """The target drafts for itself: each slot is drawn from its own law."""

    loaded: LoadedTarget
    num_drafts: int

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> tuple[Prompt, tuple]:
        return prompt, (root,)

    def draft(self, root: int, state: tuple, sampler: Sampler, key: mx.array) -> DraftTree:
        prompt, said = state
        laws = []
        for own in mx.random.split(key, self.num_drafts):
            # One more token makes room for the law of what follows the last one.
            logits = read_answer(self.loaded.target, prompt, (*said, 0)).logits[-1:]
            laws.append(sampler.probs(logits))
            said = (*said, int(sampler.sample(logits, own).item()))
        tokens = mx.array((root, *said[-self.num_drafts :]), dtype=mx.int32)
        topology = Topology.chain(self.num_drafts)
        return DraftTree(topology, tokens, mx.concatenate([*laws, mx.zeros_like(laws[0])]))

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: tuple) -> tuple:
        prompt, said = state
        return prompt, (*said, *tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_that_drafts_for_itself_is_always_right(case: Case, temperature: float) -> None:
    prompt = ask(case.loaded, 0)
    stats = GenerationStats()
    rounds = decode(
        case.loaded.target,
        Itself(case.loaded, 3),
        prompt,
        sampler=Sampler(temperature=temperature),
        key=mx.random.key(5),
        max_tokens=17,
        stop_ids=(),
    )
    assert sum(len(each.tokens) for each in stats.watch(rounds)) == 17
    assert stats.acceptance_rate == 1
    assert stats.accept_lengths == {4: 4}
    assert stats.acceptance_by_position == (1, 1, 1)


def test_a_rejected_block_leaves_no_trace(case: Case) -> None:
    target, prompt = case.loaded.target, case.prompt
    clean, used = target.make_cache(), target.make_cache()
    for cache in (clean, used):
        target.prefill(prompt, cache)
    for wrong in range(3):
        tokens = [case.text[0], *((token + 1 + wrong) % 300 for token in case.text[1:6])]
        target.verify(DraftTree(Topology.chain(5), mx.array(tokens, dtype=mx.int32)), used)
    root = DraftTree(Topology.chain(0), mx.array(case.text[:1], dtype=mx.int32))
    outs = []
    for cache in (clean, used):
        target.verify(root, cache)
        cache.commit((0,))
        assert cache.length == len(prompt) + 1
        after = DraftTree(Topology.chain(0), mx.array(case.text[1:2], dtype=mx.int32))
        outs.append(target.verify(after, cache).logits)
    assert mx.array_equal(*outs)


@pytest.mark.parametrize("kind", ["none", "ngram"])
def test_a_seed_fixes_the_text(case: Case, kind: str) -> None:
    model = case.model(None if kind == "none" else NgramDrafter())
    settings: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.9}
    one, again, other = (
        generate(model, "Hello.", **settings, seed=seed).token_ids for seed in (1, 1, 2)
    )
    assert one == again != other


@pytest.mark.parametrize("kind", KINDS)
def test_counts_agree_with_each_other(case: Case, kind: str) -> None:
    stats = GenerationStats()
    rounds = list(
        stats.watch(
            decode(
                case.loaded.target,
                case.drafter(kind),
                case.prompt,
                sampler=Sampler(),
                key=mx.random.key(0),
                max_tokens=LENGTH,
                stop_ids=(),
            )
        )
    )
    assert stats.generation_tokens == LENGTH == sum(len(each.tokens) for each in rounds)
    assert stats.rounds == len(rounds) - 1 == sum(stats.outcomes.values())
    assert sum(n * count for n, count in stats.accept_lengths.items()) == LENGTH - 1
    assert stats.accepted <= stats.drafted
    # Each round brings a token of the target's own, but for a last one that the budget cuts.
    assert stats.accepted + stats.rounds - (LENGTH - 1) in (0, 1)
    assert stats.mean_acceptance_length == pytest.approx((LENGTH - 1) / stats.rounds)
    shares = stats.acceptance_by_position
    assert all(0 <= share <= 1 for share in shares)
