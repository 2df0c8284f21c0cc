"""EAGLE, EAGLE-3, MSD and ViSpec with random weights on the tiny targets, and what must not vary.

Shapes:
    T: prompt rows.    D: hidden size.    R: rows of a pass.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from flash_mlx.draft.decoder import DecoderConfig, Past
from flash_mlx.draft.growth import grow_tree
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.loading import read_by, untapped
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets import LoadedTarget
from identity import ask, mlx_vlm_ids, run
from peers_reference import BASE, CONFIGS, SIZE, VOCAB, drafter_for, random_model

KEY, GREEDY = mx.random.key(0), Sampler()


@pytest.mark.parametrize("num_nodes", [0, 7], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_text_is_the_targets_own(
    loaded: LoadedTarget, kind: str, num_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = drafter_for(kind, loaded, num_nodes=num_nodes, top_k=3)
    target = read_by(drafter, loaded).target
    for num_images in (0, 1, 2):
        prompt = ask(loaded, num_images)
        ids, accepted, rejected = run(target, drafter, prompt, 12)
        assert ids == mlx_vlm_ids(loaded, prompt, 12, monkeypatch)
        assert accepted + rejected > 11


@pytest.mark.parametrize("kind", ["eagle", "vispec"])
def test_what_is_drafted_is_read_as_it_will_be_once_it_is_accepted(
    llava: LoadedTarget, kind: str
) -> None:
    """A target that agreed with every draft would see the drafter go on where the draft ended."""
    drafter = drafter_for(kind, llava)
    target = read_by(drafter, llava).target
    prompt = ask(llava, 1)
    out = target.prefill(prompt, target.make_cache())
    root = int(mx.argmax(out.logits[-1]).item())
    state = drafter.prefill(prompt, out.hidden, root)
    first, second, third = drafter.draft(root, state, GREEDY, KEY).tokens.tolist()[1:]
    own = mx.concatenate([mx.zeros_like(state.output), state.output], axis=-1)
    later = drafter.extend(own, (first,), state)
    assert drafter.draft(first, later, GREEDY, KEY).tokens.tolist()[1:3] == [second, third]


def test_targets_hand_out_what_their_layers_read(loaded: LoadedTarget) -> None:
    plain, prompt = loaded.target, ask(loaded, 1)
    tapped = read_by(drafter_for("eagle", loaded), loaded)
    assert untapped(tapped).target is plain
    out = tapped.target.prefill(prompt, tapped.target.make_cache())
    expected = plain.prefill(prompt, plain.make_cache()).hidden
    embeddings, hidden = out.hidden[:, :SIZE], out.hidden[:, SIZE:]
    np.testing.assert_array_equal(hidden, expected)
    (start, stop), *_ = prompt.image_spans
    by_id = plain.embed(mx.array(prompt.tokens))
    np.testing.assert_array_equal(embeddings[:start], by_id[:start])
    np.testing.assert_array_equal(embeddings[stop:], by_id[stop:])
    assert (mx.abs(embeddings[start:stop] - by_id[start:stop]).max(axis=-1) > 1e-3).all()


def test_features_of_eagle_3_are_inputs_of_three_layers(qwen: LoadedTarget) -> None:
    """Of four layers: 2, 2 and 1."""
    plain, prompt = qwen.target, ask(qwen, 0)
    drafter = drafter_for("eagle3", qwen)
    tapped = read_by(drafter, qwen).target
    hidden = tapped.prefill(prompt, tapped.make_cache()).hidden
    assert hidden.shape == (len(prompt), 3 * SIZE)
    model = plain.model.language_model.model
    layers = list(model.layers)
    read = {}
    for depth in (1, 2):
        try:
            model.layers, model.norm, norm = layers[:depth], nn.Identity(), model.norm
            ids = mx.array(prompt.tokens)[None]
            places = mx.broadcast_to(mx.arange(len(prompt)), (3, 1, len(prompt)))
            read[depth] = model(ids, position_ids=places)[0]
        finally:
            model.layers, model.norm = layers, norm
    expected = mx.concatenate([read[2], read[2], read[1]], axis=-1)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


def test_eagle_3_proposes_only_its_own_ids(llava: LoadedTarget) -> None:
    drafter = drafter_for("eagle3", llava, num_nodes=9)
    target = read_by(drafter, llava).target
    out = target.prefill(ask(llava, 0), target.make_cache())
    tree = drafter.draft(5, drafter.prefill(ask(llava, 0), out.hidden, 5), GREEDY, KEY)
    assert len(tree) == 10
    assert all(token % 4 == 0 for token in tree.tokens.tolist()[1:])


def hidden_of(num_rows: int, seed: int = 0) -> tuple[Prompt, mx.array]:
    rng = np.random.default_rng(seed)
    prompt = Prompt(tuple(rng.integers(0, VOCAB, num_rows).tolist()), ((4, 8),))
    return prompt, mx.array(rng.normal(size=(num_rows, 2 * SIZE)).astype(np.float32))


def free(kind: str, config: DecoderConfig | None = None, trees: bool = True) -> StepwiseDrafter:
    """A drafter with a target's embedding and LM head, and no target."""
    rng = np.random.default_rng(1)
    table = mx.array(rng.normal(size=(VOCAB, SIZE)).astype(np.float32))
    return StepwiseDrafter(
        random_model(kind, config),
        lambda ids: table[ids],
        lambda x: x @ table.T,
        VOCAB,
        trees=trees,
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_reading_in_pieces_is_reading_at_once(kind: str) -> None:
    drafter, (prompt, hidden) = free(kind), hidden_of(14)
    hidden = hidden if kind != "eagle3" else mx.concatenate([hidden, hidden[:, :SIZE]], axis=1)
    tokens = prompt.tokens
    whole = drafter.prefill(prompt, hidden, 7)
    state = drafter.prefill(Prompt(tokens[:10], prompt.image_spans), hidden[:10], tokens[10])
    for stop in (11, 14):
        start = state.position
        state = drafter.extend(hidden[start:stop], (*tokens, 7)[start + 1 : stop + 1], state)
    assert state.position == whole.position == 14
    np.testing.assert_allclose(np.array(state.output), np.array(whole.output), atol=1e-4)


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "vispec"])
def test_rows_of_a_tree_are_rows_of_a_chain(kind: str) -> None:
    """A tree of one branch is the chain, and each path of a wide one is read as a chain is."""
    config = replace(CONFIGS[kind], num_nodes=3, top_k=1)
    prompt, hidden = hidden_of(9)
    hidden = hidden if kind != "eagle3" else mx.concatenate([hidden, hidden[:, :SIZE]], axis=1)
    chain, tree, wide = (
        free(kind, config, trees=trees)
        for config, trees in (
            (config, False),
            (config, True),
            (replace(config, num_nodes=21, top_k=3), True),
        )
    )
    state = chain.prefill(prompt, hidden, 7)
    drafted = chain.draft(7, state, GREEDY, KEY)
    grown = tree.draft(7, state, GREEDY, KEY)
    assert grown.topology == drafted.topology
    assert grown.tokens.tolist() == drafted.tokens.tolist()
    # A wide tree's scores are the log-probabilities that reading its paths one by one gives.
    broad = wide.draft(7, state, GREEDY, KEY)
    scores = [path_score(wide, state, broad, node) for node in range(1, len(broad))]
    assert scores == sorted(scores, reverse=True)
    assert max(broad.topology.depth) == 3


