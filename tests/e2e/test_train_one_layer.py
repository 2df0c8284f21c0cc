"""`flash-mlx train --init-from` an EAGLE, MSD or ViSpec drafter, on a tiny target."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest

from flash_mlx.checkpoint import load_network, save_drafter
from flash_mlx.cli import run
from peers_reference import CONFIGS, random_model
from training import parameters

SMALL = ("--max-tokens", 6, "--batch-size", 2, "--validation-prompts", 1, "--iters", 3)


def train(target: Path, pictures: Path, begin: Path, output: Path, *more: object) -> int:
    what = ("--model", target, "--data", pictures, "--output", output, "--init-from", begin)
    return run([str(word) for word in ("train", *what, *SMALL, *more)])


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("eagle", ("--no-bench", "--learning-rate", 1e-3)),
        ("msd", ("--no-bench", "--preset", "ours")),
        ("vispec", ("--learning-rate", 1e-3)),
    ],
)
def test_a_drafter_of_another_kind_goes_on_learning(
    kind: str,
    more: tuple[object, ...],
    tiny_llava: Path,
    pictures: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    begin, output = tmp_path / "begin", tmp_path / "run"
    model = random_model(kind)
    if kind == "msd":  # what is quantised is made plain
        nn.quantize(model, 32, 8, class_predicate=lambda name, _: name.endswith("_proj"))
    save_drafter(model, begin, {})
    cached = ("--cache-features", tmp_path / "states") if kind == "vispec" else ()
    keep = ("--set", "best_by=")  # the last weights, not the best
    assert train(tiny_llava, pictures, begin, output, *more, *cached, *keep) == 0
    config = json.loads((output / "config.json").read_text())
    assert config["draft_kind"] == kind
    assert config["training"]["losses"]["variation"] == (20 if kind == "vispec" else 0)
    assert (
        config["training"]["losses"]["distribution"] == {"eagle": 0.1, "msd": 1, "vispec": 0}[kind]
    )
    assert config["training"]["optimizer"] == ("muon" if kind == "msd" else "adamw")
    assert f"Initial weights: the drafter {begin}" in (output / "README.md").read_text()
    before, after = (parameters(load_network(path)[0]) for path in (begin, output))
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    capfd.readouterr()
    answer = ["generate", "--model", str(tiny_llava), "--image", str(pictures / "0.png")]
    answer += ["--max-tokens", "8", "--json", "--draft-model"]
    texts = []
    for drafter in (str(output), "none"):
        assert run([*answer, drafter]) == 0
        texts.append(json.loads(capfd.readouterr().out))
    assert texts[0]["draft_kind"] == kind
    assert texts[0]["token_ids"] == texts[1]["token_ids"]


def test_drafters_that_do_not_fit_or_cannot_be_trained_are_refused(
    tiny_llava: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    narrow = replace(CONFIGS["eagle"], hidden_size=32)
    save_drafter(random_model("eagle", narrow), tmp_path / "narrow", {})
    save_drafter(random_model("eagle"), tmp_path / "other", {"target": {"num_layers": 99}})
    save_drafter(random_model("eagle3"), tmp_path / "eagle3", {})
    (tmp_path / "empty").mkdir()
    for name, says in (
        ("narrow", "expects a hidden size of 32"),
        ("other", "for the number of decoder layers 99"),
        ("eagle3", "Drafters that can be trained are flash, eagle, msd, vispec"),
        ("empty", "has no config.json"),
    ):
        # What no target helps is said before one is loaded.
        target = tiny_llava if name in ("narrow", "other") else tmp_path / "nowhere"
        assert train(target, pictures, tmp_path / name, tmp_path / "run") == 1
        assert says in capfd.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run").exists()
