"""`flash-mlx selftest`, and what `doctor` says of kernels."""

import json

import mlx.core as mx
import pytest

from commands import command
from flash_mlx.kernels import KERNELS, dispatch, metal
from flash_mlx.kernels.decisions import Decision, Decisions
from flash_mlx.kernels.dispatch import state
from flash_mlx.kernels.verify_qmm import VERIFY_QMM
from flash_mlx.selftest import Trial, _calls

NAMES = {kernel.name for kernel in KERNELS}


def test_the_command_says_that_there_is_no_metal_and_runs_the_definitions() -> None:
    code, out, err = command("selftest", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert {trial["kernel"] for trial in result["trials"]} == NAMES
    assert result["verify_cost"]["1"] == 1.0
    if not metal.available():
        assert not result["metal"]
        assert all(trial["decision"] is None for trial in result["trials"])


@pytest.mark.parametrize("full", [False, True])
def test_every_kernel_takes_what_it_is_tested_with(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "quantize", lambda w, g, b: _shapes(w, g, b))
    for kernel, size, arguments in _calls(mx.float16, full=full):
        assert kernel.fits(*arguments) is None, (kernel.name, size)


def _shapes(weight: mx.array, group: int, bits: int) -> tuple[mx.array, ...]:
    """What `mx.quantize` returns, not computed."""
    outputs, inputs = weight.shape
    scales = mx.zeros((outputs, inputs // group), weight.dtype)
    return mx.zeros((outputs, inputs * bits // 32), mx.uint32), scales, scales


def test_only_wrong_kernels_fail() -> None:
    wrong, slow = Decision(False, "wrong", 0.5), Decision(False, "slow", 0.0, 2.0, 1.0)
    assert Trial("k", "s", "float16", wrong).failed
    assert not Trial("k", "s", "float16", slow).failed
    assert not Trial("k", "s", "float16", None).failed


def test_doctor_says_why_kernels_are_not_used() -> None:
    code, out, _ = command("doctor", "--json", environment={"FLASH_MLX_KERNELS": "off"})
    assert code == 0
    assert json.loads(out)["kernels"] == dict.fromkeys(NAMES, "FLASH_MLX_KERNELS=off")


def test_states_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.delenv("FLASH_MLX_KERNELS", raising=False)
    decisions = Decisions(None, {})
    monkeypatch.setattr(dispatch, "decided", lambda: decisions)
    assert state(VERIFY_QMM) == "not asked yet"
    arguments = (mx.zeros((8, 128)), mx.zeros((64, 16), mx.uint32), mx.zeros((64, 2)))
    key = dispatch.key_of(VERIFY_QMM, (*arguments, arguments[2], 64, 4))
    decisions.put(key, Decision(True, "1.50 times the speed", form="verify_qmm"))
    decisions.put((*key, "another"), Decision(False, "0.90 times the speed"))
    assert state(VERIFY_QMM) == "used for 1 of 2 shapes; else: 0.90 times the speed"
    monkeypatch.setenv("FLASH_MLX_KERNELS", "force")
    assert state(VERIFY_QMM) == "used wherever it fits: FLASH_MLX_KERNELS=force"
