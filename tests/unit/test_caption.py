"""Captions of many pictures: each is what `generate` says, and no file stops the others."""

import hashlib
import json
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flash_mlx
from commands import make_drafter
from flash_mlx import throughput
from flash_mlx.caption import Caption, Job, caption, describe
from flash_mlx.cost import Costs
from flash_mlx.draft.calibrate import Calibrator
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
    job = Job([photos], output=output, resume=True)
    assert (len(job.todo), job.num_done, job.num_failed) == (0, 4, 1)
    job.close()
    job = Job([photos / "0.png"], output=output, resume=True)  # rows of other pictures are not its
    assert (len(job.todo), job.num_done, job.num_failed) == (0, 1, 0)
    job.close()
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


def by_path(captions: Iterator[Caption]) -> dict[str, Caption]:
    return {each.path: each for each in captions}


@pytest.mark.parametrize("batch_size", [2, 5])
def test_texts_decoded_together_are_those_decoded_alone(
    model: Model, photos: Path, tmp_path: Path, batch_size: int
) -> None:
    for number in range(4, 9):
        random_image(40 + 9 * number, 50, seed=number).save(photos / f"{number}.png")
    (photos / "5.png").write_text("no picture")
    settings: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0}
    output = tmp_path / "out.jsonl"
    alone = by_path(caption(model, photos, batch_size=1, **settings))
    got = by_path(caption(model, photos, output=output, batch_size=batch_size, **settings))
    assert list(got) == list(alone) == list(map(str, sorted(photos.iterdir())))
    for path, each in got.items():
        assert (each.text, each.error, each.sha256) == (
            alone[path].text, alone[path].error, alone[path].sha256
        )  # fmt: skip
    assert {row["path"]: row.get("text") for row in rows_of(output)} == {
        path: each.text for path, each in alone.items()
    }
    # Killed in the midst, a batch loses what is under way and no more.
    part = tmp_path / "part.jsonl"
    some = caption(model, photos, output=part, batch_size=batch_size, **settings)
    done = {next(some).path for _ in range(3)}
    some.close()  # type: ignore[attr-defined]
    assert [row["path"] for row in rows_of(part)] == list(alone)[:3]
    rest = caption(model, photos, output=part, resume=True, batch_size=batch_size, **settings)
    assert {each.path for each in rest} == alone.keys() - done
    assert len(rows_of(part)) == 9


