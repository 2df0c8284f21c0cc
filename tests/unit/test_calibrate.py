"""Costs are measured once, and what is stored of them is believed only if it is sound."""

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from flash_mlx import blas
from flash_mlx.cost import Costs
from flash_mlx.draft import AdaptiveDrafter, Calibrator, FlashDrafter
from flash_mlx.draft import calibrate as module
from flash_mlx.draft.calibrate import NOMINAL
from flash_mlx.draft.stored import machine, store_costs
from flash_mlx.targets import LoadedTarget
from flash_mlx.targets.scratch import scratch_cache
from flash_mlx.tree import DraftTree, Topology
from flash_reference import random_model
from toy import ToyTarget

SOUND = Costs(1.0, ((1, 1.0), (2, 1.5)), ((1, 0.1),))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASH_MLX_CACHE", str(tmp_path))
    return tmp_path / "costs"


def measuring(costs: Costs, *, steady: bool, calls: list[int]) -> Callable[..., object]:
    def measure(self: Calibrator, context: int) -> tuple[Costs, bool]:
        calls.append(context)
        return costs, steady

    return measure


def calibrator(llava: LoadedTarget, drafter: FlashDrafter | None = None) -> Calibrator:
    target = llava.target
    return Calibrator(target, lambda rows: scratch_cache(target, rows), target.model, drafter)


def test_rounds_and_drafts_are_measured_on_the_real_loop(llava: LoadedTarget, folder: Path) -> None:
    target = llava.target
    small = ToyTarget()
    drafter = FlashDrafter(random_model(), small.embed, small.lm_head)
    drafted = module._drafts(drafter, small.hidden_size)
    assert list(drafted) == [1, 3, 4, 6]  # a block of 3, and a second pass
    assert all(run() > 0 for run in drafted.values())
    start = time.perf_counter()
    costs = calibrator(llava).costs(30, greedy=True)
    assert time.perf_counter() - start < 60  # however busy the machine is
    assert costs.rounds[0][0] == 1
    assert costs.plain <= costs.rounds[0][1]
    assert costs.drafts == ()
    assert target.make_cache().length == 0


def test_the_scratch_cache_holds_rows_and_takes_more(loaded: LoadedTarget) -> None:
    cache = scratch_cache(loaded.target, 40)
    assert cache.length == 40
    tree = DraftTree(Topology((-1, 0, 0)), mx.array([1, 2, 3], dtype=mx.int32))
    out = loaded.target.verify(tree, cache)
    cache.commit((0, 2))
    assert cache.length == 42
    assert mx.isfinite(out.logits).all().item()


def test_what_was_measured_is_measured_once(
    llava: LoadedTarget, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Calibrator, "_measure", measuring(SOUND, steady=True, calls=calls))
    for _ in range(2):  # another object, as another process has
        assert calibrator(llava).costs(30, greedy=True) == SOUND
    assert len(calls) == 1
    (file,) = folder.iterdir()
    assert json.loads(file.read_text())["key"]["text"] == "greedy"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("1.5", "-1.5"),
        lambda text: text.replace("1.5", "NaN"),
        lambda text: text.replace('"rounds"', '"laps"'),
        lambda text: text.replace('"greedy"', '"sampled"'),
        lambda text: text.replace("1.5", '"much"'),
        lambda text: "\x00" * 100,
    ],
)
def test_a_damaged_file_is_replaced(
    damage: Callable[[str], str],
    llava: LoadedTarget,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Calibrator, "_measure", measuring(SOUND, steady=True, calls=calls))
    calibrator(llava).costs(30, greedy=True)
    (file,) = folder.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert calibrator(llava).costs(30, greedy=True) == SOUND
    assert len(calls) == 2
    assert file.read_text() == whole
    assert list(folder.iterdir()) == [file]


