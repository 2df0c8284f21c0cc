"""The emulator is no mirror of our kernels: mlx-vlm's run in it as they are.

They are taken from the installed package, module by module, and compared with what the package
computes without them, or with the same formula in MLX's operations.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from cases import normal, quantized
from emulator import Emulator
from flash_mlx.kernels import dispatch, metal, trial
from flash_mlx.kernels.decisions import Decisions
from flash_mlx.targets.quantized import FEW_ROWS, few_rows

pytest.importorskip("mlx_vlm")
ROOTS = (
    "mlx_vlm.kernels",
    "mlx_vlm.models.gated_delta",
    "mlx_vlm.models.exact_speculative_verify",
    "mlx_vlm.models.quantized_verifier",
)
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import modules of mlx-vlm as on a Mac, and put back what was imported before."""
    mine = [name for name in sys.modules if name.startswith(ROOTS)]
    before = {name: sys.modules.pop(name) for name in mine}
    parents = {name: importlib.import_module(name.rpartition(".")[0]) for name in ROOTS}
    attributes = {name: vars(parents[name]).get(name.rpartition(".")[2]) for name in ROOTS}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    yield lambda name: importlib.import_module(f"mlx_vlm.{name}")
    for name in [name for name in sys.modules if name.startswith(ROOTS)]:
        del sys.modules[name]
    sys.modules.update(before)
    for name, module in attributes.items():
        if module is not None:
            setattr(parents[name], name.rpartition(".")[2], module)


def close(found: mx.array, expected: mx.array, allowed: float = 1e-5) -> bool:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return mx.abs(found - expected).max().item() <= allowed * mx.abs(expected).max().item()


def names(emulator: Emulator) -> set[str]:
    return {launched.kernel.name for launched in emulator.launches}


def rms(x: mx.array, eps: float = 1e-5) -> mx.array:
    return mx.fast.rms_norm(x, None, eps)


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_number", [False, True])
def test_gated_delta(
    by_number: bool, masked: bool, steps: int | None, load: Load, emulator: Emulator
) -> None:
    module = load("models.gated_delta")
    batch, length, heads, wide, size = 2, 3, 2, 4, 32
    gate = (batch, length, wide, size) if by_number else (batch, length, wide)
    arguments = (
        normal(batch, length, heads, size, seed=1),
        normal(batch, length, heads, size, seed=2, scale=size**-0.5),
        normal(batch, length, wide, size, seed=3),
        mx.sigmoid(normal(*gate, seed=4)),
        mx.sigmoid(normal(batch, length, wide, seed=5)),
        normal(batch, wide, size, size, seed=6),
        mx.array([[True, True, True], [True, True, False]]) if masked else None,
        steps,
    )
    found = module.gated_delta_kernel(*arguments)
    expected = module.gated_delta_ops(*arguments)
    if masked:  # what a masked step says is not used
        keep = arguments[6][..., None, None]
        found = (mx.where(keep, found[0], 0), *found[1:])
        expected = (mx.where(keep, expected[0], 0), *expected[1:])
    assert len(emulator.launches) == 1
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


def test_exact_verification(load: Load, emulator: Emulator) -> None:
    module = load("models.exact_speculative_verify")
    weight, x = normal(64, 320, seed=1), normal(1, 5, 320, seed=2)
    assert close(module.exact_speculative_verify_weight(weight, x), x @ weight.T)
    experts, chosen = normal(3, 32, 320, seed=3), mx.array([[[0, 2]] * 5])
    found = module.exact_speculative_verify_switch_weight(experts, x, chosen)
    assert close(found, mx.einsum("bld,blsod->blso", x, experts[chosen]))
    assert len(names(emulator)) == 2


@pytest.mark.parametrize("rows", [3, 12])
def test_quantised_verification(rows: int, load: Load, emulator: Emulator) -> None:
    module = load("models.quantized_verifier")
    plain = nn.Linear(512, 64, bias=False)
    plain.weight = normal(64, 512, dtype=mx.bfloat16, seed=1)
    layer = nn.QuantizedLinear.from_linear(plain, 64, 4)
    x = normal(1, rows, 512, dtype=mx.bfloat16, seed=2)
    weight = mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 4).astype(mx.float32)
    found = module.optimized_affine_linear(layer, x)
    assert close(found, x.astype(mx.float32) @ weight.T, 8e-3)
    assert mx.array_equal(module.optimized_affine_argmax(layer, x), mx.argmax(found, axis=-1))
    assert len(names(emulator)) == 2


def sums_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let MLX's quantised products add in float32, as on a GPU; returns the rows of each call."""
    real, rows = mx.quantized_matmul, []

    def product(x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, *more: Any) -> Any:
        rows.append(x.shape[0])
        wide = (each.astype(mx.float32) for each in (scales, biases))
        return real(x.astype(mx.float32), w, *wide, *more).astype(x.dtype)

    monkeypatch.setattr(mx, "quantized_matmul", product)
    return rows


