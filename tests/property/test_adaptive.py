"""Drafting as much as pays changes nothing about the text, whatever rounds and drafts cost."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mlx.cost import Costs
from flash_mlx.decode import Drafter, Round, decode
from flash_mlx.draft import AdaptiveDrafter, FlashDrafter, NgramDrafter, sources
from flash_mlx.draft import adaptive as adaptive_module
from flash_mlx.draft.adaptive import paced
from flash_mlx.draft.offers import Log, Memory, Offer
from flash_mlx.draft.unseen import outcomes_of_shape, shape
from flash_mlx.pace import RISK, RISK_PER_TOKEN, Pace
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology
from flash_reference import SMALL, random_model
from identity import CorruptedOracle, ask, mlx_vlm_ids, run
from law import assert_law
from toy import KEY, OracleDrafter, ToyTarget, exact_law, generate, greedy_oracle

# Free rounds draft all they can; dear ones park; in between, trees of many sizes come and go.
CURVES = {
    "free": Costs(1.0, ((1, 1.0), (12, 1.0)), ((1, 0.01), (3, 0.01))),
    "middling": Costs(1.0, ((1, 1.05), (4, 1.3), (12, 2.6)), ((1, 0.1), (3, 0.2))),
    "dear": Costs(1.0, ((1, 1.1), (2, 1.7), (12, 9.0)), ((1, 0.1), (3, 0.3))),
    "two passes": Costs(1.0, ((1, 1.0), (16, 1.01)), ((1, 0.01), (3, 0.01), (4, 0.02), (6, 0.02))),
    "hopeless": Costs(1.0, ((1, 1.0), (2, 5.0)), ((1, 3.0), (3, 4.0))),
}
CHANGES = {"independent": {}, "in turn": {"hydra_size": 5}, "recurrent": {"recurrent_size": 4}}
CHANGES["trusted"] = {"recurrent_size": 4, "expected_acceptance": 0.97}  # whole blocks, unseen


def costs_of(curve: str) -> Callable[..., Costs]:
    return lambda num_rows, *, greedy: CURVES[curve]


@cache
def target_of(seed: int, vocab_size: int = 11) -> ToyTarget:
    return ToyTarget(vocab_size=vocab_size, seed=seed)


@cache
def flash(seed: int, changes: str, vocab_size: int = 11) -> FlashDrafter:
    target = target_of(seed, vocab_size)
    config = replace(SMALL, vocab_size=vocab_size, **CHANGES[changes])
    return FlashDrafter(random_model(config, seed), target.embed, target.lm_head)


def adaptive(
    drafter: Drafter[Any] | None, curve: str, *, lookup: bool = True, trees: bool = True
) -> AdaptiveDrafter:
    ngram = NgramDrafter() if lookup else None
    return AdaptiveDrafter(drafter, costs_of(curve), lookup=ngram, trees=trees)


def rounds_of(target: ToyTarget, drafter: Drafter[Any], budget: int) -> list[Round]:
    return list(
        decode(
            target,
            drafter,
            Prompt((1, 2, 3)),
            sampler=Sampler(),
            key=KEY,
            max_tokens=budget,
            stop_ids=(),
        )
    )


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 5),
    changes=st.sampled_from(sorted(CHANGES)),
    curve=st.sampled_from(sorted(CURVES)),
    lookup=st.booleans(),
    trees=st.booleans(),
    with_model=st.booleans(),
    prompt=st.lists(st.integers(0, 10), min_size=1, max_size=8),
    budget=st.integers(1, 40),
    stop_ids=st.sets(st.integers(0, 10), max_size=1),
)
def test_greedy_text_is_the_targets_own(
    seed: int,
    changes: str,
    curve: str,
    lookup: bool,
    trees: bool,
    with_model: bool,
    prompt: list[int],
    budget: int,
    stop_ids: set[int],
) -> None:
    target = target_of(seed)
    drafter = adaptive(
        flash(seed, changes) if with_model else None, curve, lookup=lookup, trees=trees
    )
    expected = greedy_oracle(target, prompt, budget, stop_ids)
    assert generate(target, drafter, prompt, budget, stop_ids=stop_ids) == expected


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 5),
    curve=st.sampled_from(sorted(CURVES)),
    corruption=st.sampled_from([0.0, 0.3, 0.8]),
    topology=st.sampled_from([Topology.chain(4), Topology((-1, 0, 0, 1, 1, 3))]),
    max_context=st.none() | st.integers(6, 20),
)
def test_any_drafter_can_be_paced(
    seed: int, curve: str, corruption: float, topology: Topology, max_context: int | None
) -> None:
    target = ToyTarget(seed=seed, max_context=max_context)
    oracle = OracleDrafter(topology, target, laws=False, corruption=corruption)
    text = generate(target, adaptive(oracle, curve), (1, 2), 30)
    assert text == greedy_oracle(target, (1, 2), 30)


@pytest.mark.parametrize("changes", ["independent", "in turn"])
@pytest.mark.parametrize(
    ("curve", "lookup"), [("free", False), ("free", True), ("two passes", False)]
)
def test_sampled_text_has_the_targets_law(changes: str, curve: str, lookup: bool) -> None:
    target, sampler, counts = target_of(0, 4), Sampler(temperature=0.9), np.zeros((4, 4))
    drafter = adaptive(flash(0, changes, 4), curve, lookup=lookup)
    prompt = [1, 2, 1, 2, 1]
    for key in mx.random.split(mx.random.key(1), 300):
        _, *pair = generate(target, drafter, prompt, 3, sampler=sampler, key=key)
        counts[tuple(pair)] += 1
    assert_law(counts, exact_law(target, prompt, sampler, 3).sum(axis=0))


@dataclass(frozen=True)
class Shaped:
    """A FLASH drafter that always drafts a tree of one shape."""

    drafter: FlashDrafter
    topology: Topology

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> Any:
        return self.drafter.prefill(prompt, hidden, root)

    def draft(self, root: int, state: Any, sampler: Sampler, key: mx.array) -> DraftTree:
        return self.drafter.draft(root, state, sampler, key, self.topology)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: Any) -> Any:
        return self.drafter.extend(hidden, tokens, state)


STATIC = Topology.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)])


@pytest.mark.parametrize("changes", sorted(CHANGES))
def test_trees_of_a_fixed_shape_change_nothing(changes: str) -> None:
    target, prompt = target_of(0, 4), [1, 2, 1]
    drafter = Shaped(flash(0, changes, 4), STATIC)
    assert generate(target, drafter, prompt, 30) == greedy_oracle(target, prompt, 30)
    sampler, counts = Sampler(temperature=0.9), np.zeros((4, 4))
    for key in mx.random.split(mx.random.key(2), 300):
        _, *pair = generate(target, drafter, prompt, 3, sampler=sampler, key=key)
        counts[tuple(pair)] += 1
    assert_law(counts, exact_law(target, prompt, sampler, 3).sum(axis=0))


def test_siblings_are_the_next_likely_tokens_and_differ() -> None:
    drafter = flash(1, "in turn")
    state = drafter.prefill(Prompt((1, 2, 3)), mx.random.normal((3, 16), key=KEY), 4)
    chain = drafter.draft(4, state, Sampler(), KEY).tokens.tolist()
    found = drafter.candidates(state, 3, 3)
    likely = [set(row) for row in found.tokens.tolist()]
    for sampler in (Sampler(), Sampler(temperature=1)):
        tree = drafter.draft(4, state, sampler, KEY, STATIC)
        tokens = tree.tokens.tolist()
        for children in STATIC.children:
            assert len({tokens[child] for child in children}) == len(children)
        if sampler.greedy:
            assert [tokens[row] for row in (0, 1, 4, 7)] == chain
            assert {tokens[row] for row in (1, 2, 3)} == likely[0]


@pytest.mark.parametrize("changes", ["independent", "in turn"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pacing", [True, False], ids=["paced", "fixed"])
def test_a_drafter_with_broken_weights_is_dropped(
    changes: str, temperature: float, pacing: bool
) -> None:
    target = target_of(4)
    model = random_model(replace(SMALL, **CHANGES[changes]))
    model.layers.o_proj.weight = model.layers.o_proj.weight * float("nan")
    broken = FlashDrafter(model, target.embed, target.lm_head)
    drafter = adaptive(broken, "free") if pacing else broken
    with pytest.warns(RuntimeWarning, match="goes on without it") as caught:
        text = generate(target, drafter, (1, 2), 20, sampler=Sampler(temperature=temperature))
    assert len(caught) == 1
    assert len(text) == 20
    if temperature == 0:
        assert text == greedy_oracle(target, (1, 2), 20)


def test_the_same_key_gives_the_same_text() -> None:
    for curve in CURVES:
        drafter, sampler = adaptive(flash(1, "in turn"), curve), Sampler(temperature=1)
        texts = [
            generate(target_of(1), drafter, (1, 2), 40, sampler=sampler, key=mx.random.key(seed))
            for seed in (5, 5, 6)
        ]
        assert texts[0] == texts[1] != texts[2]


def test_a_hopeless_drafter_is_parked_and_a_perfect_one_is_not() -> None:
    target = target_of(2)
    for corruption, curve in ((1.0, "middling"), (0.0, "hopeless")):
        oracle = OracleDrafter(Topology.chain(3), target, laws=False, corruption=corruption)
        rounds = rounds_of(target, adaptive(oracle, curve, lookup=False), 60)[1:]
        assert sum(each.parked for each in rounds) > 0.8 * len(rounds)
        assert all(each.num_drafted == 0 for each in rounds if each.parked)
    perfect = OracleDrafter(Topology.chain(3), target, laws=False, corruption=0.0)
    rounds = rounds_of(target, adaptive(perfect, "middling", lookup=False), 60)[1:]
    assert not any(each.parked for each in rounds)
    assert sum(each.num_accepted for each in rounds) == sum(each.num_drafted for each in rounds)


@pytest.mark.parametrize("lookup", [False, True], ids=["alone", "with lookup"])
def test_where_no_draft_can_pay_hardly_a_round_waits_for_the_host(lookup: bool) -> None:
    """A root alone that is not parked is not read ahead, so it costs more than plain decoding."""
    dear = Costs(1.0, ((1, 1.16), (2, 1.64), (4, 2.7), (8, 4.8)), ((1, 0.67), (3, 1.0)))
    target = target_of(2)
    drafter = paced(flash(2, "trusted"), lambda _, greedy: dear, lookup=NgramDrafter())
    if not lookup:
        drafter.lookup = None
    rounds = rounds_of(target, drafter, 100)[1:]
    assert sum(len(each.tokens) for each in rounds) == 99
    waited = [each for each in rounds if not each.parked and not each.num_drafted]
    assert len(waited) <= 2
    assert [token for each in rounds for token in each.tokens] == greedy_oracle(
        target, (1, 2, 3), 100
    )[1:]


def test_rows_that_were_not_read_while_parked_are_read_afterwards() -> None:
    """A drafter that is asked after a pause drafts as if it had been shown each round."""

    class Watched(FlashDrafter):
        def candidates(self, state: Any, depth: int, width: int) -> Any:
            lengths.append(state.length)
            return super().candidates(state, depth, width)

        def draft(self, root: int, state: Any, *rest: Any) -> DraftTree:
            lengths.append(state.length)
            return super().draft(root, state, *rest)

    target, lengths = target_of(3), []
    drafter = Watched(random_model(), target.embed, target.lm_head)
    rounds = rounds_of(target, adaptive(drafter, "middling", lookup=False), 110)
    assert any(each.parked for each in rounds)
    asked, length = [], 3
    for each in rounds[1:]:
        if each.num_drafted:
            asked.append(length)
        length += len(each.tokens)
    assert set(asked) <= set(lengths)
    assert len(asked) > 1


@pytest.mark.parametrize(("curve", "looks"), [("free", True), ("middling", False)])
def test_the_host_waits_for_drafts_where_that_is_cheap_and_nowhere_else(
    curve: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []

    def slots(found: Any) -> Any:
        waits.append(1)
        return sources.slots(found)

    monkeypatch.setattr(adaptive_module, "slots", slots)
    rounds = rounds_of(target_of(3), adaptive(flash(3, "in turn"), curve), 60)
    assert any(each.num_drafted for each in rounds)
    assert bool(waits) == looks


@pytest.mark.parametrize("trees", [True, False], ids=["tree", "chain"])
def test_ids_are_those_of_mlx_vlm(
    loaded: Any, trees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real architectures, with the text's own drafts besides those of an oracle."""
    prompt = ask(loaded, 1)
    expected = mlx_vlm_ids(loaded, prompt, 120, monkeypatch)
    oracle = CorruptedOracle(tuple(expected), Topology.chain(3), loaded.target.vocab_size)
    drafter = adaptive(oracle, "free", trees=trees)
    assert run(loaded.target, drafter, prompt, 120)[0] == expected
    alone = adaptive(None, "free", trees=trees)
    ids, accepted, rejected = run(loaded.target, alone, prompt, 120)
    assert ids == expected
    assert accepted + rejected > 0


