from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mlx.buffer import GROWTH
from flash_mlx.decode import Drafter
from flash_mlx.draft import FlashDrafter, FlashState
from flash_mlx.draft.choice import score_of
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import Topology
from flash_reference import SMALL, compressed, corrected, random_model, slot_outputs, weights_of
from toy import KEY, ToyTarget, exact_law, generate, greedy_oracle

GREEDY, WARM = Sampler(), Sampler(temperature=0.8, top_p=0.95)
TARGET = ToyTarget()
CORRECTIONS = [
    {"markov_rank": 3},
    {"hydra_size": 5},
    {"recurrent_size": 4},
    {"markov_rank": 3, "recurrent_size": 4},
]
IMAGES = [[], [(0, 3)], [(2, 6)], [(1, 3), (3, 6)], [(0, 2), (4, 6)], [(3, 7)]]


def make_drafter(model=None, block_size=None) -> FlashDrafter:
    model = random_model() if model is None else model
    return FlashDrafter(model, TARGET.embed, TARGET.lm_head, block_size)


def text(num_rows: int, seed: int = 0) -> tuple[list[int], np.ndarray]:
    """A text of `num_rows` + 1 tokens and hidden states [num_rows, D] for all but the last."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 11, num_rows + 1).tolist(), rng.normal(0, 1, (num_rows, 16))


def read(drafter, tokens, hidden, spans, steps) -> FlashState:
    """Read a prompt of `steps[0]` rows, then the rest in rounds of these sizes."""
    hidden, end = mx.array(hidden, mx.float32), steps[0]
    state = drafter.prefill(Prompt(tuple(tokens[:end]), tuple(spans)), hidden[:end], tokens[end])
    for size in steps[1:]:
        rows = slice(end, end + size)
        state = drafter.extend(hidden[rows], tuple(tokens[end + 1 : end + size + 1]), state)
        end += size
    return state


def definition(model, tokens, hidden, spans, num_prompt_rows) -> np.ndarray:
    """[k, D] slots of the last row, without a cache."""
    embedding = np.array(TARGET.embedding, dtype=np.float64)
    sequence, rows = compressed(model, embedding, tokens, hidden, spans, num_prompt_rows)
    return slot_outputs(model, sequence, hidden[rows])[-1]


@pytest.mark.parametrize("spans", IMAGES)
@pytest.mark.parametrize("steps", [(7,), (7, 1), (7, 1, 1, 1), (7, 4), (7, 2, 4, 1, 3)])
def test_cached_steps_equal_the_definition(spans, steps):
    model = random_model()
    tokens, hidden = text(sum(steps))
    state = read(make_drafter(model), tokens, hidden, spans, steps)
    wanted = definition(model, tokens, hidden, spans, steps[0])
    np.testing.assert_allclose(state.slots, wanted, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=6), st.integers(0, 5), st.integers(0, 99))
def test_rounds_of_any_size_lead_to_the_same_state(rounds, image, seed):
    steps = (7, *rounds)
    tokens, hidden = text(sum(steps), seed)
    at_once = (7, sum(rounds)) if rounds else (7,)
    drafter = make_drafter()
    one = read(drafter, tokens, hidden, IMAGES[image], steps)
    other = read(drafter, tokens, hidden, IMAGES[image], at_once)
    assert one.length == other.length
    np.testing.assert_allclose(one.slots, other.slots, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"fuse_pre_image": False},
        {"norm_inputs": True},
        {"fusion_bias": False, "attention_bias": False},
        {"num_latents": 5, "rope_base": 50.0},
        {"fusion": "linear", "norm_inputs": True},
    ],
)
def test_options_of_the_model_reach_the_drafter(changes):
    model = random_model(replace(SMALL, **changes))
    steps, spans = (7, 2), [(2, 4), (5, 6)]
    tokens, hidden = text(sum(steps))
    state = read(make_drafter(model), tokens, hidden, spans, steps)
    wanted = definition(model, tokens, hidden, spans, steps[0])
    np.testing.assert_allclose(state.slots, wanted, atol=1e-5)


def test_a_smaller_block_is_the_beginning_of_a_larger_one():
    tokens, hidden = text(9)
    states = [read(make_drafter(None, k), tokens, hidden, [(2, 6)], (7, 2)) for k in (1, 2, 3)]
    for state in states:
        np.testing.assert_allclose(state.slots, states[-1].slots[: state.slots.shape[0]], atol=1e-5)
    assert [len(state.slots) for state in states] == [1, 2, 3]


def test_states_are_values():
    drafter = make_drafter()
    tokens, hidden = text(12)
    prompt = read(drafter, tokens, hidden, [(2, 6)], (7,))
    mx.eval(prompt.keys, prompt.values)
    before = [np.array(prompt.keys), np.array(prompt.values)]
    branch = (mx.array(hidden[7:9], mx.float32), (1, 2))
    one = drafter.extend(*branch, prompt)
    mx.eval(one.slots)
    other = drafter.extend(mx.array(hidden[9:12], mx.float32), (3, 4, 5), prompt)
    mx.eval(other.slots)
    again = drafter.extend(*branch, prompt)
    assert mx.array_equal(one.slots, again.slots)
    assert not mx.allclose(one.slots, other.slots)
    np.testing.assert_array_equal(before[0], prompt.keys)
    np.testing.assert_array_equal(before[1], prompt.values)


def test_the_cache_grows_in_steps_and_loses_nothing():
    drafter, model = make_drafter(), random_model()
    steps = (7, *[3] * 80, *[1] * 20)
    tokens, hidden = text(sum(steps))
    hidden = hidden * 0.5
    state = read(drafter, tokens, hidden, [], steps)
    assert state.length == 267
    assert state.keys.shape[2] == 2 * GROWTH
    np.testing.assert_allclose(state.slots, definition(model, tokens, hidden, [], 7), atol=2e-5)


def test_another_image_gives_other_drafts():
    tokens, hidden = text(8)
    other = hidden.copy()
    other[3] += 1
    spans = [(2, 6)]
    one, two = (read(make_drafter(), tokens, h, spans, (8,)) for h in (hidden, other))
    assert not mx.allclose(one.slots, two.slots)
    # Rows 2 and 3 of the sequence are the latents; text rows are those of the same text.
    assert not mx.allclose(one.values[:, :, 2:4], two.values[:, :, 2:4])
    for part in (slice(0, 2), slice(4, 6)):
        np.testing.assert_array_equal(one.values[:, :, part], two.values[:, :, part])


def test_each_of_two_images_has_its_place():
    tokens, hidden = text(9)
    spans = [(1, 3), (5, 8)]
    one = read(make_drafter(), tokens, hidden, spans, (9,))
    changed = hidden.copy()
    changed[6] += 1
    two = read(make_drafter(), tokens, changed, spans, (9,))
    assert one.length == 8
    differs = mx.any(mx.abs(one.values - two.values) > 1e-6, axis=(0, 1, 3)).tolist()[:8]
    # Text rows 0, 3, 4 and 8 are at positions 0, 3, 4 and 7; latents at 1, 2 and 5, 6.
    assert differs == [False] * 5 + [True] * 2 + [False]


def test_slot_i_drafts_the_token_i_plus_1_places_after_the_root():
    """With slots that read nothing but h_t, the draft says what the LM head says of h_t."""
    model = random_model()
    model.layers.o_proj.weight *= 0
    model.layers.o_proj.bias *= 0
    model.layers.down_proj.weight *= 0
    drafter = make_drafter(model)
    tokens, hidden = text(8)
    state = read(drafter, tokens, hidden, [], (6, 2))
    weights, embedding = weights_of(model), np.array(TARGET.embedding, dtype=np.float64)
    sequence, _ = compressed(model, embedding, tokens, hidden, [], 6)
    rows = sequence[-1] + weights["layers.slot_embeddings"]
    wanted = rows + weights["residual_gate"][:, None] * hidden[-1]
    np.testing.assert_allclose(state.slots, wanted, atol=1e-5)


def test_greedy_drafts_are_a_chain_of_the_most_likely_tokens():
    drafter = make_drafter()
    tokens, hidden = text(7)
    state = read(drafter, tokens, hidden, [], (7,))
    tree = drafter.draft(5, state, GREEDY, KEY)
    assert tree.topology.parents == (-1, 0, 1, 2)
    best = mx.argmax(TARGET.lm_head(state.slots), axis=-1)
    assert tree.tokens.tolist() == [5, *best.tolist()]
    assert tree.tokens.dtype == mx.int32
    assert tree.probs is None


@pytest.mark.parametrize("sampler", [WARM, Sampler(temperature=1.3)], ids=["top-p", "plain"])
@pytest.mark.parametrize(
    "changes",
    [{}, *CORRECTIONS],
    ids=["independent", "markov", "hydra", "recurrent", "two"],
)
def test_sampled_drafts_follow_the_laws_that_the_tree_tells(changes, sampler):
    drafter = make_drafter(random_model(replace(SMALL, **changes)))
    tokens, hidden = text(7)
    state = read(drafter, tokens, hidden, [(2, 5)], (7,))
    samples, first, told = 600, np.zeros(11), np.zeros(11)
    seconds: dict[int, list[int]] = {}
    laws: dict[int, np.ndarray] = {}
    trees = [drafter.draft(5, state, sampler, key) for key in mx.random.split(KEY, samples)]
    mx.eval([(tree.tokens, tree.probs) for tree in trees])
    for tree in trees:
        root, one, two, _ = tree.tokens.tolist()
        q = np.array(tree.probs)
        assert root == 5
        np.testing.assert_allclose(q[:3].sum(-1), 1, atol=1e-5)
        first[one] += 1 / samples
        told = q[0]
        seconds.setdefault(one, []).append(two)
        if one in laws:  # what slot 1 was drawn from depends on nothing but the token before it
            np.testing.assert_allclose(laws[one], q[1], atol=1e-6)
        laws[one] = q[1]
    assert np.abs(first - told).sum() / 2 < 0.06  # noise: about 0.5 * sqrt(11 / 600)
    common = max(seconds, key=lambda token: len(seconds[token]))
    counts = np.bincount(seconds[common], minlength=11) / len(seconds[common])
    assert np.abs(counts - laws[common]).sum() / 2 < 0.6 * np.sqrt(11 / len(seconds[common]))
    different = len({q.round(4).tobytes() for q in laws.values()}) > 1
    assert different == bool(changes)


def soft_capped(hidden: mx.array) -> mx.array:
    return 2 * mx.tanh(TARGET.lm_head(hidden) / 2)


@pytest.mark.parametrize("lm_head", [TARGET.lm_head, soft_capped])
@pytest.mark.parametrize("changes", CORRECTIONS)
def test_later_slots_are_corrected_by_the_tokens_before_them(changes, lm_head, monkeypatch):
    model = random_model(replace(SMALL, **changes))
    drafter, embedding = FlashDrafter(model, TARGET.embed, lm_head), np.array(TARGET.embedding)
    monkeypatch.setattr("flash_mlx.draft.in_turn.TABLE_LIMIT", 0)
    without_tables = FlashDrafter(model, TARGET.embed, lm_head)
    for seed in range(8):
        state = read(drafter, *text(7, seed), [], (7,))
        drafted = drafter.draft(5, state, GREEDY, KEY).tokens.tolist()[1:]
        assert without_tables.draft(5, state, GREEDY, KEY).tokens.tolist()[1:] == drafted
        rows = corrected(model, np.array(state.slots, np.float64), embedding[drafted[:2]])
        logits = np.array(lm_head(mx.array(rows, mx.float32)))
        if "markov_rank" in changes:
            logits[1:] += np.array(model.markov(mx.array(drafted[:2])))
        assert drafted == logits.argmax(-1).tolist()


@pytest.mark.parametrize("changes", [{}, *CORRECTIONS[-2:]], ids=["independent", "one", "two"])
@settings(max_examples=8, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 10), min_size=1, max_size=6),
    num_tokens=st.integers(1, 12),
    block_size=st.integers(1, 3),
)
def test_greedy_text_is_the_targets_own(changes, prompt, num_tokens, block_size):
    drafter: Drafter[FlashState] = make_drafter(random_model(replace(SMALL, **changes)), block_size)
    wanted = greedy_oracle(TARGET, prompt, num_tokens)
    assert generate(TARGET, drafter, prompt, num_tokens) == wanted


def test_two_sampled_tokens_have_the_targets_joint_law():
    target, samples = ToyTarget(vocab_size=4), 800
    model = random_model(replace(SMALL, vocab_size=4, markov_rank=2))
    drafter = FlashDrafter(model, target.embed, target.lm_head)
    sampler, counts = Sampler(temperature=0.9), np.zeros((4, 4))
    for key in mx.random.split(mx.random.key(1), samples):
        _, *pair = generate(target, drafter, [1, 2], 3, sampler=sampler, key=key)
        counts[tuple(pair)] += 1 / samples
    law = exact_law(target, [1, 2], sampler, 3).sum(axis=0)
    assert np.abs(counts - law).sum() / 2 < 0.09  # noise: about 0.5 * sqrt(16 / 800)


def test_hidden_states_of_another_size_are_refused():
    drafter = make_drafter()
    with pytest.raises(ValueError, match=r"shape \(3, 16\).*got \(2, 16\)"):
        drafter.prefill(Prompt((1, 2, 3)), mx.zeros((2, 16)), 4)
    state = drafter.prefill(Prompt((1, 2, 3)), mx.zeros((3, 16)), 4)
    with pytest.raises(ValueError, match=r"shape \(1, 16\).*got \(1, 8\)"):
        drafter.extend(mx.zeros((1, 8)), (4,), state)
    with pytest.raises(ValueError, match="at least one"):
        drafter.extend(mx.zeros((0, 16)), (), state)


@pytest.mark.parametrize("block_size", [0, 4])
def test_a_block_size_that_the_model_lacks_is_refused(block_size):
    with pytest.raises(ValueError, match="1 to 3 tokens"):
        make_drafter(None, block_size)


@pytest.mark.parametrize("changes", [{}, *CORRECTIONS])
@pytest.mark.parametrize("sampler", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_second_pass_reads_the_first_block_as_if_it_were_accepted(changes, sampler):
    model = random_model(replace(SMALL, **changes))
    drafter, (tokens, hidden) = make_drafter(model), text(9)
    state = read(drafter, tokens, hidden, [(2, 6)], (7, 2))
    tree = drafter.draft(tokens[9], state, sampler, KEY, Topology.chain(5))
    root, *said = tree.tokens.tolist()
    heard = TARGET.embed(mx.array(said[:2]))
    slots = state.slots
    if "hydra_size" in changes or "recurrent_size" in changes:
        slots = model.correct(slots[None], heard[None])[0]
    further = drafter.extend(slots, tuple(said[:3]), state)
    if sampler.greedy:
        assert said[:3] == drafter.draft(root, state, sampler, KEY).tokens.tolist()[1:]
        assert said[3:] == drafter.draft(said[2], further, sampler, KEY).tokens.tolist()[1:3]
        found = drafter.candidates(state, 5, 1)
        assert found.tokens[:, 0].tolist() == said
    else:
        laws, at_root = tree.probs, drafter._likeliest(further.slots[:1], 11)
        raw = mx.take_along_axis(at_root[1], mx.argsort(at_root[0], axis=-1), axis=-1)
        np.testing.assert_allclose(np.array(laws[3:4]), np.array(sampler.probs(raw)), atol=1e-5)
        assert all(laws[row, token].item() > 0 for row, token in enumerate(said))
        score = score_of(sampler, (5, 11), KEY)  # each slot has racers of its own
        assert said[3] == mx.argmax(score(3, TARGET.lm_head(further.slots[:1]))).item()
    with pytest.raises(ValueError, match="at most 6 tokens deep; got 7"):
        drafter.draft(tokens[9], state, sampler, KEY, Topology.chain(7))