@pytest.mark.parametrize(
    ("fastest", "launched"),
    [
        ("verify_qmm", "flash_verify_qmm"),
        ("MLX's neural-accelerator kernel", None),  # no custom kernel
        ("mlx-vlm's exact kernel", "quantized_verify_affine_qmv_b4_gs64_t5_k512_n64_bf16"),
    ],
)
def test_verification_goes_to_the_fastest_kernel_of_an_m5(
    fastest: str,
    launched: str | None,
    load: Load,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load("models.quantized_verifier")
    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setattr(metal, "generation", lambda: 17)
    decisions = Decisions(None, {})
    monkeypatch.setattr(dispatch, "decided", lambda: decisions)
    asked_rows = sums_as_a_gpu(monkeypatch)
    monkeypatch.delenv("FLASH_MLX_KERNELS", raising=False)
    x, *rest = quantized(5, 64, 512, 64, 4, mx.bfloat16)
    place = list(dispatch.forms(FEW_ROWS, (x, *rest))).index(fastest) + trial.OPS + 1
    monkeypatch.setattr(
        trial, "seconds_in_turns", lambda runs, _: {each: 1 + (each != place) for each in runs}
    )
    found = few_rows(x, *rest)
    error, allowed = trial.worst_error([found], trial.definition(FEW_ROWS.ops, (x, *rest)))
    assert error <= allowed
    emulator.launches.clear()
    assert mx.array_equal(few_rows(x, *rest), found)
    assert names(emulator) == ({launched} - {None})
    assert asked_rows[-1] == (5 if launched else 32)  # 5: the definition
    text = dispatch.state(FEW_ROWS)
    assert fastest in text or text.startswith("used for 1 of 1 shapes")
    rows = [few_rows(x[first : first + 2], *rest) for first in (0, 2)]
    assert mx.array_equal(mx.concatenate(rows), found[:4]), "a row depends on the others"


def test_norms(load: Load, emulator: Emulator) -> None:
    kernels = load("kernels")
    branch, stream = normal(5, 96, seed=1), normal(5, 96, seed=2)
    alpha, beta, weight = (normal(96, seed=seed) for seed in (3, 4, 5))
    norm = nn.RMSNorm(96)
    norm.weight = normal(96, seed=6)
    arguments = {"alpha": alpha, "beta": beta, "post_weight": weight, "post_eps": 1e-5}
    expected = alpha * stream + beta * rms(branch * weight)
    for next_norm in (norm, None):
        found, normed = kernels.norm_add_norm(branch, stream, next_norm=next_norm, **arguments)
        assert close(found, expected)
    assert normed is None
    assert close(kernels.pre_norm(expected, norm, dtype=mx.float32), norm(expected))
    x, gate = normal(2, 3, 4, 40, seed=7), normal(2, 4, 120, seed=8)
    by_row = rms(x).swapaxes(1, 2).reshape(2, 4, 120)
    assert close(kernels.rms_norm_sigmoid_gate(x, gate, eps=1e-5), by_row * mx.sigmoid(gate))
    assert len(names(emulator)) == 4


def test_heads_and_experts(load: Load, emulator: Emulator) -> None:
    kernels = load("kernels")
    heads = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 48, "eps": 1e-5, "query_scale": 0.5}
    joined = normal(1, 3, 2 * 6 * 48, seed=1)
    q, k = mx.split(rms(joined[..., : 6 * 48].reshape(1, 3, 6, 48)), [4], axis=2)
    found = kernels.qk_norm(joined, **heads)
    assert close(found[0], 0.5 * q)
    assert close(found[1], k)
    turned = kernels.qk_norm_rope(joined, rope_base=1e4, offset=7, **heads)
    for a, b in zip(turned, (0.5 * q, k), strict=True):
        b = mx.fast.rope(
            b.swapaxes(1, 2), 48, traditional=True, base=1e4, scale=1, offset=7
        ).swapaxes(1, 2)
        assert close(a, b)
    scores = mx.sigmoid(2 * (logits := normal(5, 40, seed=2)))
    settings = {"top_k": 3, "multiplier": 2.0, "score_eps": 1e-6, "route_scale": 1.5}
    chosen, weights = kernels.expert_routing(logits, bias := normal(40, seed=3), **settings)
    best = mx.argsort(-(scores + bias), axis=-1)[:, :3]
    kept = mx.take_along_axis(scores, best, axis=-1)
    assert mx.array_equal(chosen, best)
    assert close(weights, 1.5 * kept / kept.sum(axis=-1, keepdims=True))
    outputs, norm = normal(5, 3, 72, seed=4), normal(72, seed=5)
    found = kernels.post_expert_norm_combine(outputs, kept, norm_weight=norm, eps=1e-5)
    assert close(found, (rms(outputs * norm) * kept[..., None]).sum(axis=1))
    assert len(names(emulator)) == 4
