"""What is shared, what stays where it is, and what never leaves the device."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flash_mlx.decode import decode
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel, NgramDrafter
from flash_mlx.processing import make_prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets import LoadedTarget
from flash_mlx.tree import DraftTree, Topology
from tiny import random_image

TREE = Topology((-1, 0, 0, 1, 2, 2, 4, 4))


def make_flash(loaded: LoadedTarget) -> FlashDrafter:
    target = loaded.target
    mx.random.seed(0)
    sizes = {"block_size": 3, "num_latents": 4, "num_heads": 2, "head_dim": 16}
    model = FlashModel(FlashConfig(target.hidden_size, target.vocab_size, **sizes))
    mx.eval(model.parameters())
    return FlashDrafter(model, target.embed, target.lm_head)


def nbytes(parameters: object) -> int:
    return sum(array.nbytes for _, array in tree_flatten(parameters))


def test_the_drafter_uses_the_targets_own_embedding_and_head(loaded: LoadedTarget) -> None:
    target = loaded.target
    language = target.model.language_model
    before = {name: id(array) for name, array in tree_flatten(language.parameters())}
    used = mx.get_active_memory()
    drafter = make_flash(loaded)
    grown = mx.get_active_memory() - used
    # No matrix of V rows is among the drafter's, and none was made.
    assert all(
        target.vocab_size not in a.shape for _, a in tree_flatten(drafter.model.parameters())
    )
    assert grown <= 2 * nbytes(drafter.model.parameters()) + 2**14
    # What it calls reads the very arrays of the model.
    assert drafter._embed.__self__ is target
    assert drafter._lm_head._layer is language.lm_head
    assert {name: id(array) for name, array in tree_flatten(language.parameters())} == before
    embedding, head = language.model.embed_tokens, language.lm_head
    weights = embedding.weight, head.weight
    embedding.weight, head.weight = 2 * weights[0], 3 * weights[1]
    try:
        rows = mx.array([1, 2])
        assert mx.array_equal(drafter._embed(rows), 2 * weights[0][rows])
        hidden = mx.ones((1, target.hidden_size))
        assert mx.allclose(drafter._lm_head(hidden), 3 * hidden @ weights[1].T, rtol=1e-4)
    finally:
        embedding.weight, head.weight = weights


@pytest.mark.parametrize("kind", ["flash", "ngram"])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.0, top_p=0.9)])
def test_only_ids_leave_the_device(
    loaded: LoadedTarget, kind: str, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_prompt(loaded, "What is this? And what is this?", [random_image()])
    drafter = make_flash(loaded) if kind == "flash" else NgramDrafter()
    settings = {"sampler": sampler, "key": mx.random.key(0), "max_tokens": 24, "stop_ids": ()}
    rounds = decode(loaded.target, drafter, prompt, **settings)
    next(rounds)
    left: list[mx.array] = []

    def watch(owner: object, name: str) -> None:
        true = getattr(owner, name)

        def watched(value, *args, **kwargs):
            if isinstance(value, mx.array):
                left.append(value)
            return true(value, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for name in ("tolist", "item", "__array__", "__float__", "__int__", "__bool__"):
        watch(mx.array, name)
    for name in ("array", "asarray"):
        watch(np, name)
    num_rounds = sum(1 for _ in rounds)
    monkeypatch.undo()
    assert num_rounds >= 3
    assert left
    for array in left:
        assert mx.issubdtype(array.dtype, mx.integer) or array.dtype == mx.bool_
        assert array.size <= 4 * 16  # ids, not rows of anything
    ids = [array for array in left if array.dtype != mx.bool_]
    assert len(ids) <= num_rounds  # once a round
    assert len(left) <= 2 * num_rounds  # and with them, whether the drafts were sound


@pytest.mark.parametrize("accepted", [1, 3])
def test_accepted_rows_of_a_chain_are_kept_in_place(loaded: LoadedTarget, accepted: int) -> None:
    target = loaded.target
    cache = target.make_cache()
    target.prefill(make_prompt(loaded, "What?", [random_image()]), cache)
    length = cache.length
    out = target.verify(DraftTree(Topology.chain(3), mx.array([1, 2, 3, 4], mx.int32)), cache)
    mx.eval(out.logits)
    arrays = [(id(layer.keys), id(layer.values)) for layer in cache.layers]
    used = mx.get_active_memory()
    cache.commit(range(accepted))
    assert [(id(layer.keys), id(layer.values)) for layer in cache.layers] == arrays
    assert mx.get_active_memory() == used
    assert cache.length == length + accepted


def test_rows_of_a_tree_are_moved_and_nothing_else(loaded: LoadedTarget) -> None:
    target = loaded.target
    cache = target.make_cache()
    target.prefill(make_prompt(loaded, "What?", [random_image()]), cache)
    length = cache.length
    tokens = mx.arange(1, len(TREE) + 1, dtype=mx.int32)
    mx.eval(target.verify(DraftTree(TREE, tokens), cache).logits)
    before = [np.array(layer.keys) for layer in cache.layers]
    one_layer = cache.layers[0].keys.nbytes
    used = mx.get_active_memory()
    mx.reset_peak_memory()
    cache.commit((0, 2, 5))
    mx.eval([(layer.keys, layer.values) for layer in cache.layers])
    assert mx.get_active_memory() <= used + 2**12
    assert mx.get_peak_memory() - used < one_layer  # no second copy, not even of one layer
    for layer, keys in zip(cache.layers, before, strict=True):
        moved = np.array(layer.keys)
        np.testing.assert_array_equal(moved[..., :length, :], keys[..., :length, :])
        rows = [length, length + 2, length + 5]
        np.testing.assert_array_equal(moved[..., length : length + 3, :], keys[..., rows, :])


SEVEN_B = {  # published sizes: D, V, layers, width of the MLP, key-value heads * head size, tied
    "llava-1.5-7b": (4096, 32064, 32, 11008, 4096, False),
    "llava-v1.6-mistral-7b": (4096, 32064, 32, 14336, 1024, False),
    "qwen2-vl-7b": (3584, 152064, 28, 18944, 512, False),
    "qwen2.5-vl-7b": (3584, 152064, 28, 18944, 512, False),
    "qwen3-vl-8b": (4096, 151936, 36, 12288, 1024, False),
}


@pytest.mark.parametrize("name", SEVEN_B)
def test_a_drafter_takes_little_beside_its_target(name: str) -> None:
    """Counted in numbers, so it holds whatever bits both are stored in; vision is left out."""
    d, vocabulary, layers, width, kv, tied = SEVEN_B[name]
    own = d * vocabulary * (1 if tied else 2) + layers * (2 * d * d + 2 * d * kv + 3 * d * width)
    model = FlashModel(FlashConfig(hidden_size=d, vocab_size=vocabulary, recurrent_size=256))
    weights = sum(array.size for _, array in tree_flatten(model.parameters()))  # none is computed
    # The drafter joins matrices that read the same rows, and the parts stay with the model.
    block = model.layers
    parts = (model.fc_gate, model.fc_up, block.q_proj, block.k_proj, block.v_proj)
    joined = sum(
        array.size
        for part in (*parts, block.gate_proj, block.up_proj)
        for _, array in tree_flatten(part.parameters())
    )
    context = 4096  # rows of text and latents in its cache
    cache = 2 * context * model.config.num_heads * model.config.head_dim
    share = (weights + joined + cache) / own
    assert 0.04 < share <= 0.12  # 5.0% to 7.3%
