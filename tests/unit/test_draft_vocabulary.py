"""Drafters that may propose some of the target's tokens alone.

Shapes:
    V: vocabulary.    U: tokens that may be proposed.    k: slots.    D: hidden size.
"""

from dataclasses import replace
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mlx.checkpoint import load_drafter, load_model, save_drafter
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel
from flash_mlx.draft.vocabulary import RowsHead, check_ids, frequent_ids, head_of, spread
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets.head import Head
from flash_mlx.train import Teacher, Trainer
from flash_mlx.train.config import configure
from flash_mlx.train.data import collate
from flash_mlx.train.initial import propose_frequent
from flash_mlx.train.losses import LossWeights, objective
from flash_mlx.train.teacher import slot_outputs
from flash_mlx.tree import Topology
from flash_reference import SMALL, random_model
from law import assert_law
from toy import KEY, ToyTarget, exact_law, generate, greedy_oracle
from training import EXAMPLES, parameters

GREEDY, WARM = Sampler(), Sampler(temperature=0.8, top_p=0.9)
TARGET = ToyTarget()
TEACHER = Teacher.of(TARGET)
BATCH = collate(EXAMPLES, 2, 3)
SOME = [1, 2, 5, 6, 9]
CORRECTIONS = [
    {},
    {"markov_rank": 3},
    {"hydra_size": 5},
    {"recurrent_size": 4},
    {"markov_rank": 3, "recurrent_size": 4},
]
TREE = Topology((-1, 0, 0, 0, 1, 1, 4))


def proposing(ids, config: FlashConfig = SMALL) -> FlashModel:
    """A model that may propose these tokens, and otherwise has the weights of one without."""
    whole = random_model(config)
    model = FlashModel(replace(config, draft_vocab_size=len(ids)))
    weights = dict(whole.parameters())
    if config.markov_rank:
        weights["markov"]["next"] = weights["markov"]["next"][mx.array(list(ids))]
    model.update(weights | {"draft_ids": mx.array(list(ids), dtype=mx.int32)})
    return model


def state_of(drafter, seed=0):
    hidden = mx.random.normal((7, 16), key=mx.random.key(seed))
    return drafter.prefill(Prompt((1, 2, 3, 4, 5, 6, 7)), hidden, 8)


def both(changes, ids, seed=0):
    """A drafter with all tokens and one with some, the same otherwise, each in the same state."""
    config = replace(SMALL, **changes)
    models = random_model(config), proposing(ids, config)
    drafters = [FlashDrafter(model, TARGET.embed, TARGET.lm_head) for model in models]
    return [(drafter, state_of(drafter, seed)) for drafter in drafters]