def trees_of(drafter: AdaptiveDrafter, temperature: float, budget: int = 60) -> list[Topology]:
    """The trees that a text on the toy target is drafted with."""

    class Watched(AdaptiveDrafter):
        def draft(self, root: int, state: Any, sampler: Sampler, key: mx.array) -> DraftTree:
            tree = super().draft(root, state, sampler, key)
            found.append(tree.topology)
            return tree

    found: list[Topology] = []
    watched = Watched(drafter.drafter, drafter.costs, memory=drafter.memory)
    sampler = Sampler(temperature=temperature)
    generate(target_of(1), watched, (1, 2), budget, sampler=sampler)
    return found


def test_sampled_drafts_have_siblings_and_take_two_passes_where_rows_cost_nothing() -> None:
    free = trees_of(adaptive(flash(1, "in turn"), "two passes"), 1.0)
    assert max(max(tree.depth) for tree in free) > 3  # the block of one pass
    assert sum(not tree.is_chain for tree in free) > len(free) / 2
    alone = trees_of(adaptive(flash(1, "in turn"), "free"), 1.0)
    assert max(max(tree.depth) for tree in alone) == 3  # a second pass was not measured


def test_greedy_drafts_take_a_second_pass_where_that_pays() -> None:
    for changes in ("independent", "trusted"):
        trees = trees_of(adaptive(flash(1, changes), "two passes"), 0.0)
        assert max(max(tree.depth) for tree in trees) > 3


