"""Penalties, biases and processors: the text is that of plain decoding with them.

The oracle re-reads the whole text for each token and passes its logits through mlx-vlm's own
processors, then through the user's.

Shapes:
    H: tokens of a text.    V: vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_vlm.sample_utils import make_logits_processors

from flash_mlx.decode import Drafter, NoDrafter
from flash_mlx.penalties import Penalties
from flash_mlx.processed import LogitsProcessor, ProcessedTarget
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology
from law import assert_law
from toy import (
    OracleDrafter,
    RandomDrafter,
    ToyTarget,
    exact_law,
    generate,
    greedy_oracle,
    steady,
    topologies,
)


def never_twice_in_a_row(tokens: mx.array, logits: mx.array) -> mx.array:
    """Change the array that came, as many processors do."""
    logits[:, tokens[-1]] = -mx.inf
    return logits


def by_the_whole_text(tokens: mx.array, logits: mx.array) -> mx.array:
    """Favour a token that depends on every token of the text, the prompt's too."""
    places = mx.arange(1, len(tokens) + 1)
    favourite = (tokens * places).sum() % logits.shape[1]
    return logits + 2.0 * (mx.arange(logits.shape[1]) == favourite)


@dataclass(frozen=True)
class Reader:
    """Stands for a `ToyTarget` where the oracles read: its logits are processed."""

    target: ToyTarget
    num_prompt: int
    penalties: dict[str, Any]
    processors: Sequence[LogitsProcessor]

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    @property
    def max_context(self) -> int | None:
        return self.target.max_context

    def read(self, text: Sequence[int]) -> mx.array:
        """Return the logits [1, V] that follow a text [H]."""
        logits = self.target.read(text)[-1:]
        for processor in make_logits_processors(**self.penalties):
            logits = processor(mx.array(text[self.num_prompt - 1 :]), logits)
        for processor in self.processors:
            logits = processor(mx.array(text), logits)
        return logits


V = 7

few = settings(steady, max_examples=60)
targets = st.builds(
    ToyTarget,
    vocab_size=st.just(V),
    max_context=st.none() | st.integers(6, 20),
    seed=st.integers(0, 50),
)
prompts = st.lists(st.integers(0, V - 1), min_size=1, max_size=6)
budgets = st.integers(1, 16)
sizes = st.integers(1, 9)
penalties = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 0.6, 1.3, 3.0]),
        "presence_penalty": st.sampled_from([0.0, -0.7, 1.1]),
        "frequency_penalty": st.sampled_from([0.0, -0.3, 0.9]),
        "repetition_context_size": sizes,
        "presence_context_size": sizes,
        "frequency_context_size": sizes,
        "logit_bias": st.dictionaries(
            st.integers(0, V - 1), st.sampled_from([-np.inf, -1.0, 2.0]), max_size=2
        ),
    }
)
processors = st.lists(st.sampled_from([never_twice_in_a_row, by_the_whole_text]), max_size=2)


@few
@given(
    target=targets,
    prompt=prompts,
    topology=topologies(),
    budget=budgets,
    stop_ids=st.sets(st.integers(0, V - 1), max_size=1),
    corruption=st.sampled_from([0.0, 0.3]),
    penalties=penalties,
    processors=processors,
)
def test_greedy_tokens_are_those_of_plain_decoding(
    target: ToyTarget,
    prompt: list[int],
    topology: Topology,
    budget: int,
    stop_ids: set[int],
    corruption: float,
    penalties: dict[str, Any],
    processors: list[LogitsProcessor],
) -> None:
    reader = Reader(target, len(prompt), penalties, processors)
    expected = greedy_oracle(reader, prompt, budget, stop_ids)
    drafter = OracleDrafter(topology, reader, laws=False, corruption=corruption)
    processed = ProcessedTarget(target, Penalties(**penalties), processors)
    assert generate(processed, drafter, prompt, budget, stop_ids=stop_ids) == expected