@pytest.mark.parametrize("topology", [None, Topology.chain(5), TREE], ids=["one", "two", "tree"])
@pytest.mark.parametrize("sampler", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("changes", CORRECTIONS)
def test_who_may_propose_all_tokens_drafts_the_same_bits(changes, sampler, topology):
    for seed in range(3):
        trees = [
            drafter.draft(8, state, sampler, mx.random.key(seed), topology)
            for drafter, state in both(changes, range(11), seed)
        ]
        assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
        if not sampler.greedy:
            assert mx.array_equal(*(tree.probs for tree in trees))


def unlikely(hidden: mx.array) -> mx.array:
    """The target's LM head, as if it never said what may not be proposed."""
    mine = (mx.arange(11)[:, None] == mx.array(SOME)).any(axis=1)
    return mx.where(mine, TARGET.lm_head(hidden), -1e9)


@pytest.mark.parametrize("entries", [2**24, 0], ids=["tables", "no tables"])
@pytest.mark.parametrize("changes", CORRECTIONS)
def test_drafts_are_those_of_a_target_that_says_nothing_else(changes, entries, monkeypatch):
    monkeypatch.setattr("flash_mlx.draft.in_turn.TABLE_LIMIT", entries)
    config = replace(SMALL, **changes)
    whole = FlashDrafter(random_model(config), TARGET.embed, unlikely)
    some = FlashDrafter(proposing(SOME, config), TARGET.embed, TARGET.lm_head)
    for seed in range(4):
        states = state_of(whole, seed), state_of(some, seed)
        for topology in (Topology.chain(5), TREE):
            trees = [
                drafter.draft(8, state, GREEDY, KEY, topology).tokens.tolist()
                for drafter, state in zip((whole, some), states, strict=True)
            ]
            assert trees[0] == trees[1]
            assert set(trees[1][1:]) <= set(SOME)
        wanted, found = (
            drafter.candidates(state, 5, 3)
            for drafter, state in zip((whole, some), states, strict=True)
        )
        order = [mx.argsort(each.tokens, axis=-1) for each in (wanted, found)]
        for name, exact in (("tokens", 0), ("logprobs", 1e-4)):
            pair = [
                np.array(mx.take_along_axis(getattr(each, name), rank, axis=-1))
                for each, rank in zip((wanted, found), order, strict=True)
            ]
            np.testing.assert_allclose(*pair, atol=exact)
        tree = some.draft(8, states[1], WARM, KEY, TREE)
        laws, drawn = np.array(tree.probs), tree.tokens.tolist()
        assert laws.shape == (len(TREE), 11)
        assert (np.delete(laws, SOME, axis=1) == 0).all()
        first = whole.draft(8, states[0], WARM, KEY).probs[0]
        np.testing.assert_allclose(laws[0], first, atol=1e-5)
        np.testing.assert_allclose(laws[[0, 1, 4]].sum(-1), 1, atol=1e-5)
        assert set(drawn[1:]) <= set(SOME)
        eldest = [row for row, rank in enumerate(TREE.ranks) if row and rank == 0]
        assert all(laws[TREE.parents[row], drawn[row]] > 0 for row in eldest)


@pytest.mark.parametrize("changes", [{}, CORRECTIONS[-1]], ids=["independent", "corrected"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    prompt=st.lists(st.integers(0, 10), min_size=1, max_size=6),
    num_tokens=st.integers(1, 14),
    ids=st.sets(st.integers(0, 10), min_size=4, max_size=8),
)
def test_greedy_text_is_the_targets_own(changes, prompt, num_tokens, ids):
    model = proposing(sorted(ids), replace(SMALL, **changes))
    drafter = FlashDrafter(model, TARGET.embed, TARGET.lm_head)
    assert generate(TARGET, drafter, prompt, num_tokens) == greedy_oracle(
        TARGET, prompt, num_tokens
    )


class Bushy(FlashDrafter):
    """Drafts a tree with siblings."""

    def draft(self, root, state, sampler, key, topology=None):
        return super().draft(root, state, sampler, key, Topology((-1, 0, 0, 0, 1)))


@pytest.mark.parametrize("kind", [FlashDrafter, Bushy], ids=["chain", "tree"])
def test_two_sampled_tokens_have_the_targets_joint_law(kind):
    target, sampler = ToyTarget(vocab_size=5), Sampler(temperature=1.0)
    law = exact_law(target, [1, 2], sampler, 3).sum(axis=0)
    likeliest = int(law.sum(axis=1).argmax())  # may not be proposed
    ids = [token for token in range(5) if token != likeliest]
    model = proposing(ids, replace(SMALL, vocab_size=5, markov_rank=2))
    drafter, counts = kind(model, target.embed, target.lm_head), np.zeros((5, 5))
    for key in mx.random.split(mx.random.key(1), 500):
        _, *pair = generate(target, drafter, [1, 2], 3, sampler=sampler, key=key)
        counts[tuple(pair)] += 1
    assert law[likeliest].sum() > 0.3
    for axis in (0, 1):
        assert_law(counts.sum(axis=axis), law.sum(axis=axis))
    assert_law(counts, law)


def linear(bias=False):
    layer = nn.Linear(64, 40, bias=bias)
    layer.weight = mx.random.normal((40, 64), key=KEY)
    return layer


def embedding():
    layer = nn.Embedding(40, 64)
    layer.weight = mx.random.normal((40, 64), key=KEY)
    return layer


class Doubled(nn.Linear):
    """A layer that does more than its weights say."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def doubled():
    layer = Doubled(64, 40, bias=False)
    layer.weight = mx.random.normal((40, 64), key=KEY)
    return layer


HEADS = {
    "plain": lambda: Head(linear()),
    "biased": lambda: Head(linear(bias=True)),
    "tied": lambda: Head(embedding(), tied=True),
    "4 bits": lambda: Head(linear().to_quantized(32, 4)),
    "8 bits, biased": lambda: Head(linear(bias=True).to_quantized(64, 8)),
    "4 bits, tied": lambda: Head(embedding().to_quantized(32, 4), tied=True),
    "bounded": lambda: Head(linear(), bound=2.0),
    "unknown": lambda: Head(doubled()),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_part_of_a_head_says_what_the_head_says(name):
    head, hidden = HEADS[name](), mx.random.normal((5, 64), key=mx.random.key(1))
    ids = mx.array([0, 3, 4, 17, 30, 39])
    part, wanted = head.of(ids), head(hidden)[:, ids]
    np.testing.assert_allclose(part(hidden), wanted, rtol=1e-5, atol=1e-5)
    assert part(hidden).shape == (5, 6)
    assert mx.array_equal(head.of(mx.arange(40))(hidden), head(hidden))
    if name == "unknown":
        return
    assert isinstance(part, RowsHead)
    assert part.nbytes * 40 == head.nbytes * 6  # as it was stored, quantised or not
    assert (part.packed is None) == (head.packed is None)
    places, logprobs = part.best_tokens(hidden, 2)
    order = np.argsort(-np.array(wanted), axis=-1)[:, :2]
    assert np.array(places).tolist() == order.tolist()
    told = wanted - mx.logsumexp(wanted, axis=-1, keepdims=True)
    np.testing.assert_allclose(logprobs, np.take_along_axis(np.array(told), order, -1), atol=1e-5)


def test_rows_are_gathered_where_a_head_gives_them_and_chosen_where_not():
    head, ids = HEADS["plain"](), mx.array([2, 7, 11])
    assert head_of(head, None) is head
    assert isinstance(head_of(head, ids), Head)
    hidden = mx.random.normal((2, 64), key=KEY)
    plain = head_of(lambda rows: head(rows), ids)
    assert not isinstance(plain, RowsHead)
    np.testing.assert_allclose(plain(hidden), head_of(head, ids)(hidden), atol=1e-5)


@pytest.mark.parametrize("corrected", [{}, {"recurrent_size": 8}], ids=["free", "in turn"])
def test_a_drafter_reads_a_real_targets_rows_and_counts_them(llava, corrected):
    target = llava.target
    size, ids = target.hidden_size, [0, 2, 40, 41, 300, 399]
    config = FlashConfig(size, 400, 3, 2, num_heads=2, head_dim=16, **corrected)
    whole = FlashDrafter(random_model(config), target.embed, target.lm_head)
    some = FlashDrafter(proposing(ids, config), target.embed, target.lm_head)
    around = FlashDrafter(proposing(ids, config), target.embed, lambda h: target.lm_head(h))
    assert (whole.head_bytes, around.head_bytes) == (0, 0)
    assert some.head_bytes == 4 * len(ids) * size
    prompt, hidden = Prompt((1, 2, 3)), mx.random.normal((3, size), key=KEY)
    trees = [
        drafter.draft(4, drafter.prefill(prompt, hidden, 4), GREEDY, KEY).tokens.tolist()
        for drafter in (some, around)
    ]
    assert trees[0] == trees[1]
    assert set(trees[0][1:]) <= set(ids)


def test_laws_are_spread_and_nothing_else_is_said():
    rows = mx.array([[1.0, 2.0], [3.0, 4.0]])
    assert spread(rows, mx.array([1, 3]), 5, 0).tolist() == [[0, 1, 0, 2, 0], [0, 3, 0, 4, 0]]
    assert spread(rows, None, 2, 0) is rows


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0, 2, 1, 3], "number 2 is 1, after 2"),
        ([0, 2, 2, 3], "number 2 is 2, after 2"),
        ([-1, 0, 1, 2], "number 0 is -1"),
        ([1, 2, 3, 11], "from 0 to 10 and none twice; number 3 is 11"),
    ],
)
def test_ids_that_cannot_be_are_refused(ids, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        check_ids(mx.array(ids), 11)
    save_drafter(proposing(ids), tmp_path, {})
    with pytest.raises(ValueError, match=rf"model.safetensors: .*{words}") as raised:
        load_drafter(tmp_path, TARGET)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (mx.array([1, 2, 3], dtype=mx.int32), r"draft_ids must have the shape \(5,\)"),
        (mx.array([1.0, 2, 3, 4, 5]), "one of the types U32, I32; .* F32"),
        (None, "draft_ids missing"),
    ],
)
def test_a_file_without_the_right_ids_is_refused(ids, words, tmp_path):
    save_drafter(proposing(SOME), tmp_path, {})
    file = str(tmp_path / "model.safetensors")
    weights = {name: value for name, value in mx.load(file).items() if name != "draft_ids"}
    mx.eval(weights)
    mx.save_safetensors(file, weights if ids is None else weights | {"draft_ids": ids})
    with pytest.raises(ValueError, match=words):
        load_drafter(tmp_path, TARGET)


@pytest.mark.parametrize("size", [-1, 1, 3, 12])
def test_a_number_of_tokens_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match=f"draft_vocab_size of a drafter .*got {size}"):
        replace(SMALL, draft_vocab_size=size)


def test_ids_come_back_from_the_disk_and_are_no_weights_to_learn(tmp_path):
    save_drafter(proposing(SOME), tmp_path, {}, mx.float16)
    model = load_model(tmp_path)
    assert model.proposed_ids.tolist() == SOME
    assert model.draft_ids.dtype == mx.int32
    assert "draft_ids" not in model.trainable_parameters()
    assert random_model().proposed_ids is None


def test_the_most_frequent_tokens_are_chosen():
    counts = np.array([0, 5, 1, 0, 9, 1, 0])
    assert frequent_ids(counts, 3).tolist() == [1, 2, 4]
    assert frequent_ids(counts, 3, [6, 99]).tolist() == [1, 4, 6]
    assert frequent_ids(counts, 6).tolist() == [0, 1, 2, 3, 4, 5]
    model = FlashModel(replace(SMALL, draft_vocab_size=4))
    answers = [(3, 3, 3, 8, 9), (9, 9, 10, 8)]
    assert propose_frequent(model, answers, [0]) == pytest.approx(8 / 9)
    assert model.draft_ids.tolist() == [0, 3, 8, 9]
    assert propose_frequent(random_model(), answers, [0]) == 1


def test_a_text_is_drafted_from_some_tokens_and_says_others():
    drafter = FlashDrafter(proposing(SOME), TARGET.embed, TARGET.lm_head)
    accepted, said = 0, set()
    for prompt in [[a, b] for a, b in product(range(11), repeat=2)][::6]:
        before = TARGET.passes
        text = generate(TARGET, drafter, prompt, 9)
        accepted += 8 - (TARGET.passes - before)
        said |= set(text)
        assert text == greedy_oracle(TARGET, prompt, 9)
    assert accepted > 0
    assert said - set(SOME)


def taught(model: FlashModel, weights: LossWeights):
    """Loss, agreement, the LM head's inputs [n, k, D], the batch, and what is taught [m, D]."""
    inputs, hidden = BATCH.inputs, TEACHER.hidden(BATCH)
    states = hidden.reshape(-1, 16)[inputs.teacher_rows]
    outputs = slot_outputs(model, inputs, hidden, TARGET.embed)
    own = head_of(TARGET.lm_head, model.proposed_ids)
    told = objective(model, inputs, outputs, states, TARGET.lm_head, weights, head=own)
    return *told, outputs, inputs, states


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(0.1, 0, 0.3, 0.5, 0, 1, 1)])
def test_who_may_propose_all_tokens_learns_the_same(weights):
    config = replace(SMALL, markov_rank=2)
    (whole, agreed, *_), (some, also, *_) = (
        taught(model, weights) for model in (random_model(config), proposing(range(11), config))
    )
    np.testing.assert_allclose(whole.item(), some.item(), rtol=1e-5)
    assert agreed.tolist() == also.tolist()