def remembering(drafter: Drafter[Any], curve: str, memory: Memory) -> AdaptiveDrafter:
    return paced(drafter, costs_of(curve), memory=memory)


def test_what_was_of_no_use_in_one_text_is_tried_less_in_the_next() -> None:
    target, memory = target_of(2), Memory()
    useless = OracleDrafter(Topology.chain(3), target, laws=False, corruption=1.0)
    drafted = []
    for _ in range(4):
        rounds = rounds_of(target, remembering(useless, "middling", memory), 40)
        drafted.append(sum(each.num_drafted for each in rounds))
    assert drafted[0] > 0
    assert sum(drafted[1:]) < 2 * drafted[0]
    good = OracleDrafter(Topology.chain(3), target, laws=False, corruption=0.0)
    rounds = [rounds_of(target, remembering(good, "middling", memory), 60) for _ in range(8)]
    assert sum(each.num_drafted for each in rounds[-1]) > 20  # it is found out


def test_a_sampled_text_does_not_depend_on_earlier_texts() -> None:
    target, memory, sampler = target_of(1), Memory(), Sampler(temperature=1)
    drafter = remembering(flash(1, "in turn"), "middling", memory)
    before = generate(target, drafter, (1, 2), 40, sampler=sampler)
    assert memory.last is None  # nor do later texts depend on it
    for prompt in ((3,), (4, 5)):
        generate(target, drafter, prompt, 40)
    known = memory.last
    assert known is not None
    assert generate(target, drafter, (1, 2), 40, sampler=sampler) == before
    assert memory.last is known