def path_score(drafter: StepwiseDrafter, state, tree, node: int) -> float:
    """Read one path of a tree row by row; returns its log-probability."""
    path = []
    while node:
        path.insert(0, int(tree.tokens[node].item()))
        node = tree.topology.parents[node]
    model, output, past, score = drafter.model, state.output, state.past, 0.0
    for depth, token in enumerate(path):
        logits = drafter._logits(output)
        score += (logits[0, token] - mx.logsumexp(logits[0])).item()
        rows = model.fuse(drafter._embed((token,)), output, state.context)
        output, past = model.read(rows, mx.array([state.position + depth]), past)
    return round(score, 4)


def test_trees_of_equal_scores_keep_every_parent() -> None:
    """All logits alike: each node's parent is chosen too, and leading rows are a tree again."""

    def step(tokens, features, level, past, mask):
        return features, past

    for num_nodes in (1, 4, 9, 60):
        tree = grow_tree(
            5,
            mx.zeros((1, 4)),
            Past.empty(BASE, mx.float32),
            step=step,
            logits=lambda outputs: mx.zeros((outputs.shape[0], 20)),
            levels=4,
            top_k=3,
            num_nodes=num_nodes,
        )
        assert len(tree) == min(num_nodes, 3 + 3 * 9) + 1
        assert tree.topology.head(len(tree) // 2 + 1).parents[0] == -1


def test_vispec_without_an_image_and_msd_too_are_eagle() -> None:
    prompt, hidden = hidden_of(9)
    text = Prompt(prompt.tokens)
    config = replace(BASE, num_kv_heads=4)
    eagle = free("eagle", config)
    expected = np.array(eagle.prefill(text, hidden, 7).output)
    weights = dict(tree_flatten(eagle.model.parameters()))
    for kind, changes in (("msd", {}), ("vispec", {"num_queries": 2})):
        other = free(kind, replace(config, **changes))
        own = {"img_fc.weight": mx.concatenate([mx.eye(SIZE), mx.zeros((SIZE, SIZE))], axis=1)}
        own["img_fc.bias"] = mx.zeros(SIZE)
        fitting = weights | (own if kind == "vispec" else {})
        other.model.update(tree_unflatten(list(fitting.items())))
        np.testing.assert_allclose(
            np.array(other.prefill(text, hidden, 7).output), expected, atol=1e-5
        )
        assert not np.allclose(np.array(other.prefill(prompt, hidden, 7).output), expected)


def test_msd_reads_no_hidden_of_a_row_before_an_image_row() -> None:
    drafter, (prompt, hidden) = free("msd"), hidden_of(12)
    expected = np.array(drafter.prefill(prompt, hidden, 7).output)
    changed = mx.array(hidden)
    changed[3:7, SIZE:] = 0
    np.testing.assert_array_equal(np.array(drafter.prefill(prompt, changed, 7).output), expected)
    changed[7, SIZE:] = 0  # the image's last row: its hidden goes with the next text token
    assert not np.allclose(np.array(drafter.prefill(prompt, changed, 7).output), expected)


def test_vispec_forgets_the_order_of_an_images_rows_and_where_it_stood() -> None:
    drafter, (prompt, hidden) = free("vispec"), hidden_of(12)
    state = drafter.prefill(prompt, hidden, 7)
    assert state.past.length == 12 - (4 - 2)
    assert state.position == 12
    shuffled = mx.array(hidden)
    shuffled[4:8, :SIZE] = hidden[mx.array([6, 4, 7, 5]), :SIZE]
    other = drafter.prefill(prompt, shuffled, 7)
    np.testing.assert_allclose(np.array(other.output), np.array(state.output), atol=1e-5)
    two = Prompt(prompt.tokens, ((1, 3), (4, 8)))
    assert not np.allclose(np.array(drafter.prefill(two, hidden, 7).output), np.array(state.output))
    np.testing.assert_allclose(  # the global vector is that of the last image
        np.array(drafter.prefill(two, hidden, 7).context), np.array(state.context), atol=1e-6
    )


def test_sampled_chains_tell_the_laws_that_they_were_drawn_from() -> None:
    drafter, (prompt, hidden) = free("eagle"), hidden_of(9)
    state = drafter.prefill(prompt, hidden, 7)
    warm = Sampler(temperature=8.0, top_k=20)
    trees = [drafter.draft(7, state, warm, key) for key in mx.random.split(KEY, 200)]
    laws = np.array(trees[0].probs)
    np.testing.assert_allclose(laws[:3].sum(axis=-1), 1, atol=1e-5)
    firsts = np.bincount([int(tree.tokens[1].item()) for tree in trees], minlength=VOCAB) / 200
    assert np.abs(firsts - laws[0]).sum() / 2 < 0.6 * np.sqrt((laws[0] > 0).sum() / 200)
    assert (firsts > 0).sum() > 1


def test_padding_of_the_targets_vocabulary_is_never_drafted() -> None:
    config = replace(BASE, vocab_size=VOCAB - 10, num_nodes=0)
    drafter, (prompt, hidden) = free("eagle", config), hidden_of(9)
    state = drafter.prefill(prompt, hidden, VOCAB - 1)
    logits = np.array(drafter._logits(state.output))
    assert np.isneginf(logits[:, VOCAB - 10 :]).all()
    assert np.isfinite(logits[:, : VOCAB - 10]).all()
    own = replace(config, own_embedding=True)
    state = free("eagle", own).prefill(prompt, hidden, VOCAB - 1)  # an id beyond its own table
    assert np.isfinite(np.array(state.output)).all()