@few
@given(target=targets, prompt=prompts, budget=budgets, penalties=penalties, processors=processors)
def test_no_drafter_is_plain_decoding(
    target: ToyTarget,
    prompt: list[int],
    budget: int,
    penalties: dict[str, Any],
    processors: list[LogitsProcessor],
) -> None:
    expected = greedy_oracle(Reader(target, len(prompt), penalties, processors), prompt, budget)
    processed = ProcessedTarget(target, Penalties(**penalties), processors)
    assert generate(processed, NoDrafter(), prompt, budget) == expected


TARGET = ToyTarget(4, seed=3)
PROMPT = (1, 2)
SETTINGS = {
    "repetition_penalty": 2.5,
    "presence_penalty": 0.8,
    "frequency_penalty": 0.6,
    "repetition_context_size": 2,
    "presence_context_size": 3,
    "logit_bias": {2: 0.5},
}
PROCESSORS = (by_the_whole_text,)
READER = Reader(TARGET, len(PROMPT), SETTINGS, PROCESSORS)
FORKED = Topology((-1, 0, 0, 1, 1, 2))
LAW_DRAFTERS: dict[str, Callable[[], Drafter[Any]]] = {
    "siblings with laws": lambda: RandomDrafter(FORKED, 4, laws=True, sharpness=2.0),
    "deterministic tree": lambda: RandomDrafter(FORKED, 4, laws=False, sharpness=2.0),
    "good chain with laws": lambda: OracleDrafter(
        Topology.chain(2), READER, laws=True, corruption=0.3
    ),
    "no drafter": NoDrafter,
}


@pytest.mark.parametrize("drafter", LAW_DRAFTERS)
def test_three_tokens_in_a_row_have_the_joint_law_of_plain_sampling(drafter: str) -> None:
    sampler = Sampler(temperature=1.3, top_p=0.9)
    law = exact_law(READER, PROMPT, sampler, 3)
    assert np.abs(law - exact_law(TARGET, PROMPT, sampler, 3)).sum() / 2 > 0.5
    target = ProcessedTarget(TARGET, Penalties(**SETTINGS), PROCESSORS)
    counts = np.zeros((4, 4, 4))
    for key in mx.random.split(mx.random.key(5), 700):
        tokens = generate(target, LAW_DRAFTERS[drafter](), PROMPT, 3, sampler=sampler, key=key)
        counts[tuple(tokens)] += 1
    assert_law(counts, law)
    assert_law(counts.sum(axis=0), law.sum(axis=0))
    assert_law(counts.sum(axis=2), law.sum(axis=2))


@dataclass(frozen=True)
class Stubborn:
    """Drafts one token all the time."""

    token: int
    laws: bool

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> None: ...

    def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:
        topology = Topology((-1, 0, 1, 2))
        q = mx.broadcast_to(mx.arange(V) == self.token, (4, V)).astype(mx.float32)
        tokens = mx.array([root, *3 * [self.token]], dtype=mx.int32)
        return DraftTree(topology, tokens, q if self.laws else None)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: None) -> None: ...


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("laws", [True, False], ids=["laws", "deterministic"])
@pytest.mark.parametrize("bias", [-100.0, -np.inf])
def test_a_banned_token_is_never_said_however_often_it_is_drafted(
    temperature: float, laws: bool, bias: float
) -> None:
    target, sampler = ToyTarget(V, seed=1), Sampler(temperature)
    banned = max(range(V), key=generate(target, NoDrafter(), [1], 60, sampler=sampler).count)
    free = generate(target, Stubborn(banned, laws), [1], 60, sampler=sampler)
    assert free.count(banned) > 5
    processed = ProcessedTarget(target, Penalties(logit_bias={banned: bias}))
    tokens = generate(processed, Stubborn(banned, laws), [1], 60, sampler=sampler)
    assert banned not in tokens
    assert len(tokens) == 60
