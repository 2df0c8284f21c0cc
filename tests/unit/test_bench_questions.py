"""Data sets become questions, and what cannot be asked is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clip_files import noise, write_frames
from flash_mlx.bench import Question, first_prompt, read_questions, run
from flash_mlx.bench.answers import Settings
from flash_mlx.targets import LoadedTarget
from flash_mlx.video import Video
from tiny import random_image

PROMPTS = ("Describe it.", "What is this?")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(3):
        random_image(40, 50, seed=i).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def rows(folder: Path, *content: Any, name: str = "data.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in content]
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def test_a_folder_asks_each_picture_a_prompt(folder: Path) -> None:
    found = read_questions(str(folder / "images"), PROMPTS, 2)
    assert [(q.name, q.turns) for q in found] == [
        ("0.png", ("Describe it.",)),
        ("1.png", ("What is this?",)),
    ]
    assert found[1].images == (folder / "images" / "1.png",)


def test_the_bundled_scenes_are_held_out_pictures() -> None:
    found = read_questions("scenes", PROMPTS, 40)
    assert len(found) == 4
    assert all(Path(q.images[0]).is_file() and "demo" in Path(q.images[0]).parts for q in found)


def test_rows_of_the_known_formats(folder: Path) -> None:
    mmspec = {
        "id": "m_1",
        "image": "0.png",
        "turns": ["One?", "Two?"],
        "category": "c",
        "topic": "t",
    }
    llava = {"question_id": 7, "image": "images/1.png", "text": "What?", "category": "conv"}
    spec = {"question_id": 81, "category": "writing", "turns": ["Write."]}
    bare = {"path": "2.png"}
    found = read_questions(rows(folder, mmspec, "", llava, spec, bare), PROMPTS, 40)
    assert [q.name for q in found] == ["m_1", "7", "81", "row 5"]
    assert found[0].turns == ("One?", "Two?")
    assert [q.topic for q in found] == ["t", "conv", "writing", ""]
    assert found[0].images == (folder / "images" / "0.png",)
    assert found[1].images == (folder / "images" / "1.png",)
    assert found[2].images == ()
    assert found[3].turns == ("Describe it.",)
    assert not any(q.error for q in found)
    listed = folder / "list.json"
    listed.write_text(json.dumps([mmspec, llava]))
    assert [q.name for q in read_questions(str(listed), PROMPTS, 1)] == ["m_1"]
    apart = rows(folder.joinpath("images"), {"image": "images/2.png", "text": "?"})
    elsewhere = read_questions(apart, PROMPTS, 9, folder)
    assert elsewhere[0].images == (folder / "images" / "2.png",)


def test_videos_are_asked_about(llava: LoadedTarget, folder: Path) -> None:
    clip = write_frames(folder / "z.mp4", noise(3, (56, 42)), fps=1)
    last = read_questions(str(folder), PROMPTS, 9)[-1]
    assert (last.name, last.images) == ("z.mp4", (Video(clip),))
    row = {"id": 1, "image": "0.png", "video": "z.mp4"}
    (found,) = read_questions(rows(folder, row), PROMPTS, 9, folder, fps=0.5, max_frames=2)
    assert found.images == (folder / "0.png", Video(clip, 0.5, 2))
    (found,) = read_questions(rows(folder, row), PROMPTS, 9, folder)
    assert found.images == (folder / "0.png", Video(clip))
    prompt = replace(found, images=found.images[1:]).prompt(llava, ())
    assert (len(prompt.image_spans), prompt.videos) == (3, ((0, 3),))


def test_lines_of_text_are_questions_without_pictures(folder: Path) -> None:
    (folder / "a.txt").write_text("One?\n\nTwo?\n")
    found = read_questions(str(folder / "a.txt"), PROMPTS, 9)
    assert [(q.name, q.turns, q.images) for q in found] == [
        ("line 1", ("One?",), ()),
        ("line 3", ("Two?",), ()),
    ]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("{broken", "A row must be a question"),
        ([1], "must be a JSON object; it is a list"),
        ({"image": "0.png", "turns": []}, "its text must stand in"),
        ({"image": "0.png", "turns": "   "}, "its text must stand in"),
        ({"image": "0.png", "turns": [1]}, "its text must stand in"),
        ({"id": 1}, "its text must stand in"),
        ({"image": 5, "text": "?"}, "its picture must be a file's name; got 5"),
        ({"image": ["", "a"], "text": "?"}, "its picture must be a file's name"),
        ({"image": "a\0b", "text": "?"}, "its picture must be a file's name"),
        ({"video": {"a": 1}, "text": "?"}, "its video must be a file's name"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(row: Any, part: str, folder: Path) -> None:
    (found,) = read_questions(rows(folder, row), PROMPTS, 9)
    assert found.error is not None
    assert part in found.error


def test_what_holds_no_question_is_refused(folder: Path) -> None:
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="something to ask"):
        read_questions(str(empty), PROMPTS, 9)
    with pytest.raises(ValueError, match="something to ask"):
        read_questions(rows(folder, ""), PROMPTS, 9)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_questions(str(folder / "no.jsonl"), PROMPTS, 9)
    (folder / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"got .*a\.csv"):
        read_questions(str(folder / "a.csv"), PROMPTS, 9)
    for text in ("{}", "[", "5"):
        (folder / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json must"):
            read_questions(str(folder / "a.json"), PROMPTS, 9)


def test_bad_questions_are_skipped_and_the_others_stand(llava: LoadedTarget, folder: Path) -> None:
    (folder / "images" / "1.png").write_bytes(b"no picture")
    data = rows(
        folder,
        "{",
        {"id": "gone", "image": "gone.png", "turns": ["?"]},
        {"id": "damaged", "image": "1.png", "turns": ["?", "again?"]},
        {"id": "long", "turns": ["a " * 20_000]},
        {"id": "good", "image": "0.png", "turns": ["a", "b"]},
        {"id": "text", "turns": ["a"]},
    )
    questions = read_questions(data, PROMPTS, 9)
    skipped: dict[str, str] = {}
    steps: list[int] = []
    found = run(
        llava, {}, questions, Settings(max_tokens=3), progress=steps.append, skip=skipped.update
    )
    assert list(skipped) == ["row 1", "gone", "damaged", "long"]
    assert "gone.png does not exist" in skipped["gone"]
    assert "damaged" in skipped["damaged"] or "picture" in skipped["damaged"]
    assert "context" in skipped["long"]
    assert [each["name"] for each in found[0]["asked"]["prompts"]] == [
        "good",
        "good, turn 2",
        "text",
    ]
    assert found[0]["asked"]["text_only"] == 1
    assert found[0]["samples"] == 3
    assert sum(steps) == 1 + sum(len(question.turns) for question in questions)
    with pytest.raises(ValueError, match=r"none of 4 is\. The first, row 1:"):
        first_prompt(llava, questions[:4])
    with pytest.raises(ValueError, match="one that can be asked"):
        run(llava, {}, questions[:4], Settings())


def test_a_later_turn_follows_the_answer_to_the_earlier_one(llava: LoadedTarget) -> None:
    question = Question("q", ("a", "b"), (random_image(40, 40),))
    first, second = question.prompt(llava, ()), question.prompt(llava, ("c",))
    tokenizer = llava.processor.tokenizer
    said = tokenizer(["c"], add_special_tokens=False)["input_ids"][0]
    assert len(second) > len(first)
    assert len(second.image_spans) == len(first.image_spans) == 1
    rest = second.tokens[len(first) - 1 :]
    assert any(list(rest[i : i + len(said)]) == list(said) for i in range(len(rest)))