def pausing(curve: str, wait: int) -> tuple[Offer, tuple[int, ...]]:
    """The first round of a pause that a text ended in."""
    return Offer(replace(Pace.begin(CURVES[curve]), wait=wait), ahead=True), (7,)


@pytest.mark.parametrize("kept", [0, 2**24], ids=["read at once", "read when asked"])
def test_a_parked_drafter_reads_the_prompt_when_it_is_asked(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_module, "KEPT", kept)
    drafter = flash(3, "in turn")
    memory = Memory(pausing("middling", 5), paused=1)
    lazy = remembering(drafter, "middling", memory)
    prompt, hidden = Prompt((1, 2, 3, 4)), mx.random.normal((4, 16), key=KEY)
    state = lazy.read(prompt, 2, hidden[2:], lazy.read(prompt, 0, hidden[:2], None))
    assert (state.main is None) == (kept > 0)
    eager = drafter.read(prompt, 0, hidden, None)
    shown = drafter.extend(hidden[-1:], (5,), eager)
    assert mx.allclose(lazy._read(lazy.extend(hidden[-1:], (5,), state)).slots, shown.slots)
    again = lazy.rewind(lazy.extend(hidden[-1:], (5,), state), 2)
    assert again.main.length == drafter.rewind(shown, 2).length