def test_greedy_texts_measure_again_what_was_measured_badly_and_sampled_texts_do_not(
    llava: LoadedTarget, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, calls = Costs(1.0, ((1, 1.0), (2, 2.5))), []
    monkeypatch.setattr(Calibrator, "_measure", measuring(SOUND, steady=False, calls=calls))
    assert calibrator(llava).costs(30, greedy=False) == SOUND
    monkeypatch.setattr(Calibrator, "_measure", measuring(other, steady=True, calls=calls))
    assert calibrator(llava).costs(30, greedy=True) == other
    assert calibrator(llava).costs(30, greedy=False) == SOUND


def test_what_is_kept_for_good_is_measured_twice_on_a_busy_machine(
    llava: LoadedTarget, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Costs(1.1, ((1, 2.0), (2, 9.0), (3, 9.5)), ((1, 0.1), (4, 8.0)))
    measured, calls = iter([slow, SOUND]), []

    def measure(self: Calibrator, context: int) -> tuple[Costs, bool]:
        calls.append(context)
        return next(measured), False

    monkeypatch.setattr(Calibrator, "_measure", measure)
    one = calibrator(llava)
    assert one.costs(30, greedy=True) == slow
    least = Costs(1.0, ((1, 1.0), (2, 1.5), (3, 9.5)), ((1, 0.1), (4, 8.0)))
    assert one.costs(30, greedy=False) == least
    assert calibrator(llava).costs(30, greedy=False) == least
    assert len(calls) == 2


def test_where_nothing_can_be_stored_sampled_texts_do_not_depend_on_the_clock(
    llava: LoadedTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASH_MLX_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(Calibrator, "_measure", measuring(SOUND, steady=True, calls=[]))
    assert calibrator(llava).costs(30, greedy=True) == SOUND
    assert calibrator(llava).costs(30, greedy=False) == NOMINAL


def store(number: int) -> float:
    costs = Costs(float(1 + number), ((1, 1000.0),))
    stored = store_costs(costs, {"text": "greedy"})
    assert stored is not None
    return stored.plain


def test_processes_that_store_at_once_go_on_alike(folder: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        stored = pool.map(store, range(40), chunksize=1)
    assert len(set(stored)) == 1
    assert len(list(folder.iterdir())) == 1


def test_longer_texts_have_costs_of_their_own(
    llava: LoadedTarget, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Calibrator, "_measure", measuring(SOUND, steady=True, calls=calls))
    monkeypatch.setattr(llava.target, "max_context", None)
    costs = calibrator(llava).costs
    for num_rows in (10, 300, 1023, 1024, 5000, 10**6):
        costs(num_rows, greedy=True)
    assert calls == [256, 1024, 4096, 8192]


def test_a_text_is_explained() -> None:
    curve = Costs(1.0, ((1, 1.0), (2, 1.1), (8, 1.5)), ((1, 0.1), (7, 0.2)))
    drafter = AdaptiveDrafter(None, lambda num_rows, greedy: curve)
    line = drafter.explain(10, {(7, 7): 1, (3, 0): 1, (0, 0): 2}, parked=2)
    assert line.startswith("Drafting: 5.0 drafts in a pass, none in 2 of 4 passes; ")
    assert (
        f"{9 / (1.5 + 0.2 + 1.1 + 0.4 / 3 + 0.1 + 0.2 / 6):.2f} tokens in the time of one" in line
    )
    assert "over 2, 8 rows takes 1.10, 1.50, drafting 1 to 7 tokens 0.10 to 0.20 times" in line
    assert "none in 2 passes, as it does not pay" in drafter.explain(10, {(0, 0): 2}, parked=1)
    nothing = drafter.explain(10, {(0, 0): 2}, parked=0)  # it was dropped, or no text repeats
    assert "none in 2 passes, as nothing was there to draft" in nothing


@pytest.mark.usefixtures("folder")
def test_one_point_is_no_curve(llava: LoadedTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    lone = measuring(Costs(1.0, ((1, 1.0),)), steady=True, calls=[])
    monkeypatch.setattr(Calibrator, "_measure", lone)
    assert calibrator(llava).costs(300, greedy=True) == NOMINAL
    assert calibrator(llava).costs(300, greedy=False) == NOMINAL


def test_without_a_home_nothing_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FLASH_MLX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert store_costs(SOUND, {"a": "b"}) is None


@pytest.mark.parametrize("limit", [300, 90, 40, 12])
def test_a_short_context_is_enough_to_measure_in(
    limit: int, llava: LoadedTarget, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava.target, "max_context", limit)
    monkeypatch.setattr(module, "BUDGET", 0.0)
    costs, _ = calibrator(llava)._measure(calibrator(llava)._context(5))
    assert costs.rounds[0][0] == 1
    assert costs.rounds[-1][0] < limit


@pytest.mark.parametrize(
    ("seconds", "turns"),
    [
        ((0.02,) * 20, 3),  # alike: the budget is enough
        ((0.02, 0.02, 0.015, 0.02, 0.015, *(0.02,) * 20), 5),  # until it is seen twice
        ((0.05, 0.04, 0.03, 0.02, 0.015, 0.012, 0.012, *(0.005,) * 20), 7),
        ((0.02, 0.02, 0.01, *(0.02,) * 20), 9),  # one that does not come back
    ],
)
def test_times_that_are_not_alike_are_measured_again(
    seconds: tuple[float, ...], turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = [0.0], [0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def run() -> float:
        now[0] += 0.07
        calls[0] += 1
        return seconds[calls[0] - 1]

    times, steady = module.fastest({1: run})
    assert calls[0] == turns
    assert times == {1: min(seconds[1:turns])}
    assert steady == (turns < 9)


def test_costs_belong_to_a_blas_and_to_a_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MLX_KERNELS", "on")
    with_kernels = machine()
    monkeypatch.setenv("FLASH_MLX_KERNELS", "off")
    assert machine() != with_kernels
    assert machine()["blas"] == blas.bind().name