def test_what_is_learned_is_the_targets_law_of_the_tokens_that_may_be_proposed():
    weights = LossWeights(hidden=0, distribution=1, slot_decay=0.5)
    loss, agreed, outputs, inputs, states = taught(proposing(SOME), weights)
    p = np.array(mx.softmax(TARGET.lm_head(states), axis=-1))[np.array(inputs.teacher)]
    own = TARGET.lm_head(outputs)[..., mx.array(SOME)]
    log_q = np.array(own - mx.logsumexp(own, axis=-1, keepdims=True))
    counts = np.array(inputs.weight) * 0.5 ** np.arange(3)
    spoken = p[..., SOME].sum(-1)
    entropy = -(p[..., SOME] * log_q).sum(-1)  # of p as it is: what is left out teaches nothing
    np.testing.assert_allclose(
        loss.item(), (counts * entropy).sum() / (counts * spoken).sum(), rtol=1e-4
    )
    drafts = np.array(SOME)[np.array(own).argmax(-1)]
    right = np.cumprod((drafts == p.argmax(-1)) * np.array(inputs.weight), axis=1)
    assert agreed.tolist() == [*right.sum(0), np.array(inputs.weight)[:, 0].sum()]


def test_what_the_target_says_and_no_draft_can_is_missed():
    model, states = proposing(SOME), TEACHER.hidden(BATCH).reshape(-1, 16)
    inputs, states = BATCH.inputs, states[BATCH.inputs.teacher_rows]
    right = states[inputs.teacher]  # as a drafter would have it that knows all
    own = head_of(TARGET.lm_head, model.proposed_ids)
    _, agreed = objective(model, inputs, right, states, TARGET.lm_head, LossWeights(), head=own)
    said = np.array(mx.argmax(TARGET.lm_head(right), axis=-1))
    known = np.cumprod(np.isin(said, SOME) * np.array(inputs.weight), axis=1)
    assert 0 < known[:, 0].sum() < np.array(inputs.weight)[:, 0].sum()
    assert agreed[:-1].tolist() == known.sum(0).tolist()


