"""Stored costs of rounds and drafts, as commands meet them: damaged, or written by two at once."""

import json
import shutil
from pathlib import Path

import pytest

from commands import start
from flash_mlx.cli import run

WORDS = ("--prompt", "a b a b a b", "--max-tokens", "12", "--temperature", "0", "--no-verbose")


def say(target: Path, capfd: pytest.CaptureFixture[str]) -> str:
    assert run(["generate", "--model", str(target), "--draft-model", "ngram", *WORDS]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


def test_damaged_costs_are_measured_anew(
    tiny_llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FLASH_MLX_CACHE", str(tmp_path))
    folder = tmp_path / "costs"
    expected = say(tiny_llava, capfd)
    if not folder.is_dir():  # too busy a machine to measure what is worth keeping
        pytest.skip("nothing was worth remembering")
    (file,) = folder.iterdir()
    for damage in (b"", b"\xff\xfe\x00", b'{"key": 3}', b"[" * 100_000):
        file.write_bytes(damage)
        assert say(tiny_llava, capfd) == expected
    shutil.rmtree(folder)
    folder.write_text("no folder")
    assert say(tiny_llava, capfd) == expected


@pytest.mark.slow
def test_two_commands_that_measure_at_once_say_the_same(tiny_llava: Path, tmp_path: Path) -> None:
    words = ("generate", "--model", tiny_llava, "--draft-model", "ngram", *WORDS)
    environment = {"FLASH_MLX_CACHE": str(tmp_path)}
    both = [start(*words, environment=environment) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert said[0][0]
    for file in (tmp_path / "costs").glob("*"):
        assert json.loads(file.read_text())["rounds"]
