"""`flash-mlx bench` with bad input, and with all of its output."""

import json
from pathlib import Path

import pytest

from clip_files import noise, write_frames
from commands import command
from flash_mlx import cli
from flash_mlx.draft.ngram import NgramDrafter
from tiny import random_image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(2):
        random_image(40, 50, seed=i).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "torn.png").write_bytes(b"\x89PNG\r\n")
    film = write_frames(tmp_path / "film.mp4", noise(5), fps=1).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(film[: len(film) // 2])
    rows = [
        {"id": "torn", "image": "torn.png", "turns": ["What?"], "topic": "t"},
        {"id": "gone", "image": "gone.png", "turns": ["What?"], "topic": "t"},
        {"id": "long", "image": "0.png", "turns": ["word " * 20_000], "topic": "t"},
        {"id": "empty", "image": "0.png"},
        {"id": "a", "image": "0.png", "turns": ["One?", "Two?"], "topic": "t"},
        {"id": "b", "image": "1.png", "turns": ["One?"], "topic": "u"},
        {"id": "c", "turns": ["No picture?"], "topic": "u"},
        {"id": "film", "video": "film.mp4"},
        {"id": "cut", "video": "cut.mp4"},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    return tmp_path


def test_bad_rows_are_skipped_by_name_and_the_rest_is_measured(
    tiny_llava: Path, data: Path
) -> None:
    words = ["bench", "--model", tiny_llava, "--data", data / "data.jsonl", "--max-tokens", 3]
    words += ["--draft-model", "ngram", "none", "--repeats", 2, "--markdown", "--replay-costs"]
    words += ["--json", data / "out.json", "--plot", data / "out.png", "--max-frames", 2]
    code, out, err = command(*words)
    assert (code, "Traceback" in err) == (0, False)
    report = json.loads((data / "out.json").read_text())
    assert list(report["skipped"]) == ["torn", "gone", "long", "cut", "row 10"]
    assert "gone.png does not exist" in report["skipped"]["gone"]
    assert "must fit in the model's context" in report["skipped"]["long"]
    assert "cut.mp4 must be a whole video" in report["skipped"]["cut"]
    asked = {each["name"]: each["images"] for each in report["asked"]["prompts"]}
    assert asked == {"empty": 1, "a": 1, "a, turn 2": 1, "b": 1, "c": 0, "film": 2}
    assert report["asked"]["text_only"] == 1
    assert {row["drafter"] for row in report["rows"]} == {"none", "ngram", "mlx-vlm"}
    for row in report["rows"]:
        assert (row["error"], row["repeats"], row["samples"]) == (None, 2, 6)
        assert row["identical"] == 1.0
    assert report["settings"]["argv"][:2] == ["bench", "--model"]
    text = out.decode()
    assert text.startswith("| drafter | T |")
    assert "- mlx_vlm.stream_generate: " in text
    assert "- Skipped torn: " in text
    assert (data / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_drafter_that_fails_within_the_run_has_a_row_that_says_so(
    tiny_llava: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[int] = []

    def failing(self: NgramDrafter, *_: object) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise KeyError("a bug")
        return draft(self, *_)

    draft = NgramDrafter.draft
    monkeypatch.setattr(NgramDrafter, "draft", failing)
    words = ["bench", "--model", tiny_llava, "--data", data / "images", "--max-tokens", 4]
    words += ["--draft-model", "ngram", "--draft-block-size", 2, "--json", data / "out.json"]
    (data / "images" / "torn.png").unlink()
    assert cli.run(list(map(str, words))) == 0
    assert "ngram at temperature 0 failed: KeyError: 'a bug'" in capsys.readouterr().out
    rows = {row["drafter"]: row for row in json.loads((data / "out.json").read_text())["rows"]}
    assert rows["ngram"]["error"] == "KeyError: 'a bug'"
    assert "speedup" not in rows["ngram"]
    assert rows["none"]["error"] is rows["mlx-vlm"]["error"] is None
    assert rows["mlx-vlm"]["samples"] == 2


def test_fixed_blocks_of_several_sizes_stand_beside_what_pays(tiny_llava: Path, data: Path) -> None:
    words: list[str | Path] = ["bench", "--model", tiny_llava, "--data", data / "images"]
    words += ["--limit", "2", "--max-tokens", "12", "--draft-model", "ngram"]
    words += ["--json", data / "out.json"]
    for more, names in (
        (["--draft-block-size", "1", "2"], ["ngram fixed 1", "ngram fixed 2"]),
        (["--draft-block-size", "2", "--drafting", "chain"], ["ngram chain", "ngram fixed 2"]),
        (["--draft-block-size", "2"], ["ngram"]),
    ):
        code, _, err = command(*words, *more)
        assert code == 0, err
        rows = {row["drafter"]: row for row in json.loads((data / "out.json").read_text())["rows"]}
        assert [name for name in rows if name.startswith("ngram")] == names
        for name in (each for each in names if each[-1].isdigit()):
            assert max(drafted for drafted, *_ in rows[name]["outcomes"]) == int(name[-1])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--data", "{data}/nothing"), "--data must be a folder, a file or `scenes`"),
        (("--data", "{data}/bad.jsonl"), "none of 2 is. The first, row 1: A row must be"),
        (("--data", "{data}/empty.jsonl"), "--data must hold something to ask"),
        (("--plot", "{data}/no/out.png"), "--plot must name a file in a folder"),
        (("--json", "{data}/data.jsonl/out.json"), "--json must name a file in a folder"),
    ],
)
def test_nothing_to_ask_and_nowhere_to_write_are_found_before_the_run(
    words: tuple[str, str], part: str, tiny_llava: Path, data: Path
) -> None:
    (data / "bad.jsonl").write_text('{"image": "gone.png"\n[]\n')
    (data / "empty.jsonl").write_text("\n")
    option, value = words
    code, out, err = command("bench", "--model", tiny_llava, option, value.format(data=data))
    assert (code, out) == (1, b"")
    assert len(err.splitlines()) == 1
    assert part in err
