"""The file of answers loses nothing, of its own or of others."""

import fcntl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from commands import fill_disk
from flash_mlx.train.answers import AnswerFile


@pytest.mark.parametrize("content", [b'[{"image": "a.png"}]', b"notes\nmore", b'{"id": 1}\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "llava.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="something else"):
        AnswerFile(file, 10)
    assert file.read_bytes() == content


def test_an_answer_that_was_cut_off_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    AnswerFile(file, 10).add("a", {}, (1, 2))
    whole = file.read_bytes()
    for end in range(1, len(whole)):
        file.write_bytes(whole + whole[:end])
        assert AnswerFile(file, 10).get("a") == (1, 2)
        assert file.read_bytes() == whole


def test_a_line_that_another_run_is_writing_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    AnswerFile(file, 10).add("a", {}, (1, 2))
    line = b'{"key": "b", "tokens": [3]}\n'
    with ThreadPoolExecutor() as pool:
        with file.open("ab", buffering=0) as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            other.write(line[:9])
            opened = pool.submit(AnswerFile, file, 10)
            time.sleep(0.1)
            other.write(line[9:])
        answers = opened.result()
    assert [answers.get(key) for key in "ab"] == [(1, 2), (3,)]
    assert file.read_bytes().endswith(line)


def test_a_line_that_a_killed_run_left_half_takes_no_other_with_it(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    answers = AnswerFile(file, 10)
    answers.add("a", {}, (1, 2))
    with file.open("ab") as other:
        other.write(b'{"key": "b", "tok')
    answers.add("c", {}, (4,))
    again = AnswerFile(file, 10)
    assert [again.get(key) for key in "abc"] == [(1, 2), None, (4,)]


def test_an_answer_without_room_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.jsonl"
    answers = AnswerFile(file, 10)
    answers.add("a", {}, (1, 2))
    whole = file.read_bytes()
    fill_disk(monkeypatch, 7)
    with pytest.raises(OSError, match="No space"):
        answers.add("b", {}, (3,))
    assert file.read_bytes() == whole
    monkeypatch.undo()
    answers.add("c", {}, (4,))
    again = AnswerFile(file, 10)
    assert [again.get(key) for key in "abc"] == [(1, 2), None, (4,)]


@pytest.mark.parametrize("tokens", ["[10]", "[-1]", "[1.0]", "[true]", "[Infinity]", "[" * 100000])
def test_an_answer_with_ids_of_no_token_is_missing(tokens: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"key": "a", "tokens": [0, 9]}\n{"key": "b", "tokens": ' + tokens + "}\n")
    answers = AnswerFile(file, 10)
    assert answers.get("a") == (0, 9)
    assert answers.get("b") is None