@pytest.mark.parametrize("rows", [3, 100])
def test_rows_kept_for_a_parked_drafter_are_bounded(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_module, "KEPT", rows * 16)
    drafter = flash(3, "in turn")
    lazy = adaptive(drafter, "hopeless", lookup=False)
    hidden = mx.random.normal((12, 16), key=KEY)
    prompt = Prompt((1, 2))
    state, eager = (each.prefill(prompt, hidden[:2], 3) for each in (lazy, drafter))
    kept = []
    for place in range(2, 12):
        state = lazy.extend(hidden[place : place + 1], (place - 1,), state)
        eager = drafter.extend(hidden[place : place + 1], (place - 1,), eager)
        kept.append(sum(len(each) for each, _ in state.unread))
    assert max(kept) == min(rows, 10)
    assert mx.allclose(lazy._read(state).slots, eager.slots, atol=1e-5)


def test_a_tree_of_another_drafter_is_cut_to_what_may_be_lost() -> None:
    target, curve = target_of(2), CURVES["middling"]
    wide = Topology((-1, *[0] * 4, *[1] * 4))
    oracle = OracleDrafter(wide, target, laws=False, corruption=1.0)
    rounds = rounds_of(target, adaptive(oracle, "middling", lookup=False), 60)
    drafted = [each for each in rounds if each.num_drafted]
    assert 1 < drafted[0].num_drafted < 8
    costs = [curve.round(1 + each.num_drafted) + curve.draft(2) for each in drafted]
    lost = sum(costs) - sum(len(each.tokens) for each in drafted)
    assert lost <= RISK + RISK_PER_TOKEN * 60 + 1e-6


def test_spares_are_drafted_where_first_choices_fail_and_rows_are_cheap() -> None:
    for curve, belief, chain in (("two passes", 0.8, False), ("middling", 0.97, True)):
        pace = Pace.begin(CURVES[curve], belief)
        assert (shape(pace, 3, 3, 1) is None) == chain
    free = Pace.begin(CURVES["two passes"], 0.8)
    in_turn, independent = (shape(free, 3, 3, count) or () for count in (1, 3))
    assert all(node.path[:-1] == (0,) * (len(node.path) - 1) for node in in_turn)
    assert any(node.path[:-1] != (0,) * (len(node.path) - 1) for node in independent)
    for nodes in (in_turn, independent):  # elders come first, so ranks are those of the tree
        topology = Topology((-1, *(node.parent for node in nodes)))
        assert [node.path[-1] for node in nodes] == list(topology.ranks[1:])


def test_what_became_of_a_tree_that_nobody_had_looked_at() -> None:
    pace = Pace.begin(CURVES["two passes"], 0.8)
    nodes = shape(pace, 2, 3, 1) or ()
    drafts = [9, *(10 * len(node.path) + node.path[-1] for node in nodes)]
    found = outcomes_of_shape(pace, nodes, drafts, (10, 21, 5))
    hits = {kind: [hit for _, hit in each] for kind, each in found.items()}
    assert hits == {("draft", 0): [True], ("draft", 1): [False], ("spare", 1): [True]}
    found = outcomes_of_shape(pace, nodes, drafts, (12, 5))
    hits = {kind: [hit for _, hit in each] for kind, each in found.items()}
    assert hits == {("draft", 0): [False], ("spare", 1): [False], ("spare", 2): [True]}


@dataclass
class Counted:
    """A drafter whose drafts are wrong, which counts what it is asked to do."""

    target: ToyTarget
    prompts: int = 0
    rows: int = 0
    rows_at: list[int] = field(default_factory=list)  # before each draft

    @property
    def drafts(self) -> int:
        return len(self.rows_at)

    def read(self, prompt: Prompt, start: int, hidden: mx.array, state: None) -> None:
        self.prompts += 1

    def rewind(self, state: None, rows: int) -> None:
        pass

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> None:
        pass

    def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:
        self.rows_at.append(self.rows)
        wrong = (root + 1) % self.target.vocab_size
        return DraftTree(Topology.chain(3), mx.array([root] + 3 * [wrong], dtype=mx.int32))

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: None) -> None:
        self.rows += hidden.shape[0]


