"""The examples about costs do what they say, without a clock."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from flash_mlx.bench.roofline import Shape, bytes_of
from toy import ToyTarget

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_check_predicts_what_follows_its_own_lines() -> None:
    check = script("roofline_check")
    shapes = {n: Shape("x", 192, 512, n, 3, 3, 64, 1280) for n in (6, 9, 12)}
    cost = {1: 1.0, 2: 1.0, 4: 0.9, 8: 1.3, 10: 1.6}

    def seconds(point: object, rows: int) -> float:
        weights = bytes_of(shapes[point.layers].weights, 32) / 1e6
        context = shapes[point.layers].context_bytes(point.context) * 2 / 1e6
        if rows == 1:
            return 0.001 + 0.0004 * weights + 0.0001 * context
        return 0.002 + (0.0003 + 0.0001 * cost[rows]) * weights + (2e-4 + 3e-5 * rows) * context

    found = {}
    for layers in (6, 9):
        for context in (256, 1280):
            for drafts in (0, 1, 3, 7):
                point = check.Point(layers, context, drafts)
                found[point] = check.Measured([seconds(point, 1 + drafts)], 1, 1)
    speedup, _ = check.predictor(shapes, cost, found)
    tested = check.Point(12, 700, 9)
    plain, drafted = seconds(tested, 1), seconds(tested, 10)
    assert speedup(tested, 3.5) == pytest.approx(3.5 * plain / drafted, rel=1e-6)


def test_the_check_spoils_drafts_but_no_text() -> None:
    check = script("roofline_check")
    target = ToyTarget(vocab_size=11)
    plain, alone = check.say(target, check.NoDrafter())
    text, stats = check.say(target, check.Spoilt(plain, 3, 11))
    assert text == plain
    assert alone.rounds == check.TOKENS - 1
    assert 1.5 < stats.mean_acceptance_length < 4
    sure = check.Spoilt(plain, 3, 11)
    sure.text = [*plain, 0, 0, 0, 0]
    assert check.say(target, sure)[1].rounds == -(-(check.TOKENS - 1) // 4)


def test_a_drafter_with_latents_keeps_as_much_of_any_picture() -> None:
    growth = script("cost_growth")
    sizes = [growth.USUAL | {"visual tokens": n, "width": 64} for n in (64, 256)]
    few, many = (growth.Case(each).memory() for each in sizes)
    assert few["FLASH"] == many["FLASH"]
    assert many["MSD"] - few["MSD"] == pytest.approx(192 * 2 * 4 * 64 / 1e6)
    passes = growth.Case(sizes[0]).passes()
    assert passes["FLASH"]().shape == passes["MSD"]().shape == (5,)
