"""Captions of many pictures: each is what `generate` says, and no file stops the others."""

import hashlib
import json
import resource
import threading
from pathlib import Path
from typing import Any

import pytest

import flash_mlx
from flash_mlx.caption import Caption, Job, caption, describe
from flash_mlx.generate import Model, generate, load
from tiny import random_image

SETTINGS: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}
FIGURES = {"finish_reason", "generation_tokens", "mean_acceptance_length", "seconds"}


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Model:
    return load(tiny_llava)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        random_image(seed=number).save(folder / f"{number}.png")
    return folder


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_captions_are_what_generate_says(model: Model, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    got = list(caption(model, photos, "What?", output=output, system="Be brief.", **SETTINGS))
    for each, file in zip(got, sorted(photos.iterdir()), strict=True):
        alone = generate(model, "What?", file, system="Be brief.", **SETTINGS)
        assert each.text == alone.text
        assert (each.path, each.prompt, each.error) == (str(file), "What?", None)
        assert each.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (each.generation_tokens, each.finish_reason) == (6, "length")
        assert each.mean_acceptance_length == alone.stats.mean_acceptance_length
        assert each.seconds > 0
    assert len({each.text for each in got}) > 1
    assert rows_of(output) == [each.to_row() for each in got]
    assert rows_of(output)[0].keys() == FIGURES | {"path", "prompt", "sha256", "text"}
    assert flash_mlx.caption is caption
    assert flash_mlx.Caption is Caption


def test_bad_files_become_errors_and_stop_nothing(
    model: Model, photos: Path, tmp_path: Path
) -> None:
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:300])
    (photos / "2.png").write_text("no picture")
    (photos / "empty.png").touch()
    (photos / "folder.png").mkdir()
    random_image(4, 1000).save(photos / "thin.png")
    listing = tmp_path / "list.jsonl"
    words = {"path": "photos/0.png"}
    more = [{"path": "gone.png"}, [], {**words, "prompt": "\ud800"}, {**words, "prompt": "<image>"}]
    listing.write_text("\n".join(map(json.dumps, more)))
    inputs = [photos, photos / "folder.png", photos / "gone.png", listing]
    output = tmp_path / "out.jsonl"
    got = {each.path: each for each in caption(model, inputs, output=output, **SETTINGS)}
    names = {path.replace(f"{photos}/", ""): each.error or "" for path, each in got.items()}
    assert [name for name, error in names.items() if not error] == ["0.png", "3.png"]
    for name, part in {
        "1.png": "damaged",
        "2.png": "it is none",
        "empty.png": "empty",
        "thin.png": "4 x 1000",
        "gone.png": "must be a file",
        "photos/0.png": "<image>",
        f"{listing}:2": "list",
    }.items():
        assert part in names[name]
    rows = rows_of(output)
    assert all(("text" in row) != ("error" in row) for row in rows)
    assert next(row.keys() for row in rows if "error" in row) == {
        "path",
        "prompt",
        "sha256",
        "error",
    }
    assert not any("\n" in row.get("error", "") for row in rows)


