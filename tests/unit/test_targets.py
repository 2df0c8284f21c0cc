"""The adapter's passes against one another: single rows, chains, trees, chunks and commits."""

from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mlx.decode import Output
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import LoadedTarget, MlxVlmTarget
from flash_mlx.targets.selftest import check_target
from flash_mlx.tree import Topology
from passes import TOLERANCE, TREE, after, assert_same, one_by_one, paths, random_tokens, tree_of
from tiny import random_image
from toy import topologies


@pytest.fixture(scope="module")
def prompt(loaded: LoadedTarget) -> Prompt:
    return make_prompt(loaded, "What is in the picture?", [random_image()])


def test_a_target_says_what_it_is(loaded: LoadedTarget, prompt: Prompt) -> None:
    target = loaded.target
    out = target.prefill(prompt, target.make_cache())
    assert out.logits.shape == (1, target.vocab_size)
    assert out.hidden.shape == (len(prompt), target.hidden_size)
    assert out.logits.dtype == out.hidden.dtype == mx.float32
    assert target.max_context == {"llava": 2048, "qwen2_5_vl": 4096}[loaded.model_type]
    assert target.supports_tree


def test_a_chain_says_what_single_rows_say(loaded: LoadedTarget, prompt: Prompt) -> None:
    target = loaded.target
    tokens = random_tokens(target, 7)
    chain = target.verify(tree_of(Topology.chain(6), tokens), after(target, prompt))
    assert_same(chain, one_by_one(target, prompt, tokens))


def test_every_path_of_a_tree_says_what_single_rows_say(
    loaded: LoadedTarget, prompt: Prompt
) -> None:
    target = loaded.target
    tokens = random_tokens(target, len(TREE))
    out = target.verify(tree_of(TREE, tokens), after(target, prompt))
    for path in paths(TREE):
        rows = mx.array(path)
        expected = one_by_one(target, prompt, [tokens[row] for row in path])
        assert_same(Output(out.logits[rows], out.hidden[rows]), expected)


def test_text_alone_works_in_every_pass(loaded: LoadedTarget) -> None:
    target = loaded.target
    text = make_prompt(loaded, "What is this?")
    assert text.image_spans == ()
    assert not text.inputs
    tokens = random_tokens(target, len(TREE))
    out = target.verify(tree_of(TREE, tokens), after(target, text))
    rows = (0, 2, 4, 7)
    expected = one_by_one(target, text, [tokens[row] for row in rows])
    assert_same(Output(out.logits[mx.array(rows)], out.hidden[mx.array(rows)]), expected)


