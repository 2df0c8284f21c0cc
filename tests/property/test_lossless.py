"""Greedy: whatever the drafter proposes, the text is the target's."""

from hypothesis import given
from hypothesis import strategies as st

from flash_mlx.decode import NoDrafter
from flash_mlx.tree import Topology
from toy import OracleDrafter, RandomDrafter, ToyTarget, generate, greedy_oracle, steady, topologies

V = 7

targets = st.builds(
    ToyTarget,
    vocab_size=st.just(V),
    max_context=st.none() | st.integers(6, 20),
    seed=st.integers(0, 50),
)
prompts = st.lists(st.integers(0, V - 1), min_size=1, max_size=6)
budgets = st.integers(1, 24)
stops = st.sets(st.integers(0, V - 1), max_size=2)


@steady
@given(
    target=targets,
    prompt=prompts,
    topology=topologies(),
    budget=budgets,
    stop_ids=stops,
    corruption=st.sampled_from([0.0, 0.2, 0.5]),
    laws=st.booleans(),
)
def test_greedy_tokens_are_the_targets(
    target: ToyTarget,
    prompt: list[int],
    topology: Topology,
    budget: int,
    stop_ids: set[int],
    corruption: float,
    laws: bool,
) -> None:
    drafter = OracleDrafter(topology, target, laws, corruption)
    expected = greedy_oracle(target, prompt, budget, stop_ids)
    assert generate(target, drafter, prompt, budget, stop_ids=stop_ids) == expected


@steady
@given(target=targets, prompt=prompts, topology=topologies(), budget=budgets, laws=st.booleans())
def test_a_drafter_that_knows_nothing_does_no_harm(
    target: ToyTarget, prompt: list[int], topology: Topology, budget: int, laws: bool
) -> None:
    drafter = RandomDrafter(topology, V, laws)
    assert generate(target, drafter, prompt, budget) == greedy_oracle(target, prompt, budget)


@steady
@given(target=targets, prompt=prompts, budget=budgets, stop_ids=stops)
def test_no_drafter_is_plain_decoding(
    target: ToyTarget, prompt: list[int], budget: int, stop_ids: set[int]
) -> None:
    expected = greedy_oracle(target, prompt, budget, stop_ids)
    assert generate(target, NoDrafter(), prompt, budget, stop_ids=stop_ids) == expected


@steady
@given(target=targets, prompt=prompts, num_drafts=st.integers(0, 6), budget=budgets)
def test_perfect_drafts_are_all_accepted(
    target: ToyTarget, prompt: list[int], num_drafts: int, budget: int
) -> None:
    drafter = OracleDrafter(Topology.chain(num_drafts), target, laws=False, corruption=0.0)
    text = generate(target, drafter, prompt, budget)
    rest = len(text) - 1
    assert target.passes == -(-rest // (num_drafts + 1))
