"""`flash-mlx chat` as a user runs it."""

import json
import os
import signal
from pathlib import Path

import pytest

from commands import command, start
from tiny import random_image


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise of one.png"
    random_image(seed=1).save(path)
    return path


def answers(out: bytes) -> list[dict]:
    return [json.loads(line) for line in out.decode().splitlines()]


def test_turns_resets_and_pictures(tiny_qwen: Path, picture: Path) -> None:
    lines = f"What is it?\n\nAnd?\n/reset\nWhat is it?\n/image {picture}\nNow?\n/quit\nno\n"
    words = ["--model", tiny_qwen, "--image", picture, "--max-tokens", 8, "--temperature", 0]
    code, out, err = command("chat", *words, "--json", stdin=lines.encode())
    assert code == 0, err
    one, more, again, two = answers(out)
    assert one["kept_tokens"] == 0
    assert one["visual_tokens"] <= more["kept_tokens"] < more["prompt_tokens"]
    assert again["token_ids"] == one["token_ids"]
    assert again["kept_tokens"] == one["prompt_tokens"] - 1
    assert two["visual_tokens"] == 2 * one["visual_tokens"]
    assert two["kept_tokens"] > one["visual_tokens"]
    # The same turns in plain text.
    code, out, err = command("chat", *words, stdin=b"What is it?\nAnd?\n")
    assert (code, out.decode()) == (0, f"{one['text']}\n{more['text']}\n"), err


def test_a_bad_line_does_not_end_the_chat(tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    lines = f"/image {tmp_path / 'no.png'}\n/image {tmp_path}/empty.png\n/image\n<image>\nHi\n"
    words = ["--model", tiny_llava, "--max-tokens", 3, "--cache-gb", 0]
    code, out, err = command("chat", *words, "--json", stdin=lines.encode())
    assert code == 1
    assert len(answers(out)) == 1
    errors = [line for line in err.splitlines() if line.startswith("flash-mlx: error: ")]
    for error, said in zip(
        errors, ("does not exist", "is empty", "stands alone", "must not contain"), strict=True
    ):
        assert said in error
    assert "Traceback" not in err
    code, out, err = command("chat", *words, stdin=b"Hi\n\xff\xfe\n")
    assert code == 1
    assert err.splitlines()[-1].startswith("flash-mlx: error: Lines on stdin must be UTF-8")
    code, out, err = command("chat", *words[:-1], -1)
    assert (code, out) == (2, b"")
    assert "--cache-gb must be between 0 and" in err


def test_ctrl_c_ends_an_answer_and_the_next_one_the_program(tiny_llava: Path) -> None:
    words = ("chat", "--model", tiny_llava, "--max-tokens", 2000, "--temperature", 1, "--top-p", 1)
    process = start(*words)
    assert process.stdin is not None
    assert process.stdout is not None
    for _ in range(2):
        process.stdin.write(b"Go on and on.\n")
        process.stdin.flush()
        assert os.read(process.stdout.fileno(), 1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        rest = b""
        while not rest.endswith(b"\n"):
            rest += os.read(process.stdout.fileno(), 1000)
    assert process.wait(timeout=60) == 130
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
