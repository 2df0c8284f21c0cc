"""A quantised cache: drafts change nothing, mlx-vlm says the same, and it is smaller.

Whether pictures can be made to take fewer rows is asked here too: both are settings of a target.
"""

from pathlib import Path

import mlx.core as mx
import pytest

from commands import command
from flash_mlx.decode import NoDrafter
from flash_mlx.loading import DEMO
from flash_mlx.processing import make_prompt
from flash_mlx.targets import LoadedTarget, load_target
from flash_mlx.targets.scratch import scratch_cache
from identity import SHAPES, CorruptedOracle, ask, mlx_vlm_ids, run
from tiny import build_qwen, random_image

KV = {"kv_bits": 8, "kv_group_size": 32}


@pytest.fixture(scope="module", params=["demo", "qwen"])
def packed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LoadedTarget:
    """A target whose heads have 64 or 32 numbers, with a cache of 8 bits."""
    if request.param == "demo":
        return load_target(DEMO / "target", **KV)
    return load_target(build_qwen(tmp_path_factory.mktemp("wide") / "qwen", num_heads=2), **KV)


@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_change_nothing_with_a_quantised_cache(
    packed: LoadedTarget, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ask(packed, 1)
    target = packed.target
    assert target.supports_tree
    expected, *_ = run(target, NoDrafter(), prompt, 40)
    settings = {**KV, "quantized_kv_start": 0}
    assert expected == mlx_vlm_ids(packed, prompt, 40, monkeypatch, **settings)
    oracle = CorruptedOracle(tuple(expected), SHAPES[shape], target.vocab_size)
    ids, accepted, rejected = run(target, oracle, prompt, 40)
    assert ids == expected
    assert min(accepted, rejected) >= 8


def test_a_quantised_cache_is_smaller_and_differs(packed: LoadedTarget) -> None:
    plain = load_target(packed.path)
    prompt = ask(plain, 1)
    caches, logits = [], []
    for loaded in (plain, packed):
        caches.append(loaded.target.make_cache())
        logits.append(loaded.target.prefill(prompt, caches[-1]).logits)
    assert caches[1].nbytes < 0.6 * caches[0].nbytes
    assert 0 < mx.abs(logits[0] - logits[1]).max() < 0.2 * mx.abs(logits[0]).max()
    assert scratch_cache(packed.target, 50).length == 50


def test_what_passes_cost_is_stored_for_each_kind_of_cache(packed: LoadedTarget) -> None:
    keys = [load_target(packed.path).target.costs_key, packed.target.costs_key]
    keys.append(load_target(packed.path, kv_bits=4, kv_group_size=32).target.costs_key)
    assert keys[0] == {}  # as costs were always stored
    assert keys[1] != keys[2] != {}


def test_heads_that_do_not_fit_the_groups_are_named(tiny_llava: Path) -> None:
    code, out, err = command(
        "generate", "--model", tiny_llava, "--prompt", "What?", "--kv-bits", "4"
    )
    assert (code, out) == (1, b"")
    assert "cache must fit 4 bits in groups of 64" in err
    assert len(err.splitlines()) == 1


def test_fewer_pixels_take_fewer_rows(tiny_qwen: Path, tiny_llava: Path) -> None:
    picture = random_image(280, 280)
    rows = []
    for pixels in (None, 280 * 280, 28 * 28 * 9):
        prompt = make_prompt(load_target(tiny_qwen, max_pixels=pixels), "What?", [picture])
        rows.append(prompt.num_visual_tokens)
    assert rows == [100, 100, 9]
    code, _, err = command("generate", "--model", tiny_llava, "--prompt", "?", "--max-pixels", "9")
    assert code == 1
    assert "Leave --max-pixels out" in err
