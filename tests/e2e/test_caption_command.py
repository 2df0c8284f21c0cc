"""`flash-mlx caption` as people run it, killed and resumed included."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import command, start
from flash_mlx.caption import caption
from flash_mlx.cli import run
from flash_mlx.generate import load
from tiny import random_image

SETTINGS = ("--max-tokens", 8, "--temp", 0)


def make_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        random_image(40, 40, seed=number).save(folder / f"{number:03}.png")
    return folder


def test_a_killed_run_goes_on_where_it_was(tiny_llava: Path, tmp_path: Path) -> None:
    photos, output = make_pictures(tmp_path / "in", 70), tmp_path / "out.jsonl"
    rng = random.Random(1)
    (photos / "060.png").write_text("no picture")
    words = ("caption", photos, "-o", output, "--model", tiny_llava, "--resume", "--sidecar",
             *SETTINGS)  # fmt: skip
    for _ in range(2):
        before = output.read_bytes() if output.exists() else b""
        process = start(*words)
        goal = before.count(b"\n") + rng.randint(3, 15)
        while process.poll() is None and (
            not output.exists() or output.read_bytes().count(b"\n") < goal
        ):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        content = output.read_bytes()
        assert content[: before.rfind(b"\n") + 1] == before[: before.rfind(b"\n") + 1]
        assert goal <= content.count(b"\n") < 70
    code, out, err = command(*words)
    assert (code, out) == (0, b""), err
    assert " done before" in err
    assert "1 failed" in err
    rows = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    assert [row["path"] for row in rows] == list(map(str, sorted(photos.glob("*.png"))))
    expected = caption(load(tiny_llava), photos, max_tokens=8, temperature=0.0)
    for row, whole in zip(rows, expected, strict=True):
        assert row.get("text") == whole.text
        sidecar = Path(row["path"]).with_suffix(".txt")
        assert (sidecar.read_bytes().decode() if sidecar.exists() else None) == whole.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_that_is_killed_loses_what_is_under_way(
    tiny_llava: Path, tmp_path: Path, temperature: float
) -> None:
    photos, output = make_pictures(tmp_path / "in", 30), tmp_path / "out.jsonl"
    words = ["caption", photos, "-o", output, "--model", tiny_llava, "--resume", "--max-tokens", 8]
    words += ["--temp", temperature, "--seed", 3]
    process = start(*words, "--batch-size", 4)
    while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # It goes on with other batches, and says what one run says, or texts that are decoded alone.
    code, _, err = command(*words, "--batch-size", 3)
    assert code == 0, err
    assert "3 texts at a time" in err
    rows = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    assert [row["path"] for row in rows] == list(map(str, sorted(photos.glob("*.png"))))
    settings = {"max_tokens": 8, "temperature": temperature, "seed": 3}
    expected = caption(load(tiny_llava), photos, batch_size=1, **settings)
    assert {row["path"]: row["text"] for row in rows} == {e.path: e.text for e in expected}


def test_an_interrupt_keeps_the_rows(tiny_llava: Path, tmp_path: Path) -> None:
    photos, output = make_pictures(tmp_path / "in", 60), tmp_path / "out.jsonl"
    process = start("caption", photos, "-o", output, "--model", tiny_llava, "--max-tokens", 60,
                    "--draft-model", "none")  # fmt: skip
    while not (output.exists() and output.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"images/min" in err
    content = output.read_bytes()
    assert content.endswith(b"\n")
    assert 0 < content.count(b"\n") < 60


def test_names_that_are_no_text(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    random_image().save(tmp_path / "plain.png")
    (tmp_path / "plain.png").replace(file)
    words = ["caption", str(file), "-o", str(tmp_path / "out.jsonl"), "--model", str(tiny_llava)]
    assert run([*words, "--sidecar", "--max-tokens", "4"]) == 0
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="ascii").splitlines())
    assert row["path"] == str(file)
    assert (tmp_path / os.fsdecode(b"caf\xe9.txt")).read_bytes().decode() == row["text"]
    assert run([*words, "--resume"]) == 0
    assert "1 done before" in capfd.readouterr().err


def test_what_cannot_be_done_is_said_before_the_model_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random_image().save(tmp_path / "a.png")
    (tmp_path / "old.jsonl").write_text('{"path": "a.png", "text": "A."}\n')
    new = tmp_path / "new.jsonl"

    def complaint(code: int, *words: object) -> str:
        assert run(["caption", *map(str, words), "--model", "/none"]) == code
        out, err = capfd.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1, err
        return err

    assert "--workers cannot help" in complaint(2, tmp_path, "-o", new, "--workers", 4)
    assert "--output" in complaint(2, tmp_path)
    assert "INPUT" in complaint(2, "-o", new)
    assert "empty" in complaint(2, tmp_path, "-o", new, "--prompt", " ")
    assert "--max-tokens" in complaint(2, tmp_path, "-o", new, "--max-tokens", 0)
    assert "{mood}" in complaint(1, tmp_path, "-o", new, "--prompt", "A {mood} picture")
    for size in ("0", "-1", "two", "1.5", "257", "\uff19"):
        assert "--batch-size" in complaint(2, tmp_path, "-o", new, "--batch-size", size)
    assert "gone.png" in complaint(1, tmp_path / "gone.png", "-o", new)
    assert not new.exists()
    assert "--resume" in complaint(1, tmp_path, "-o", tmp_path / "old.jsonl")
    assert "none/out" in complaint(1, tmp_path, "-o", tmp_path / "none" / "out.jsonl")
    assert "/none" in complaint(1, tmp_path, "-o", new, "--workers", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folders(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_pictures(tmp_path / "in", 1)
    folder.chmod(0o500)
    for words in (["-o", str(folder / "o.jsonl")], ["-o", str(tmp_path / "o.jsonl"), "--sidecar"]):
        assert run(["caption", str(folder), *words, "--model", "/none"]) == 1
        assert len(capfd.readouterr().err.splitlines()) == 1
    folder.chmod(0o700)


def test_only_errors_are_an_error(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_text("no picture")
    words = ["caption", str(tmp_path), "-o", str(tmp_path / "o.jsonl"), "--model", str(tiny_llava)]
    assert run([*words, "--draft-model", "none", "--no-verbose"]) == 1
    assert capfd.readouterr().err == ""
    assert "none" in json.loads((tmp_path / "o.jsonl").read_text())["error"]


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path) -> None:
    photos, output = make_pictures(tmp_path / "in", 1), tmp_path / "out.jsonl"
    examples = Path(__file__).parents[2] / "examples"
    for name, *words in (
        ("caption_folder.py", photos, output),
        ("caption_memory.py", "--count", 3, "--max-tokens", 2),
    ):
        line = [sys.executable, str(examples / name), *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) in (1, 3)
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["text"]
