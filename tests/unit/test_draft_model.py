from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flash_mlx.draft import FlashConfig, FlashModel, Layout
from flash_mlx.draft.model import pool
from flash_reference import (
    SMALL,
    compressed,
    corrected,
    random_model,
    slot_outputs,
    softmax,
    weights_of,
)


def test_latents_are_the_softmax_weighted_rows():
    rng = np.random.default_rng(0)
    queries, rows = rng.normal(0, 1, (3, 8)), rng.normal(0, 1, (20, 8))
    latents = pool(mx.array(queries, mx.float32), mx.array(rows, mx.float32))
    np.testing.assert_allclose(latents, softmax(queries @ rows.T) @ rows, atol=1e-5)


def test_latents_of_16_bit_rows_are_pooled_in_32_bits():
    rng = np.random.default_rng(1)
    queries = mx.array(rng.normal(0, 1, (3, 64)), mx.float16)
    rows = mx.array(rng.normal(0, 4, (50, 64)), mx.float16)
    latents = pool(queries, rows)
    assert latents.dtype == mx.float16
    exact = pool(queries.astype(mx.float32), rows.astype(mx.float32)).astype(mx.float16)
    assert mx.array_equal(latents, exact)


def test_padding_of_an_image_has_no_share_in_its_latents():
    rng = np.random.default_rng(2)
    queries, rows = mx.array(rng.normal(0, 1, (3, 8))), mx.array(rng.normal(0, 1, (2, 6, 8)))
    mask = mx.where(mx.arange(6) < mx.array([[6], [4]]), 0, -mx.inf)[:, None]
    latents = pool(queries, rows, mask)
    np.testing.assert_allclose(latents[1], pool(queries, rows[1, :4]), atol=1e-6)
    np.testing.assert_allclose(latents[0], pool(queries, rows[0]), atol=1e-6)


def test_the_example_of_the_layout():
    layout = Layout.of(5, [(1, 3)], num_latents=2)
    assert layout.text_rows.tolist() == [0, 3, 4]
    assert layout.order.tolist() == [0, 3, 4, 1, 2]
    assert layout.positions().tolist() == [0, 3, 4]
    assert layout.num_raw == 1


def test_text_alone_keeps_its_rows():
    layout = Layout.of(4, [], num_latents=2)
    assert layout.text_rows.tolist() == layout.order.tolist() == [0, 1, 2, 3]
    assert layout.num_raw == 0


def test_two_images_that_touch_have_latents_of_their_own():
    layout = Layout.of(8, [(1, 3), (3, 6)], num_latents=2)
    assert layout.text_rows.tolist() == [0, 6, 7]
    assert layout.order.tolist() == [0, 3, 4, 5, 6, 1, 2]


def test_a_prompt_that_ends_with_an_image_drafts_from_its_last_row():
    layout = Layout.of(4, [(2, 4)], num_latents=1)
    assert layout.text_rows.tolist() == [0, 1, 3]
    assert layout.order.tolist() == [0, 1, 3, 2]
    longer = Layout.of(6, [(2, 4)], num_latents=1, num_prompt_rows=4)
    assert longer.text_rows.tolist() == [0, 1, 3, 4, 5]
    assert longer.order.tolist() == [0, 1, 5, 2, 3, 4]


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, norm_inputs=True, fusion_bias=False, attention_bias=False),
        replace(SMALL, block_size=1, rope_base=100.0, rms_norm_eps=0.1),
    ],
)
def test_training_attention_equals_the_full_mask(config):
    model, rng = random_model(config), np.random.default_rng(1)
    sequence, hidden = rng.normal(0, 1, (2, 2, 9, 16))
    base = np.array([[2, 3, 4, 8], [0, 5, 6, 7]])
    wanted = [slot_outputs(model, s, h)[b] for s, h, b in zip(sequence, hidden, base, strict=True)]
    rows = np.take_along_axis(hidden, base[..., None], axis=1)
    got = model(
        mx.array(sequence, mx.float32), mx.array(base, mx.int32), mx.array(rows, mx.float32)
    )
    np.testing.assert_allclose(got, np.array(wanted), atol=1e-5)


