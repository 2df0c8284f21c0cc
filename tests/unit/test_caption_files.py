"""What is to be captioned, and the file of rows: nothing lost, doubled or torn."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from commands import fill_disk
from flash_mlx.caption.listing import Item, find_items
from flash_mlx.caption.rows import RowFile
from tiny import random_image


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def named(items: list[Item], folder: Path) -> list[str]:
    return [os.path.relpath(item.path, folder) for item in items]


def test_folders_globs_and_files_bring_their_pictures_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.JPG", "notes.txt", "sub/c.webp", ".hidden/d.png", "._a.JPG", "odd")
    everything = ["a.JPG", "b.png", "sub/c.webp"]
    assert named(find_items([tmp_path], "?"), tmp_path) == everything
    assert named(find_items([f"{tmp_path}/**/*"], "?"), tmp_path) == everything
    assert named(find_items([f"{tmp_path}/*.png"], "?"), tmp_path) == ["b.png"]
    found = find_items(
        [tmp_path / "odd", f"{tmp_path}/b.png", tmp_path, tmp_path / "gone.png"], "?"
    )
    assert named(found, tmp_path) == ["odd", "b.png", "a.JPG", "sub/c.webp", "gone.png"]
    touch(tmp_path, "[1].png")
    assert named(find_items([tmp_path / "[1].png"], "?"), tmp_path) == ["[1].png"]


def test_without_a_prompt_each_is_asked_about_what_it_is(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.MP4")
    (tmp_path / "list.jsonl").write_text('{"path": "b.MP4"}\n{"path": "a.png", "prompt": "Why?"}')
    found = find_items([tmp_path, tmp_path / "list.jsonl"])
    picture, video = "Describe this image in detail.", "Describe this video in detail."
    assert [item.prompt for item in found] == [picture, video, video, "Why?"]


def test_nothing_to_caption_is_an_error(tmp_path: Path) -> None:
    for nothing in (tmp_path, f"{tmp_path}/*.png"):
        with pytest.raises(ValueError, match="must be pictures"):
            find_items([nothing], "?")
    with pytest.raises(FileNotFoundError, match="gone"):
        find_items([tmp_path / "gone.png", tmp_path / "gone.jpg"], "?")
    with pytest.raises(FileNotFoundError, match="gone"):
        find_items([tmp_path / "gone.jsonl"], "?")


def test_a_list_names_pictures_prompts_and_fields(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png")
    rows = [
        {"path": "a.png"},
        {"image": "a.png", "prompt": "Why {so}?"},
        {"file_name": "a.png", "style": "drawn", "year": 1999},
        {"path": str(tmp_path / "in/a.png"), "style": "x"},
    ]
    listing = tmp_path / "in" / "list.jsonl"
    listing.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, rows)).encode())
    items = find_items([listing], 'Say {name} as {"a": 1}')
    filled = 'Say a as {"a": 1}'
    assert [item.prompt for item in items] == [filled, "Why {so}?", filled]
    assert all(item.file == tmp_path / "in/a.png" for item in items)
    items = find_items([listing], "{style}, {year}")
    assert [item.prompt for item in items if item.error is None] == ["Why {so}?", "drawn, 1999"]
    assert [item.path for item in items if item.error] == [f"{listing}:1", f"{listing}:7"]
    with pytest.raises(ValueError, match=r"\{style\} is none \(there are: path, name, folder\)"):
        find_items([tmp_path / "in"], "A {style} picture")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b"{", "Expecting"),
        (b"[1]", "list"),
        (b'{"prompt": "x"}', "None"),
        (b'{"path": 3}', "3"),
        (b'{"path": ""}', "''"),
        (b'{"path": "a\\u0000b"}', "file"),
        (b'{"path": "a.png", "prompt": 3}', "text"),
        (b'{"path": "a\xff.png"}', "utf-8"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_bad_row_is_an_item_with_an_error(tmp_path: Path, line: bytes, part: str) -> None:
    random_image().save(tmp_path / "a.png")
    listing = tmp_path / "list.jsonl"
    listing.write_bytes(line + b'\n{"path": "a.png"}\n')
    bad, good = find_items([listing], "?")
    assert good == Item("a.png", tmp_path / "a.png", "?")
    assert (bad.path, bad.file) == (f"{listing}:1", None)
    assert part in bad.error


def rows_in(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def test_rows_survive_a_kill_at_any_moment(tmp_path: Path) -> None:
    file, rng = tmp_path / "out.jsonl", random.Random(0)
    seen: list[dict[str, object]] = []
    for _ in range(25):
        start = len(seen)
        child = os.fork()
        if child == 0:
            rows = RowFile(file, resume=True)
            for number in range(start, start + 100_000):
                rows.append({"path": str(number), "text": "x" * (number * 37 % 9000)})
            os._exit(0)
        time.sleep(rng.uniform(0.001, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        RowFile(file, resume=True).close()
        found = rows_in(file)
        assert found[:start] == seen
        seen = found
    assert len(seen) > 100
    assert [row["path"] for row in seen] == [str(number) for number in range(len(seen))]


def test_an_unfinished_row_is_cut_off_wherever_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    rows = RowFile(file)
    for name in ("a", "b\udcff", "ü\u2028"):
        rows.append({"path": name, "text": name})
    rows.close()
    content = file.read_bytes()
    assert content.isascii()
    assert len(content.splitlines()) == len(content.decode().splitlines()) == 3
    starts = [0, *(i + 1 for i, byte in enumerate(content) if byte == ord("\n"))]
    for end in range(len(content)):
        file.write_bytes(content[:end])
        rows = RowFile(file, resume=True)
        whole = sum(start <= end for start in starts[1:]) + (end + 1 in starts and end > 0)
        assert len(list(rows)) == len(rows_in(file)) == whole
        rows.append({"path": "next"})
        assert rows_in(file)[-1] == {"path": "next"}
        rows.close()


def test_a_file_of_anything_else_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    for content in (
        b"precious",
        b'{"path": 3}\n',
        b'{"path": "a"}\nnotes\n',
        b'{"a": 1}\n',
        b"\0\0",
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="rows of captions"):
            RowFile(file, resume=True)
        with pytest.raises(FileExistsError, match="--resume"):
            RowFile(file)
        assert file.read_bytes() == content
    with pytest.raises(OSError, match="is none"):
        RowFile(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        RowFile(tmp_path / "none" / "out.jsonl")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "out.jsonl")
    rows.append({"path": "a"})
    rows.append({"path": "b"})
    with pytest.raises(OSError, match="another does"):
        RowFile(tmp_path / "out.jsonl", resume=True)
    rows.keep(lambda row: row["path"] != "a")
    with pytest.raises(OSError, match="another does"):
        RowFile(tmp_path / "out.jsonl", resume=True)
    rows.append({"path": "c"})
    rows.close()
    rows = RowFile(tmp_path / "out.jsonl", resume=True)
    assert [row["path"] for row in rows] == ["b", "c"]


def test_a_row_without_room_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = RowFile(tmp_path / "out.jsonl")
    rows.append({"path": "a"})
    fill_disk(monkeypatch, 7)
    with pytest.raises(OSError, match="No space"):
        rows.append({"path": "b"})
    monkeypatch.undo()
    rows.append({"path": "c"})
    assert [row["path"] for row in rows_in(tmp_path / "out.jsonl")] == ["a", "c"]