def test_a_sampled_text_is_its_pictures_own(
    tiny_llava: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the seed and the picture, whatever the batch, the order and what drafts cost there."""
    free, dear = ((1, 1.0), (16, 1.0)), ((1, 1.0), (2, 9.0))

    def costs(self: Calibrator, _num_rows: int, *, greedy: bool) -> Costs:
        rounds = free if len(self.more) == 0 else dear
        return Costs(1.0, rounds, ((1, 0.01), (3, 0.02)))

    monkeypatch.setattr(throughput.BatchCalibrator, "costs", costs)
    monkeypatch.setattr(Calibrator, "costs", costs)
    model = load(tiny_llava, make_drafter(tmp_path / "drafter"))
    for number in range(4, 8):
        random_image(40, 50, seed=number).save(photos / f"{number}.png")
    (photos / "again.png").hardlink_to(photos / "3.png")

    def said(files: list[Path], seed: int, **batches: Any) -> dict[str, Caption]:
        how: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0, "seed": seed, **batches}
        return by_path(caption(model, files, **how))

    files = sorted(photos.iterdir())
    alone = said(files, 1, batch_size=1)
    texts = {path: each.text for path, each in alone.items()}
    assert max(each.mean_acceptance_length for each in alone.values()) > 1  # drafts are accepted
    for order, batches in (
        (files, {"batch_size": 5}),
        (files[::-1], {"batch_size": 2}),
        (files[4:], {}),
    ):
        for path, each in said(order, 1, **batches).items():
            assert each.text == texts[path]
    assert texts[str(photos / "again.png")] == texts[str(photos / "3.png")]
    assert len(set(texts.values())) == len(texts) - 1
    others = said(files, 2, batch_size=1)
    assert all(others[path].text != text for path, text in texts.items())


def test_each_picture_draws_numbers_of_its_own(model: Model, photos: Path) -> None:
    """Texts of pictures that look alike to the model do not all take the same turn."""
    ready = describe._Ready(describe.Item("a.png", None, "What?"), "0" * 64, None)
    other = describe._Ready(describe.Item("b.png", None, "What?"), "1" * 64, None)
    moved = describe._Ready(describe.Item("c.png", None, "What?"), "0" * 64, None)
    asked = describe._Ready(describe.Item("a.png", None, "Why?"), "0" * 64, None)
    seeds = [each.seed(number) for each in (ready, other, asked) for number in (0, 1)]
    assert len(set(seeds)) == 6
    assert moved.seed(1) == ready.seed(1)
    assert all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(ValueError, match="seed"):
        list(caption(model, photos, seed=-1))


def test_a_text_that_fails_among_others_is_tried_alone(
    model: Model, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_words: Any) -> Any:
        raise RuntimeError("[metal::malloc] too large")

    expected = {each.path: each.text for each in caption(model, photos, batch_size=1, **SETTINGS)}
    monkeypatch.setattr(type(model.loaded.target), "verify_together", too_large)
    monkeypatch.setattr(throughput, "check_joined", lambda _: True)
    got = {each.path: each.text for each in caption(model, photos, batch_size=3, **SETTINGS)}
    assert got == expected


def test_the_next_pictures_are_prepared_while_one_is_described(
    model: Model, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen, in_time = Path.read_bytes, [], []
    ready, said = threading.Event(), threading.Event()

    def note(path: Path) -> bytes:
        seen.append(path.name)
        if path.name == "1.png":
            ready.set()
            in_time.append(said.wait(20))  # the first text does not wait for the second picture
        return read(path)

    def wait(_tokens: Any, logits: Any) -> Any:  # in the midst of the first text
        assert ready.wait(20)
        return logits

    monkeypatch.setattr(Path, "read_bytes", note)
    captions = caption(model, photos, logits_processors=[wait], batch_size=1, **SETTINGS)
    assert next(captions).error is None
    assert seen[:2] == ["0.png", "1.png"]
    said.set()
    assert next(captions).error is None
    assert in_time == [True]
    captions.close()  # type: ignore[attr-defined]


def test_the_batch_size_follows_measured_costs(
    model: Model, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def costs_of(shares: dict[int, float]) -> None:
        """Let a round over a row take each of so many texts this share of a round alone."""

        def costs(self: Any, _num_rows: int, *, greedy: bool) -> Costs:
            share = shares[int(self.more.get("texts", 1))]
            return Costs(share, ((1, share), (16, 2 * share)))

        monkeypatch.setattr(throughput.BatchCalibrator, "costs", costs)
        monkeypatch.setattr(Calibrator, "costs", costs)

    def best(most: int) -> throughput.Together:
        return throughput.best_together(model, 90, most, greedy=True)

    costs_of({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.39, 16: 0.1})
    found = best(16)
    assert found.size == 4  # 8 bring too little, and what is beyond is not tried
    assert "1: 1.00, 2: 1.67, 4: 2.50, 8: 2.56" in found.reason
    assert best(3).size == 2
    assert best(1).size == 1
    costs_of({1: 1.0, 2: 1.2, 4: 0.1, 8: 0.1, 16: 0.1})
    assert best(16).size == 1
    assert best(16).batch() is None
    assert [each.path for each in caption(model, photos, max_tokens=2)]


def test_measured_costs_are_real_and_stored(model: Model) -> None:
    calibrator = throughput._batch_calibrator(model, 3)
    costs = calibrator.costs(64, greedy=True)
    assert costs.rounds[0][0] == 1
    assert 0 < costs.plain <= costs.rounds[0][1]
    assert calibrator.costs(64, greedy=True) is costs


def test_a_batch_of_nothing_is_refused(model: Model, photos: Path) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        list(caption(model, photos, batch_size=0))


def test_an_output_that_is_an_input_is_refused(model: Model, photos: Path, tmp_path: Path) -> None:
    listing, other = tmp_path / "list.jsonl", tmp_path / "other.jsonl"
    listing.write_text(f'{{"path": "{photos / "0.png"}"}}\n')
    other.symlink_to(listing)
    before = listing.read_bytes()
    for output in (listing, other):
        with pytest.raises(ValueError, match="both"):
            caption(model, listing, output=output, resume=True)
    assert listing.read_bytes() == before


def test_a_row_that_names_a_folder_is_an_error_of_its_own(
    model: Model, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    Path("list.jsonl").write_text("".join(f'{{"path": "{p}"}}\n' for p in (".", "..", "0.png")))
    got = by_path(caption(model, "list.jsonl", sidecar=True, **SETTINGS))
    assert [bool(got[path].error) for path in (".", "..", "0.png")] == [True, True, False]
    assert [file.name for file in photos.parent.rglob("*.txt")] == ["0.txt"]