def test_an_error_while_decoding_is_that_pictures_own(
    model: Model, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(9))

    def sometimes(*words: Any, **settings: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("[metal::malloc] too large")
        return original(*words, **settings)

    original = describe.join
    monkeypatch.setattr(describe, "join", sometimes)
    got = [each.error for each in caption(model, photos, **SETTINGS)]
    assert got == [None, "RuntimeError: [metal::malloc] too large", None, None]


def test_wrong_settings_stop_the_job(model: Model, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="temperature"):
        list(caption(model, photos, output=output, temperature=-1.0))
    with pytest.raises(TypeError, match="warmth"):
        list(caption(model, photos, warmth=2))
    with pytest.raises(ValueError, match="output"):
        caption(model, photos, resume=True)
    assert output.read_bytes() == b""
    assert threading.active_count() < 10


def test_to_resume_is_to_skip_what_is_done(model: Model, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    (photos / "1.png").write_text("no picture")
    first = caption(model, photos, output=output, **SETTINGS)
    done = [next(first).path for _ in range(3)]
    first.close()
    before = output.read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        caption(model, photos, output=output)
    rest = list(caption(model, photos, output=output, resume=True, **SETTINGS))
    assert [each.path for each in rest] == [str(photos / "3.png")]
    assert output.read_bytes().startswith(before)
    assert done == [row["path"] for row in rows_of(output)][:3]
    assert list(caption(model, photos, output=output, resume=True)) == []
    # Another question about the same pictures is not done yet.
    job = Job([photos], "Why?", output=output, resume=True)
    assert (len(job.todo), job.num_done) == (4, 0)
    job.close()


def test_a_picture_that_has_changed_is_described_anew(
    model: Model, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    (photos / "1.png").write_text("no picture")
    inputs = [photos, photos / "late.png"]
    list(caption(model, inputs, output=output, **SETTINGS))
    before = {row["path"]: row for row in rows_of(output)}
    assert "error" in before[str(photos / "late.png")]
    changed = [photos / name for name in ("1.png", "2.png", "late.png")]
    for number, file in enumerate(changed):
        random_image(seed=50 + number).save(file)
    (photos / "0.png").unlink()  # what is gone since keeps its row
    again = list(caption(model, inputs, output=output, resume=True, **SETTINGS))
    assert [each.path for each in again] == list(map(str, changed))
    after = {row["path"]: row for row in rows_of(output)}
    assert len(rows_of(output)) == len(after) == 5
    for name in ("0.png", "3.png"):
        assert after[str(photos / name)] == before[str(photos / name)]
    for file in changed:
        assert after[str(file)]["text"] == generate(model, again[0].prompt, file, **SETTINGS).text


def test_the_hash_is_of_the_bytes_that_were_described(
    model: Model, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = photos / "0.png"
    old = file.read_bytes()
    expected = generate(model, "What?", file, **SETTINGS).text
    read = Path.read_bytes

    def change_afterwards(path: Path) -> bytes:
        content = read(path)
        random_image(seed=99).save(path)
        return content

    monkeypatch.setattr(Path, "read_bytes", change_afterwards)
    (got,) = caption(model, file, "What?", **SETTINGS)
    assert (got.text, got.sha256) == (expected, hashlib.sha256(old).hexdigest())


def test_sidecars_stand_beside_the_pictures(model: Model, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    (photos / "1.png").write_text("no picture")
    some = caption(model, photos, output=output, sidecar=True, **SETTINGS)
    assert next(some).text == (photos / "0.txt").read_bytes().decode()
    some.close()
    (photos / "0.txt").unlink()  # as if the process had been killed between row and sidecar
    got = list(caption(model, photos, output=output, sidecar=True, resume=True, **SETTINGS))
    texts = {file.stem: file.read_bytes().decode() for file in photos.glob("*.txt")}
    assert texts.keys() == {"0", "2", "3"}
    assert texts == {
        Path(row["path"]).stem: row["text"] for row in rows_of(output) if "text" in row
    }
    assert len(got) == 3
    random_image(seed=77).save(photos / "2.png")
    (again,) = caption(model, photos, output=output, sidecar=True, resume=True, **SETTINGS)
    assert (photos / "2.txt").read_bytes().decode() == again.text


def test_a_sidecar_never_replaces_another_text(model: Model, photos: Path, tmp_path: Path) -> None:
    (photos / "2.txt").write_text("written by hand")
    with pytest.raises(FileExistsError, match=r"2\.txt exists"):
        caption(model, photos, sidecar=True)
    (photos / "2.txt").unlink()
    random_image().save(photos / "2.jpg")
    with pytest.raises(ValueError, match=r"2\.jpg and .*2\.png would share"):
        caption(model, photos, sidecar=True, output=tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="would share"):
        caption(model, photos, sidecar=True, output=tmp_path / "out.jsonl", resume=True)


def test_a_changed_picture_does_not_give_its_notes_away(
    model: Model, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    list(caption(model, photos, output=output, **SETTINGS))
    random_image(seed=78).save(photos / "2.png")
    (photos / "2.txt").write_text("written by hand")
    with pytest.raises(FileExistsError, match=r"2\.txt exists"):
        caption(model, photos, output=output, sidecar=True, resume=True)
    assert (photos / "2.txt").read_text() == "written by hand"


def test_memory_stays_flat(model: Model, tmp_path: Path) -> None:
    random_image(600, 400).save(tmp_path / "0.bmp")  # 0.72 MB
    for number in range(1, 110):
        (tmp_path / f"{number}.bmp").hardlink_to(tmp_path / "0.bmp")
    used = []
    for _ in caption(model, tmp_path, max_tokens=2, output=tmp_path / "out.jsonl"):
        used.append(resident_bytes())
    assert used[-1] - used[30] < 15e6  # 57 MB were read meanwhile


def resident_bytes() -> float:
    """Memory of this process that is in use, or the most that was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