def test_rows_after_a_base_row_do_not_change_its_slots():
    model, rng = random_model(), np.random.default_rng(2)
    sequence = mx.array(rng.normal(0, 1, (1, 7, 16)), mx.float32)
    hidden, base = mx.zeros((1, 2, 16)), mx.array([[3, 4]], mx.int32)
    changed = mx.concatenate([sequence[:, :5], sequence[:, 5:] + 1], axis=1)
    assert mx.array_equal(model(sequence, base, hidden), model(changed, base, hidden))
    earlier = mx.concatenate([sequence[:, :1] + 1, sequence[:, 1:]], axis=1)
    assert not mx.allclose(model(sequence, base, hidden), model(earlier, base, hidden))


@pytest.mark.parametrize("norm_inputs", [False, True])
def test_fusion_reads_the_embedding_first(norm_inputs):
    config = replace(SMALL, norm_inputs=norm_inputs)
    model, rng = random_model(config), np.random.default_rng(3)
    embedding, hidden = rng.normal(0, 1, (11, 16)), rng.normal(0, 2, (1, 16))
    wanted, _ = compressed(model, embedding, [0, 7], hidden, [], 1)
    got = model.fuse(mx.array(embedding[7:8], mx.float32), mx.array(hidden, mx.float32))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_the_markov_correction_is_of_low_rank_and_starts_at_nothing():
    config = replace(SMALL, markov_rank=2)
    assert not FlashModel(config).markov(mx.array([3])).any()
    model = random_model(config)
    weights = weights_of(model)
    wanted = weights["markov.previous"][[3, 5]] @ weights["markov.next"].T
    np.testing.assert_allclose(model.markov(mx.array([3, 5])), wanted, atol=1e-5)


@pytest.mark.parametrize("changes", [{"hydra_size": 4}, {"recurrent_size": 5}])
def test_corrections_equal_their_formulas(changes):
    model, rng = random_model(replace(SMALL, **changes)), np.random.default_rng(4)
    outputs, embeddings = rng.normal(0, 1, (4, 3, 16)), rng.normal(0, 0.1, (4, 2, 16))
    wanted = [corrected(model, *one) for one in zip(outputs, embeddings, strict=True)]
    got = model.correct(mx.array(outputs, mx.float32), mx.array(embeddings, mx.float32))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert not np.allclose(got[:, 1:], outputs[:, 1:], atol=1e-2)


def test_weights_have_their_published_names():
    names = {name for name, _ in tree_flatten(FlashModel(SMALL).parameters())}
    block = {f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    block |= {"gate_proj.weight", "up_proj.weight", "down_proj.weight", "slot_embeddings"}
    block |= {"input_layernorm.weight", "post_attn_layernorm.weight"}
    fusion = {f"fc_{p}.{kind}" for p in ("gate", "up") for kind in ("weight", "bias")}
    assert names == {"A", "residual_gate"} | fusion | {f"layers.{name}" for name in block}
    hydra = FlashModel(replace(SMALL, hydra_size=4, markov_rank=2))
    more = {name for name, _ in tree_flatten(hydra.parameters())} - names
    assert more == {f"hydra_projs.{i}.{j}.weight" for i in (0, 1) for j in (0, 2)} | {
        "markov.previous",
        "markov.next",
    }


def test_published_initial_values():
    model = FlashModel(replace(SMALL, block_size=4, hidden_size=512, num_latents=64))
    assert not model.layers.slot_embeddings[0].any()
    assert model.residual_gate.tolist() == [1] * 4
    for drawn in (model.A, model.layers.slot_embeddings[1:]):
        assert 0.018 < mx.std(drawn).item() < 0.022


def test_a_configuration_survives_json():
    config = replace(SMALL, norm_inputs=True, markov_rank=3, rope_base=1e6)
    assert FlashConfig.from_dict(config.to_dict()) == config
    assert FlashConfig(hidden_size=24, vocab_size=5).intermediate_size == 96


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 7}, "even"),
        ({"hidden_size": 0}, "hidden_size .* at least 1; got 0"),
        ({"num_latents": 2.0}, "num_latents .* whole number"),
        ({"block_size": True}, "block_size .* whole number"),
        ({"norm_inputs": 1}, "norm_inputs .* true or false"),
        ({"rope_base": float("nan")}, "rope_base .* above 0"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hydra_size": 3, "recurrent_size": 2}, "not both; got 3 and 2"),
        ({"num_layers": 2}, "num_layers as well"),
    ],
)
def test_a_wrong_setting_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        FlashConfig.from_dict(SMALL.to_dict() | changes)


def test_a_missing_setting_is_named():
    with pytest.raises(ValueError, match="must hold vocab_size"):
        FlashConfig.from_dict({"hidden_size": 16})
