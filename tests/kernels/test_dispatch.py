"""When a kernel is used: only where it is right and faster, and never at the cost of an error."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from cases import CASES, Case, normal
from emulator import Emulator
from flash_mlx.kernels import dispatch, metal, trial
from flash_mlx.kernels.decisions import Decision, Decisions
from flash_mlx.kernels.dispatch import Kernel, Rival, choose, run, state
from flash_mlx.kernels.trial import TOLERANCE, try_out, worst_error


def double(x: mx.array) -> list[mx.array]:
    return [2 * x]


def always(*_: Any) -> None:
    return None


def anything(*_: Any) -> bool:
    return True


SOURCE = metal.Source("double", ("x",), ("y",), "y[0] = 2 * x[0];")
X = normal(16)


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Metal device, with nothing decided yet; returns the file of decisions."""
    file = tmp_path / "kernels.json"
    monkeypatch.delenv("FLASH_MLX_KERNELS", raising=False)
    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setattr(dispatch, "decided", lambda: Decisions.load(file))
    return file


def timed(monkeypatch: pytest.MonkeyPatch, kernel: float, ops: float) -> None:
    monkeypatch.setattr(
        trial, "seconds_in_turns", lambda *_: {trial.OPS: ops, trial.OPS + 1: kernel}
    )


def test_here_mlx_own_operations_compute() -> None:
    if metal.available():
        pytest.skip("this machine has Metal")
    kernel = Kernel("double", double, always, always, (SOURCE,))
    assert choose(kernel, X) == dispatch.NO_METAL
    assert mx.array_equal(run(kernel, X)[0], 2 * X)