@pytest.mark.parametrize("family", ["llava", "qwen"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_after_any_commits_the_target_has_read_just_those_tokens(
    family: str, request: pytest.FixtureRequest, data: st.DataObject
) -> None:
    loaded: LoadedTarget = request.getfixturevalue(family)
    target = loaded.target
    prompt = make_prompt(loaded, "What?", [random_image()])
    cache, read = after(target, prompt), list(prompt.tokens)
    for _ in range(data.draw(st.integers(1, 3), label="rounds")):
        topology = data.draw(topologies(), label="tree")
        tokens = random_tokens(target, len(topology), data.draw(st.integers(0, 99), label="seed"))
        path = data.draw(st.sampled_from(paths(topology)), label="path")
        target.verify(tree_of(topology, tokens), cache)
        cache.commit(path)
        read += [tokens[row] for row in path]
        assert cache.length == len(read)
    token = random_tokens(target, 1)
    out = target.verify(tree_of(Topology.chain(0), token), cache)
    fresh = target.prefill(replace(prompt, tokens=(*read, *token)), target.make_cache())
    assert_same(out, Output(fresh.logits, fresh.hidden[-1:]))


@pytest.mark.parametrize("second", [Topology.chain(3), TREE])
def test_verifying_twice_is_verifying_once(
    loaded: LoadedTarget, prompt: Prompt, second: Topology
) -> None:
    target = loaded.target
    tree = tree_of(second, random_tokens(target, len(second)))
    expected = target.verify(tree, after(target, prompt))
    for first in (Topology.chain(5), TREE):
        cache = after(target, prompt)
        target.verify(tree_of(first, random_tokens(target, len(first), seed=1)), cache)
        assert_same(target.verify(tree, cache), expected)
        assert cache.length == len(prompt)


@pytest.mark.parametrize("chunk_size", [1, 7, 33])
def test_chunks_read_what_one_pass_reads(
    loaded: LoadedTarget, prompt: Prompt, chunk_size: int
) -> None:
    whole, chunked = (
        MlxVlmTarget(loaded.target.model, loaded.family, chunk_size=size)
        for size in (4096, chunk_size)
    )
    caches = [target.make_cache() for target in (whole, chunked)]
    assert_same(chunked.prefill(prompt, caches[1]), whole.prefill(prompt, caches[0]))
    tree = tree_of(TREE, random_tokens(whole, len(TREE)))
    assert_same(chunked.verify(tree, caches[1]), whole.verify(tree, caches[0]))


def test_the_lm_head_and_the_embedding_are_the_models_own(
    loaded: LoadedTarget, prompt: Prompt
) -> None:
    target = loaded.target
    out = target.verify(tree_of(Topology.chain(2), [1, 2, 3]), after(target, prompt))
    assert mx.array_equal(target.lm_head(out.hidden), out.logits)
    language_model = target.model.language_model
    ids = mx.array([5, 9, 5])
    assert mx.array_equal(target.embed(ids), language_model.model.embed_tokens.weight[ids])


def test_two_images_are_read_where_their_spans_say(loaded: LoadedTarget) -> None:
    images = [random_image(seed=1), random_image(60, 120, seed=2)]
    prompt = make_prompt(loaded, "Compare the two.", images)
    assert len(prompt.image_spans) == 2
    model = loaded.target.model
    ids = mx.array(prompt.tokens)[None]
    merged = model.get_input_embeddings(ids, **prompt.inputs).inputs_embeds[0]
    changed = mx.any(merged != loaded.target.embed(ids[0]), axis=-1).tolist()
    spans = [row for start, stop in prompt.image_spans for row in range(start, stop)]
    assert [row for row, is_visual in enumerate(changed) if is_visual] == spans
    assert prompt.num_visual_tokens == len(spans)


def test_an_image_changes_what_is_said(loaded: LoadedTarget, prompt: Prompt) -> None:
    other = make_prompt(loaded, "What is in the picture?", [random_image(seed=9)])
    assert other.tokens == prompt.tokens
    target = loaded.target
    here, there = (target.prefill(p, target.make_cache()).logits for p in (prompt, other))
    assert float(mx.abs(here - there).max()) > 0.01


def test_sequences_do_not_disturb_each_other(loaded: LoadedTarget, prompt: Prompt) -> None:
    target = loaded.target
    text = make_prompt(loaded, "Another conversation without a picture.")
    tokens = random_tokens(target, 4)
    expected = one_by_one(target, prompt, tokens)
    first, second = after(target, prompt), after(target, text)
    logits = []
    for token in tokens:
        logits.append(target.verify(tree_of(Topology.chain(0), [token]), first).logits)
        target.verify(tree_of(TREE, random_tokens(target, len(TREE), seed=token)), second)
        first.commit((0,))
        second.commit((0, 2))
    assert float(mx.abs(mx.concatenate(logits) - expected.logits).max()) < TOLERANCE


def test_positions_kept_on_a_qwen_model_do_not_matter(
    qwen: LoadedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = qwen.target
    prompt = make_prompt(qwen, "What is this?", [random_image()])
    tokens = random_tokens(target, 4)
    expected = one_by_one(target, prompt, tokens)
    language_model = target.model.language_model
    monkeypatch.setattr(language_model, "_rope_deltas", mx.array([[1234]]))
    monkeypatch.setattr(language_model, "_position_ids", mx.zeros((3, 1, 9), dtype=mx.int32))
    assert_same(one_by_one(target, prompt, tokens), expected)


def test_an_image_takes_fewer_positions_than_rows_under_m_rope(qwen: LoadedTarget) -> None:
    cache = after(qwen.target, make_prompt(qwen, "What?", [random_image(280, 280)]))
    assert cache.rope_delta < -10
    assert after(qwen.target, make_prompt(qwen, "What?")).rope_delta == 0


def test_a_tree_pass_leaves_the_model_as_it_was(loaded: LoadedTarget, prompt: Prompt) -> None:
    target = loaded.target
    model = target.model
    classes = [type(module) for module in model.modules()]
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    tree = tree_of(TREE, random_tokens(target, len(TREE)))
    target.verify(tree, after(target, prompt))
    assert [type(module) for module in model.modules()] == classes
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state


def test_a_failed_tree_pass_leaves_model_and_cache_usable(
    loaded: LoadedTarget, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = loaded.target
    tokens = random_tokens(target, len(TREE))
    expected = target.verify(tree_of(TREE, tokens), after(target, prompt))
    classes = [type(module) for module in target.model.modules()]
    cache = after(target, prompt)
    layer = target.model.language_model.model.layers[2]
    with monkeypatch.context() as patch:
        patch.setattr(type(layer.mlp), "__call__", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            target.verify(tree_of(TREE, tokens), cache)
    assert [type(module) for module in target.model.modules()] == classes
    assert_same(target.verify(tree_of(TREE, tokens), cache), expected)


def test_a_failed_prompt_leaves_the_cache_usable(
    loaded: LoadedTarget, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = loaded.target
    cache = target.make_cache()
    layer = target.model.language_model.model.layers[2]
    with monkeypatch.context() as patch:
        patch.setattr(type(layer.mlp), "__call__", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            target.prefill(prompt, cache)
    assert cache.length == 0
    assert_same(target.prefill(prompt, cache), target.prefill(prompt, target.make_cache()))


def test_long_texts_grow_the_cache(loaded: LoadedTarget) -> None:
    target = loaded.target
    text = Prompt(tuple(random_tokens(target, 250)))
    cache, read = after(target, text), list(text.tokens)
    for seed in range(4):  # across the 256 rows that a layer first allocates
        tokens = random_tokens(target, len(TREE), seed)
        target.verify(tree_of(TREE, tokens), cache)
        cache.commit((0, 2, 4, 7))
        read += [tokens[row] for row in (0, 2, 4, 7)]
    out = target.verify(tree_of(Topology.chain(0), [7]), cache)
    fresh = target.prefill(Prompt((*read, 7)), target.make_cache())
    assert_same(out, Output(fresh.logits, fresh.hidden[-1:]))


@pytest.mark.parametrize("rows", [(), (1,), (0, 3), (0, 1, 2), (0, 8), (0, 0), (0, -8)])
def test_only_a_path_from_the_root_can_be_committed(
    llava: LoadedTarget, rows: tuple[int, ...]
) -> None:
    target = llava.target
    cache = after(target, Prompt((1, 2, 3)))
    target.verify(tree_of(TREE, random_tokens(target, len(TREE))), cache)
    with pytest.raises(ValueError, match="path from the root"):
        cache.commit(rows)
    cache.commit((0, 2, 4))
    assert cache.length == 6


def test_rows_are_committed_once(llava: LoadedTarget) -> None:
    target = llava.target
    cache = target.make_cache()
    with pytest.raises(ValueError, match="there is none"):
        cache.commit((0,))
    target.prefill(Prompt((1, 2, 3)), cache)
    with pytest.raises(ValueError, match="there is none"):
        cache.commit((0,))


def test_a_prompt_needs_a_new_cache_and_room(llava: LoadedTarget) -> None:
    target = llava.target
    with pytest.raises(ValueError, match="holds 3 rows"):
        target.prefill(Prompt((1, 2)), after(target, Prompt((1, 2, 3))))
    with pytest.raises(ValueError, match=r"context of 2048 tokens; it has 2049"):
        target.prefill(Prompt((1,) * 2049), target.make_cache())
    with pytest.raises(TypeError, match="make_cache"):
        target.prefill(Prompt((1, 2)), object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 or more; got 0"):
        MlxVlmTarget(target.model, llava.family, chunk_size=0)


def test_the_self_test_passes_on_sound_targets(loaded: LoadedTarget) -> None:
    assert check_target(loaded.target)


@pytest.mark.parametrize("bug", ["mask", "rotate"])
def test_the_self_test_switches_trees_off_where_a_hook_does_not_work(
    llava: LoadedTarget, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    target = MlxVlmTarget(llava.target.model, llava.family)
    if bug == "mask":
        monkeypatch.setattr(target._hooks, "_hooked_cache", type(target.make_cache().layers[0]))
    else:
        monkeypatch.setattr(target._hooks, "_ropes", [])
    assert not check_target(target)
    target.supports_tree = False
    cache = after(target, Prompt((1, 2, 3)))
    target.verify(tree_of(Topology.chain(2), [1, 2, 3]), cache)
    with pytest.raises(ValueError, match="takes chains only"):
        target.verify(tree_of(TREE, [1] * len(TREE)), cache)


def test_the_self_test_refuses_a_model_whose_chains_disagree(
    llava: LoadedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_vlm.models.cache import KVCache

    target = MlxVlmTarget(llava.target.model, llava.family)
    monkeypatch.setattr(KVCache, "make_mask", lambda self, *args, **kwargs: None)
    with pytest.raises(ValueError, match="cannot be a target"):
        check_target(target)
