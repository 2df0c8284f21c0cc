"""Every family says its plain text, however it is drafted: with penalties, at edges, in chats.

Drafters know the answer and corrupt it, so that each family sees drafts accepted and rejected by
the hundred. Each way of drafting meets each edge in some family here; the slow tests let every one
meet every edge in every family.

Shapes:
    n: slots.    W: tokens a slot.    A: rows accepted.    D: hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.cost import Costs
from flash_mlx.decode import Drafter, NoDrafter
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel, NgramDrafter
from flash_mlx.draft.adaptive import paced
from flash_mlx.draft.choice import Candidates
from flash_mlx.generate import Model, generate
from flash_mlx.penalties import Penalties
from flash_mlx.processed import processed
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.session import Session
from flash_mlx.targets import LoadedTarget, MlxVlmTarget
from flash_mlx.tree import DraftTree, Topology
from flash_mlx.verify import greedy_text
from identity import SHAPES, CorruptedOracle, ask, run
from tiny import BUILDERS, random_image

STATIC = {
    "pair": Topology((-1, 0)),
    "fan": Topology((-1, 0, 0, 0, 0)),
    "binary": Topology((-1, 0, 0, 1, 1, 2, 2)),
    "spine": Topology((-1, 0, 0, 1, 3, 4, 5)),
    "two chains": Topology((-1, 0, 1, 2, 0, 4, 5)),
}
# Rounds that cost nothing bring large trees, such that cost something trees of many sizes and none.
FREE = Costs(1.0, ((1, 1.0), (12, 1.0)), ((1, 0.01), (4, 0.01)))
MIDDLING = Costs(1.0, ((1, 1.05), (4, 1.3), (12, 2.6)), ((1, 0.1), (4, 0.2)))
KINDS = (*SHAPES, *STATIC, "product tree", "adaptive", "adaptive chain", "ngram", "paced ngram")
LENGTH = 50
PENALTIES = Penalties(repetition_penalty=1.2, presence_penalty=0.3)
SETTINGS: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0}


class OracleBlocks(FlashDrafter):
    """A FLASH drafter whose slots know the answer: it is their first, second, third choice or none.

    A state says by its length how much of the answer was said.
    """

    def __init__(self, loaded: LoadedTarget, prompt: Prompt, answer: tuple[int, ...]) -> None:
        target = loaded.target
        sizes = {"num_heads": 2, "head_dim": 16, "block_size": 4, "num_latents": 4}
        mx.random.seed(0)
        model = FlashModel(FlashConfig(target.hidden_size, target.vocab_size, **sizes))
        super().__init__(model, target.embed, target.lm_head)
        self.answer, self.rng = answer, np.random.default_rng(0)
        rows = mx.zeros((len(prompt), target.hidden_size))
        self.start = self.prefill(prompt, rows, 0).length

    def candidates(self, state: Any, depth: int, width: int) -> Candidates:
        mx.eval(state.slots)  # as if they were looked at
        said = 1 + state.length - self.start
        tokens = np.empty((depth, width), dtype=np.int32)
        for slot in range(depth):
            place = said + slot
            truth = self.answer[place] if place < len(self.answer) else 0
            others = truth + 1 + self.rng.permutation(self.model.config.vocab_size - 1)[:width]
            tokens[slot] = others % self.model.config.vocab_size
            rank = self.rng.choice(4, p=(0.6, 0.15, 0.1, 0.15))
            if rank < width:
                tokens[slot, rank] = truth
        shares = mx.log(mx.array([0.6, 0.2, 0.1][:width]))
        logprobs = mx.broadcast_to(shares, (depth, width))
        return Candidates(mx.array(tokens), logprobs, free=depth)


@dataclass(frozen=True)
class Case:
    """A prompt and what the target says to it, greedily."""

    loaded: LoadedTarget
    target: Any
    prompt: Prompt
    text: tuple[int, ...]

    def drafter(self, kind: str, answer: tuple[int, ...] | None = None) -> Drafter[Any]:
        answer = self.text if answer is None else answer
        if topology := (SHAPES | STATIC).get(kind):
            return CorruptedOracle(answer, topology, self.loaded.target.vocab_size)
        if kind == "ngram":
            return NgramDrafter()
        costs = MIDDLING if kind == "adaptive" else FREE
        blocks = OracleBlocks(self.loaded, self.prompt, answer) if "ngram" not in kind else None
        lookup = NgramDrafter() if kind in ("adaptive", "paced ngram") else None
        trees = kind != "adaptive chain"
        return paced(blocks, lambda _, greedy: costs, lookup=lookup, trees=trees)

    def check(self, kind: str) -> np.ndarray:
        """Draft that way; returns how many drafts were accepted and rejected."""
        ids, *counts = run(self.target, self.drafter(kind), self.prompt, len(self.text))
        assert tuple(ids) == self.text, kind
        return np.array(counts)

    def model(self, kind: str = "none", answer: tuple[int, ...] = ()) -> Model:
        """Return the target with a drafter; no id ends its texts."""
        drafter = None if kind == "none" else self.drafter(kind, answer)
        loaded = replace(self.loaded, eos_ids=())
        return Model(loaded, drafter, "tiny", "a drafter", "none", is_demo=False)


def case_of(loaded: LoadedTarget, num_images: int, penalties: Penalties, length: int) -> Case:
    target, prompt = processed(loaded.target, penalties), ask(loaded, num_images)
    return Case(loaded, target, prompt, tuple(run(target, NoDrafter(), prompt, length)[0]))


def cases_of(loaded: LoadedTarget, penalties: Penalties, length: int) -> list[Case]:
    """Return a case without a picture, one with one and one with two, as the family reads them."""
    fewest, most = loaded.family.num_images
    return [
        case_of(loaded, num_images, penalties, length)
        for num_images in range(fewest, 3 if most is None else most + 1)
    ]


@pytest.fixture(scope="module")
def cases(family: LoadedTarget) -> list[Case]:
    return cases_of(family, Penalties(), LENGTH)


@pytest.fixture(scope="module")
def case(cases: list[Case]) -> Case:
    return next(case for case in cases if case.prompt.image_spans)


def some(loaded: LoadedTarget, count: int, kinds: Sequence[str] = KINDS) -> list[str]:
    """Return as many kinds, other ones for each family."""
    first = count * list(BUILDERS).index(loaded.model_type)
    return [kinds[(first + i) % len(kinds)] for i in range(count)]


@pytest.fixture(params=[3, pytest.param(len(KINDS), marks=pytest.mark.slow)], ids=["some", "all"])
def kinds(request: pytest.FixtureRequest, family: LoadedTarget) -> list[str]:
    return some(family, request.param)


def test_drafts_change_nothing(family: LoadedTarget, cases: list[Case]) -> None:
    counts, static = np.zeros(2), some(family, 2, tuple(STATIC))
    for number, kind in enumerate((*SHAPES, *static, "product tree", "adaptive", "ngram")):
        counts += cases[number % len(cases)].check(kind)
    assert counts.min() >= 100


def test_penalties_are_those_of_the_path(family: LoadedTarget) -> None:
    penalised, counts = case_of(family, 1, PENALTIES, 70), np.zeros(2)
    for kind in ("chain", "tree", "product tree", *some(family, 1)):
        counts += penalised.check(kind)
    assert counts.min() >= 100


@pytest.mark.slow
@pytest.mark.parametrize("penalties", [Penalties(), PENALTIES], ids=["free", "penalised"])
def test_every_way_of_drafting_says_every_plain_text(
    family: LoadedTarget, penalties: Penalties
) -> None:
    case, total = case_of(family, 1, penalties, 70), np.zeros(2)
    for kind in KINDS:
        counts = case.check(kind)
        # What is paced may stop drafting, and the text may bring no drafts of its own.
        assert counts.min() >= (0 if "ngram" in kind or "adaptive" in kind else 5), kind
        total += counts
    assert total.min() >= 100


def test_the_context_ends_the_text_where_it_ends_plain_text(case: Case, kinds: list[str]) -> None:
    target = MlxVlmTarget(case.loaded.target.model, case.loaded.family)
    for room in (0, 1, 2, 5, 9):
        target.max_context = len(case.prompt) + room
        for kind in kinds:
            ids, *_ = run(target, case.drafter(kind), case.prompt, LENGTH)
            assert tuple(ids) == case.text[: room + 1], (kind, room)


def test_nothing_comes_after_a_stop_token(case: Case, kinds: list[str]) -> None:
    for kind in kinds:
        for place in (1, 4, 9):
            stop = case.text[place]
            ids = greedy_text(case.target, case.drafter(kind), case.prompt, LENGTH, (stop,)).tokens
            assert ids == case.text[: case.text.index(stop) + 1], (kind, place)


def test_a_stop_string_inside_a_block_ends_the_text(case: Case, kinds: list[str]) -> None:
    free = generate(case.model(), case.prompt, **SETTINGS)
    stop = free.text[len(free.text) // 2 :][:3]
    plain = generate(case.model(), case.prompt, **SETTINGS, stop=stop)
    for kind in kinds:
        said = generate(case.model(kind, free.token_ids), case.prompt, **SETTINGS, stop=stop)
        assert said.text == plain.text == free.text[: free.text.index(stop)], kind
        assert said.token_ids == plain.token_ids, kind
        assert said.finish_reason == "stop"


@dataclass
class TurningOracle:
    """A corrupted oracle that reads along and is told the answer of each turn.

    The state is the number of tokens said since the prompt.
    """

    topology: Topology
    vocab_size: int
    answer: tuple[int, ...] = ()

    def read(self, prompt: Prompt, start: int, hidden: mx.array, state: int | None) -> int:
        return 0

    def rewind(self, state: int, rows: int) -> int:
        return 0

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> int:
        return 1

    def draft(self, root: int, state: int, sampler: Sampler, key: mx.array) -> DraftTree:
        rng = np.random.default_rng(state)
        oracle = CorruptedOracle(self.answer, self.topology, self.vocab_size, rng=rng)
        return oracle.draft(root, state, sampler, key)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: int) -> int:
        return state + len(tokens)


def test_every_turn_says_what_a_fresh_run_says(family: LoadedTarget) -> None:
    if family.family.prefix:
        pytest.skip("its prompts are single questions, read at once")
    images = [random_image(seed=seed) for seed in (1, 2)]
    second = () if family.family.num_images[1] == 1 else images[1]
    loaded = replace(family, eos_ids=())
    plain = Model(loaded, None, "tiny", "none", "none", is_demo=False)
    vocab_size = family.target.vocab_size
    oracle = TurningOracle(SHAPES["tree"], vocab_size)
    accepted = rejected = 0
    for drafter in (oracle, paced(None, lambda _, greedy: FREE, lookup=NgramDrafter())):
        session = Session(replace(plain, drafter=drafter))
        for text, pictures in (("What is this?", images[0]), ("And?", ()), ("Why?", second)):
            fresh = Session(plain)
            fresh.messages = session.messages
            expected = fresh.ask(text, pictures, **SETTINGS).token_ids
            if isinstance(drafter, TurningOracle):
                drafter.answer = expected
            answer = session.ask(text, pictures, **SETTINGS)
            assert answer.token_ids == expected
            accepted += answer.stats.accepted
            rejected += answer.stats.drafted - answer.stats.accepted
            assert (answer.kept_tokens > 0) == (len(session.messages) > 2)
    assert min(accepted, rejected) >= 25
