"""A log of use is checked line by line: nothing in it may stop or crash a run."""

import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flash_mlx.cli import run
from flash_mlx.prompt import Prompt
from flash_mlx.train.answers import Asked
from flash_mlx.train.source import Found
from flash_mlx.train.traffic import EDGE, TRAFFIC, TrafficLog, identify, read_traffic

VOCABULARY = 10
PICTURES = Prompt((1, 2, 2, 3), ((1, 3),), {"pixel_values": mx.arange(4)})


def read(folder: Path) -> tuple[list[tuple[Asked, tuple[int, ...]]], Found]:
    found = Found()
    return read_traffic(folder, "x", found, VOCABULARY), found


def append(folder: Path, **changes: Any) -> None:
    """Add the first line again, changed."""
    log = folder / TRAFFIC
    row = json.loads(log.read_text().splitlines()[0]) | changes
    with log.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    log = TrafficLog(tmp_path, 1 << 20, "x")
    log(PICTURES, (0, 9))
    log(Prompt((4, 5)), (6, 7))
    return tmp_path


def test_what_was_written_is_read(folder: Path) -> None:
    rows, found = read(folder)
    assert [(one.prompt.tokens, said) for one, said in rows] == [
        ((1, 2, 2, 3), (0, 9)),
        ((4, 5), (6, 7)),
    ]
    assert rows[0][0].prompt.inputs["pixel_values"].tolist() == [0, 1, 2, 3]
    assert not found.skipped


def test_a_target_is_told_by_both_ends_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    content = bytearray(3 * EDGE)
    seen = []
    for place in (0, len(content) - 1):
        content[place] ^= 1
        weights.write_bytes(content)
        seen.append(identify(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    assert len({*seen, identify(tmp_path)}) == 3


def test_an_answer_waits_until_no_other_process_writes(folder: Path) -> None:
    log = TrafficLog(folder, 1 << 20, "x")
    before = (folder / TRAFFIC).read_bytes()
    with (folder / TRAFFIC).open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        adding = threading.Thread(target=log, args=(Prompt((1,)), (2, 3)))
        adding.start()
        adding.join(0.3)
        assert (folder / TRAFFIC).read_bytes() == before
    adding.join(30)
    assert len((folder / TRAFFIC).read_bytes().splitlines()) == 3


@pytest.mark.parametrize("name", ["tokens", "answer"])
@pytest.mark.parametrize("wrong", [VOCABULARY, 1000000000, -1, 1.0, True, "1", None, float("inf")])
def test_ids_of_no_token_are_refused(name: str, wrong: object, folder: Path) -> None:
    append(folder, **{name: [1, 2, 2, wrong]})
    rows, found = read(folder)
    assert len(rows) == 2
    (place, reason) = found.skipped[0]
    assert place == f"{TRAFFIC}:3"
    assert reason.startswith("its ids must be from 0 to 9; got ")


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100000,
        '{"target": "x", "tokens": [Infinity], "spans": [], "videos": [], "answer": []}',
        '{"target": "x", "tokens": [1], "spans": [[Infinity, 1]], "videos": [], "answer": []}',
    ],
)
def test_lines_of_any_kind_are_left_out(line: str, folder: Path) -> None:
    with (folder / TRAFFIC).open("a") as stream:
        stream.write(line + "\n")
    rows, found = read(folder)
    assert len(rows) == 2
    assert [place for place, _ in found.skipped] == [f"{TRAFFIC}:3"]


@pytest.mark.parametrize("changes", [{"spans": []}, {"inputs": None}])
def test_pictures_and_their_places_come_together(changes: dict[str, Any], folder: Path) -> None:
    append(folder, **changes)
    rows, found = read(folder)
    assert len(rows) == 2
    assert "must have places" in found.skipped[0][1]


@pytest.mark.parametrize("video", [[0, 0], [1, 2], [-1, 1]])
def test_videos_are_made_of_pictures(video: list[int], folder: Path) -> None:
    append(folder, videos=[[0, 1]])
    append(folder, videos=[video])
    rows, found = read(folder)
    assert len(rows) == 3
    assert "its videos must be made of its pictures" in found.skipped[0][1]


@pytest.mark.parametrize("kind", ["changed", "link", "folder", "gone"])
def test_pictures_are_what_their_name_says(kind: str, folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    if kind == "changed":
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        moved = file.rename(folder / "elsewhere")
        if kind == "link":
            file.symlink_to(moved)
        elif kind == "folder":
            file.mkdir()
    rows, found = read(folder)
    assert len(rows) == 1
    assert "not what their name says" in found.skipped[0][1]


def test_a_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        append(folder)
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda *given: hashed.append(given) or digest(*given)
    )
    assert len(read(folder)[0]) == 5
    assert len(hashed) == 1


def test_only_the_owner_may_read_what_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    save = mx.save_safetensors

    def watched(file: str, arrays: dict[str, mx.array]) -> None:
        seen.append(Path(file).stat().st_mode & 0o777)
        save(file, arrays)

    monkeypatch.setattr(mx, "save_safetensors", watched)
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    before = os.umask(0)
    try:
        for folder in (tmp_path / "new", there):
            TrafficLog(folder, 1 << 20, "x")(PICTURES, (0, 9))
    finally:
        os.umask(before)
    assert seen == [0o600, 0o600]
    assert [f.stat().st_mode & 0o777 for f in (tmp_path / "new", there)] == [0o700, 0o755]
    files = [file for folder in (tmp_path / "new", there) for file in folder.iterdir()]
    assert len(files) == 4
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


@pytest.mark.parametrize("name", ["file", "file/below", "full"])
@pytest.mark.parametrize(
    "words",
    [("generate", "--prompt", "Why?"), ("caption", "a.png", "-o", "{folder}/out.jsonl"), ("chat",)],
)
def test_a_folder_that_cannot_be_written_is_named_before_the_model_is_loaded(
    name: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / TRAFFIC).mkdir(parents=True)
    line = [word.format(folder=tmp_path) for word in words]
    assert run([*line, "--model", "/no/such/model", "--learn", str(tmp_path / name)]) == 1
    said = capsys.readouterr().err
    assert "--learn must be a folder that can be written; got" in said
    assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
