"""Whatever is wrong with a command line: one line that says what came, the right exit code."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import command, make_drafter
from flash_mlx.cli import run
from tiny import build_llava, edit_json, random_image

Complaint = Callable[..., str]


@pytest.fixture
def complaint(capfd: pytest.CaptureFixture[str]) -> Complaint:
    """Run a command that must fail; returns its one line."""

    def complain(code: int, *words: object) -> str:
        assert run([str(word) for word in words]) == code
        out, err = capfd.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert "FLASH_MLX_DEBUG" not in err
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("flash-mlx: error: ")
        return lines[0].removeprefix("flash-mlx: error: ")

    return complain


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--max-tokens 0", ["--max-tokens", "1 or more", "got 0"]),
        ("--max-tokens -3", ["--max-tokens", "got -3"]),
        ("--max-tokens many", ["--max-tokens", "'many'"]),
        ("--temperature -0.5", ["--temperature", "0 or more", "got -0.5"]),
        ("--temp nan", ["--temperature", "got nan"]),
        ("--temp inf", ["--temperature", "got inf"]),
        ("--top-p 0", ["--top-p", "above 0", "got 0"]),
        ("--top-p 1.5", ["--top-p", "at most 1", "got 1.5"]),
        ("--top-k -1", ["--top-k", "0 or more", "got -1"]),
        ("--min-p 2", ["--min-p", "between 0 and 1", "got 2"]),
        ("--repetition-penalty 0", ["--repetition-penalty", "above 0", "got 0"]),
        ("--repetition-penalty inf", ["--repetition-penalty", "got inf"]),
        ("--presence-penalty 2.5", ["--presence-penalty", "between -2 and 2", "got 2.5"]),
        ("--frequency-penalty nan", ["--frequency-penalty", "got nan"]),
        ("--frequency-context-size 0", ["--frequency-context-size", "1 or more", "got 0"]),
        ("--logit-bias 7", ["--logit-bias", "ID=VALUE", "got 7"]),
        ("--logit-bias seven=1", ["--logit-bias", "got seven=1"]),
        ("--logit-bias=-1=1", ["--logit-bias", "got -1=1"]),
        ("--logit-bias 7=inf", ["--logit-bias", "got 7=inf"]),
        ("--logit-bias 7=nan", ["--logit-bias", "got 7=nan"]),
        ("--logit-bias 7=1 --logit-bias 7=2", ["--logit-bias", "once", "got 7=2"]),
        ("--draft-block-size 0", ["--draft-block-size", "1 or more", "got 0"]),
        ("--num-draft-tokens -1", ["--draft-block-size", "got -1"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--sed 1", ["--sed"]),
        ("--model", ["--model", "argument"]),
        ("stray", ["stray"]),
    ],
)
def test_wrong_usage_names_the_flag_and_what_came(
    complaint: Complaint, words: str, parts: list[str]
) -> None:
    said = complaint(2, "generate", "--prompt", "Hello.", *words.split())
    for part in parts:
        assert part in said


def test_wrong_usage_elsewhere(complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "dance" in complaint(2, "dance")
    assert "--image, --video or --prompt" in complaint(2, "generate")
    assert "empty" in complaint(2, "generate", "--prompt", " ")
    monkeypatch.setattr(sys, "stdin", None)
    assert "empty" in complaint(2, "generate", "--prompt", "-")


def test_pictures_that_cannot_be_read(complaint: Complaint, tmp_path: Path) -> None:
    """The target does not exist either: pictures are looked at first, which is much faster."""
    whole = tmp_path / "whole.jpg"
    random_image(200, 200).save(whole)
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.jpg").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:2000])
    for name, part in {
        "missing.png": "does not exist",
        "empty.png": "empty",
        "notes.jpg": "none",
        "cut.jpg": "damaged",
        ".": "folder",
    }.items():
        file = tmp_path / name
        said = complaint(1, "generate", "--model", "/none", "--image", whole, file)
        assert str(file) in said
        assert part in said


def test_targets_that_cannot_be_loaded(
    complaint: Complaint, tiny_llava: Path, tmp_path: Path
) -> None:
    def say(model: object) -> str:
        return complaint(1, "generate", "--prompt", "Hello.", "--model", model)

    assert "/no/such/model" in say("/no/such/model")
    assert "no such" in say("no such model")
    assert "nobody/nothing" in say("nobody/nothing")

    bare = tmp_path / "bare"
    bare.mkdir()
    assert "config.json" in say(bare)

    cut = shutil.copytree(tiny_llava, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "model.safetensors" in say(cut)

    other = shutil.copytree(tiny_llava, tmp_path / "other")
    edit_json(other, "config.json", model_type="telepathy")
    assert "telepathy" in say(other)
    assert str(weights) not in say(weights.parent / "config.json")


def test_drafters_that_do_not_fit(complaint: Complaint, tiny_llava: Path, tmp_path: Path) -> None:
    def say(drafter: object, *more: object) -> str:
        words = ("--prompt", "Hello.", "--model", tiny_llava, "--draft-model", drafter)
        return complaint(1, "generate", *words, *more)

    assert "hidden size of 32" in say(make_drafter(tmp_path / "narrow", hidden_size=32))
    assert "vocabulary of 500" in say(make_drafter(tmp_path / "wordy", vocab_size=500))
    assert "draft_kind" in say(tiny_llava)
    assert "/no/such/drafter" in say("/no/such/drafter")
    fitting = make_drafter(tmp_path / "fitting")
    assert "block size of 9" in say(fitting, "--draft-block-size", 9)
    weights = fitting / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "model.safetensors" in say(fitting)


def test_a_prompt_longer_than_the_context(complaint: Complaint, tmp_path: Path) -> None:
    short = build_llava(tmp_path / "short", max_position_embeddings=40)
    words = ("generate", "--model", short, "--draft-model", "none", "--prompt")
    assert "context of 40" in complaint(1, *words, "word " * 200)
    assert run([str(word) for word in (*words, "Hi.", "--max-tokens", 500)]) == 0


def test_a_blas_that_cannot_serve_is_one_line(tiny_llava: Path) -> None:
    code, out, err = command(
        "generate", "--model", tiny_llava, "--prompt", "Hello.",
        environment={"FLASH_MLX_BLAS": "/no/such/blas.so"},
    )  # fmt: skip
    assert (code, out) == (1, b"")
    assert len(err.splitlines()) == 1
    assert "/no/such/blas.so" in err