def test_a_pause_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounds do no more than plain decoding: no costs, no pace, no reading, no copying."""
    target, asked = target_of(2), {"costs": 0, "paces": 0, "lists": set()}

    def costs(num_rows: int, *, greedy: bool) -> Costs:
        asked["costs"] += 1
        return CURVES["middling"]

    class Watched(type(paced(None, costs))):
        def draft(self, *args: Any) -> DraftTree:
            tree = super().draft(*args)
            hints.append(tree.lookahead)
            return tree

        def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: Any) -> Any:
            state = super().extend(hidden, tokens, state)
            asked["lists"].add(id(state.unread.entries))
            kept.append(state.unread.entries)
            return state

    def count(pace: Pace, num_rounds: int) -> Pace:
        asked["paces"] += 1
        return parked(pace, num_rounds)

    hints: list[bool] = []
    kept: list[Any] = []  # so that no list's place is used again
    parked = Pace.parked
    monkeypatch.setattr(Pace, "parked", count)
    useless = Counted(target)
    memory = Memory(pausing("middling", 80), paused=1)
    drafter = Watched(useless, costs, lookup=NgramDrafter(), memory=memory)
    rounds = rounds_of(target, drafter, 80)[1:]
    assert [len(each.tokens) for each in rounds] == [1] * 79
    assert all(each.parked for each in rounds)
    # The pace is asked for by the prompt and by the pause, costs by the pause alone.
    assert asked == {"costs": 1, "paces": 2, "lists": asked["lists"]}
    assert len(asked["lists"]) <= 2  # before the first round, and after
    assert (useless.prompts, useless.rows, useless.drafts) == (0, 0, 0)
    assert memory.paused == 79
    assert memory.last is not None
    assert memory.last[0].pace.wait == 79
    assert hints == [True] * 78 + [False]  # the pass after a pause may be one over drafts


def test_a_pause_is_as_long_as_was_decided_and_then_all_of_it_is_read() -> None:
    target = target_of(2)
    useless, memory = Counted(target), Memory(pausing("middling", 20), paused=1)
    rounds = rounds_of(target, remembering(useless, "middling", memory), 40)[1:21]
    assert [each.num_drafted > 0 for each in rounds] == [False] * 19 + [True]
    assert [each.parked for each in rounds] == [True] * 19 + [False]
    assert useless.prompts == 1
    assert useless.rows_at[0] == 20  # the prompt's last one, and those of the pause


@pytest.mark.parametrize("budget", [15, 40], ids=["within", "after"])
def test_the_text_of_a_pause_is_heard_when_it_is_looked_up(budget: int) -> None:
    class Watched(AdaptiveDrafter):
        def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: Any) -> Any:
            states.append(super().extend(hidden, tokens, state))
            return states[-1]

    states: list[Any] = []
    target, lookup, memory = target_of(2), NgramDrafter(), Memory(pausing("middling", 20), 1)
    drafter = Watched(flash(2, "in turn"), costs_of("middling"), lookup=lookup, memory=memory)
    rounds = rounds_of(target, drafter, budget)
    said = tuple(token for each in rounds for token in each.tokens)
    prompt, hidden = Prompt((1, 2, 3)), mx.zeros((3, 1))
    expected = lookup.extend(hidden, said, lookup.read(prompt, 0, hidden, None))
    heard = drafter._heard(states[-1])
    assert heard is not None
    assert (heard.length, heard.drafts) == (expected.length, expected.drafts)


def test_a_drafter_that_did_not_pay_reads_a_prompt_only_for_a_draft() -> None:
    target, memory = target_of(2), Memory()
    useless = Counted(target)
    drafter = remembering(useless, "middling", memory)
    drafts = []
    for _ in range(25):
        prompts, before = useless.prompts, useless.drafts
        rounds_of(target, drafter, 40)
        drafts.append(useless.drafts - before)
        first = len(drafts) == 1  # nothing is known yet
        assert useless.prompts - prompts == (1 if first else min(1, drafts[-1]))
    assert drafts[0] > 0
    assert drafts.count(0) > 15
    assert sum(drafts[1:]) > 0  # it is tried now and then


def test_what_the_last_round_of_a_text_lost_is_known_to_the_next() -> None:
    """Texts so short that one round ends them would else each try in vain."""
    target, memory = target_of(2), Memory()
    useless = Counted(target)
    for _ in range(30):
        rounds_of(target, remembering(useless, "middling", memory), 2)
    assert 0 < useless.drafts <= 3


def test_logs_that_grew_from_one_another_do_not_change_each_other() -> None:
    log: Log[int] = Log()
    first = log.then(1)
    second = first.then(2)
    other = first.then(3)
    assert [list(each) for each in (log, first, second, other)] == [[], [1], [1, 2], [1, 3]]
    assert second.entries is first.entries
    assert (len(log), len(other)) == (0, 2)