@pytest.mark.parametrize("gathered", [False, True], ids=["chosen", "gathered"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_run_learns_and_leaves_the_tokens_as_they_are(compiled, gathered, tmp_path):
    steps = {"iterations": 6, "batch_size": 2, "save_every": 3, "warmup": 1, "compile": compiled}
    config, layer = configure("ours", steps), nn.Linear(16, 11, bias=False)
    layer.weight = TARGET.head.T
    teacher = replace(TEACHER, lm_head=Head(layer)) if gathered else TEACHER

    def begin(folder):
        model = proposing(SOME, replace(SMALL, markov_rank=2))
        return Trainer(model, teacher, EXAMPLES, tmp_path / folder, config)

    whole = begin("whole")
    before = parameters(whole.model)
    assert whole.run()
    first = begin("parts")
    assert not first.run(lambda: first.step == 3)
    second = begin("parts")
    second.model.draft_ids = mx.arange(5, dtype=mx.int32)
    assert second.resume() == 3
    assert second.run()
    wanted, got = parameters(whole.averaged()), parameters(load_model(tmp_path / "parts"))
    assert wanted.keys() == got.keys() == before.keys()
    assert all(np.array_equal(wanted[name], got[name]) for name in wanted)
    still = {name for name in wanted if np.array_equal(wanted[name], before[name])}
    assert still == {"draft_ids"}