def test_a_kernel_that_is_right_and_faster_is_used_and_remembered(
    on_a_mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []

    def launch(x: mx.array) -> list[mx.array]:
        launches.append(x)
        return [x + x]

    kernel = Kernel("double", double, launch, always, (SOURCE,))
    timed(monkeypatch, 1.0, 2.0)
    decision = choose(kernel, X)
    assert (decision.use, decision.error) == (True, 0.0)
    assert len(launches) == 2
    assert choose(kernel, X) == decision
    assert len(launches) == 2, "asked again"
    assert json.loads(on_a_mac.read_text()), "not on disk"
    choose(kernel, X.astype(mx.float16))
    assert len(launches) == 4, "another type is another question"


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (lambda x: [x / 0 * 0], "wrong"),
        (lambda x: [2 * x + 1e-3], "wrong"),
        (lambda x: [mx.random.normal(x.shape)], "same bits twice"),
        (lambda x: [mx.reshape(x, (3,))], "does not run"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_not_used(
    launch: Any, reason: str, on_a_mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 1.0, 2.0)
    kernel = Kernel("double", double, launch, always, (SOURCE,))
    decision = choose(kernel, X)
    assert not decision.use
    assert reason in decision.reason
    assert mx.array_equal(run(kernel, X)[0], 2 * X)


def test_a_kernel_that_is_slower_or_does_not_fit_is_not_used(
    on_a_mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 2.0, 1.0)
    assert not choose(Kernel("double", double, double, always, (SOURCE,)), X).use
    odd = Kernel("double", double, double, lambda x: "nothing at all", (SOURCE,))
    assert choose(odd, X).reason == "it takes nothing at all"


RIVALS = (
    Rival("right", "1", lambda x: [x + x], lambda: True, anything),
    Rival("wrong", "1", lambda x: [3 * x], lambda: True, anything),
    Rival("elsewhere", "1", lambda x: [x + x], lambda: False, anything),
    Rival("unfit", "1", lambda x: [x + x], lambda: True, lambda *_: False),
)


@pytest.mark.parametrize(
    ("times", "form"), [((3, 1, 2), "double"), ((3, 2, 1), "right"), ((1, 2, 3), None)]
)
def test_the_fastest_form_that_is_right_is_used(
    times: tuple[float, ...], form: str | None, on_a_mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_forms = []

    def in_turns(runs: dict[int, Any], _: int) -> dict[int, float]:
        timed_forms.append(len(runs))
        return dict(zip(sorted(runs), times, strict=True))

    monkeypatch.setattr(trial, "seconds_in_turns", in_turns)
    kernel = Kernel("double", double, double, always, (SOURCE,), RIVALS)
    decision = choose(kernel, X)
    assert timed_forms == [3], "MLX's operations, the kernel and the rival that is right"
    assert (decision.use, decision.form) == (form is not None, form or "double")
    assert mx.array_equal(run(kernel, X)[0], 2 * X)
    assert ("right for 1" in state(kernel)) == (form == "right")
    assert "competes with right and wrong and unfit" in state(kernel)
    newer = replace(kernel, rivals=(replace(RIVALS[0], version="2"),))
    assert dispatch.key_of(newer, [X]) != dispatch.key_of(kernel, [X])
    monkeypatch.setenv("FLASH_MLX_KERNELS", "force")
    assert choose(kernel, X).form == "double"


def test_a_rival_may_take_what_the_kernel_does_not(
    on_a_mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 1.0, 2.0)
    kernel = Kernel("double", double, always, lambda x: "nothing", (SOURCE,), RIVALS[:1])
    assert choose(kernel, X).form == "right"
    gone = replace(kernel, rivals=(replace(RIVALS[0], here=lambda: False),))
    assert choose(gone, X).reason == "it takes nothing", "what was decided with a rival"
    monkeypatch.setenv("FLASH_MLX_KERNELS", "force")
    assert not choose(kernel, X).use


def test_generations_of_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in {"applegpu_g17s": 17, "applegpu_g13d": 13, "cpu": 0, "": 0}.items():
        monkeypatch.setattr(mx, "device_info", lambda name=name: {"architecture": name})
        assert metal.generation() == number


def test_the_setting_decides_first(on_a_mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("double", double, double, always, (SOURCE,))
    monkeypatch.setenv("FLASH_MLX_KERNELS", "off")
    assert choose(kernel, X) == dispatch.OFF
    monkeypatch.setenv("FLASH_MLX_KERNELS", "force")
    assert choose(kernel, X) == replace(dispatch.FORCED, form="double")
    monkeypatch.setenv("FLASH_MLX_KERNELS", "perhaps")
    assert dispatch.mode() == "on"


def test_growing_texts_do_not_ask_again(on_a_mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        dispatch,
        "try_out",
        lambda *_: asked.append(1) or Decision(True, "tried out", form="double"),
    )
    kernel = Kernel("double", double, double, always, (SOURCE,))
    for length in range(600, 700):
        choose(kernel, mx.zeros((length, 8)), length)
    assert len(asked) == 1
    choose(kernel, mx.zeros((600, 9)), 600)
    choose(kernel, mx.zeros((1100, 8)), 600)
    assert len(asked) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"use": "yes"}}', "\x00"])
def test_a_damaged_file_counts_as_empty(content: str, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(content)
    decisions = Decisions.load(file)
    assert decisions.get(("a",)) is None
    decisions.put(("a",), Decision(True, "why"))
    assert Decisions.load(file).get(("a",)) == Decision(True, "why")


def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    decisions = Decisions.load(tmp_path / "taken" / "kernels.json")
    decisions.put(("a",), Decision(True, "why"))
    assert decisions.get(("a",)) == Decision(True, "why")


@pytest.mark.parametrize("kernel", sorted({case.kernel.name for case in CASES}))
def test_every_kernel_passes_its_first_use_test(
    kernel: str, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random stand-ins fit every kernel, and the definition meets them."""
    timed(monkeypatch, 1.0, 2.0)
    case: Case = next(case for case in CASES if case.kernel.name == kernel)
    decision = try_out(case.kernel.ops, {kernel: case.kernel.launch}, case.make())
    assert decision.use, decision


def test_errors_are_measured_against_the_definition() -> None:
    a = mx.array([1.0, mx.inf, mx.nan])
    assert worst_error([a], [a]) == (0.0, TOLERANCE[mx.float32])
    assert worst_error([a[:2]], [mx.array([1.0, 5.0])])[0] == mx.inf
    assert worst_error([mx.array([1, 2])], [mx.array([1, 3])]) == (0.5, 0.0)
