"""Which questions a folder or a data set holds, and what of it is left out."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.train.answers import PromptMaker
from flash_mlx.train.prompts import INSTRUCTIONS, VIDEO_INSTRUCTIONS
from flash_mlx.train.source import find_questions
from flash_mlx.train.validate import hold_out
from tiny import random_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(("b.png", "deep/a.JPG", ".hidden.png", "notes.txt")):
        random_image(40, 40, number).save(tmp_path / name, "PNG")
    return tmp_path


def test_a_folder_is_asked_one_thing_about_each_picture(folder: Path) -> None:
    found = find_questions(str(folder))
    assert [one.images for one in found.questions] == [
        (folder / "b.png",),
        (folder / "deep/a.JPG",),
    ]
    assert all(one.text in INSTRUCTIONS for one in found.questions)
    assert find_questions(str(folder)) == found
    drawn = [find_questions(str(folder), seed=seed).questions[0].text for seed in range(8)]
    assert len(set(drawn)) > 1
    two = find_questions(str(folder), prompts=("One?", "Two?", "Three?"), prompts_per_image=2)
    assert len(two.questions) == len(set(two.questions)) == 4
    assert [one.images for one in find_questions(str(folder / "*.png")).questions] == [
        (folder / "b.png",)
    ]
    assert len(find_questions(str(folder), limit=1).questions) == 1


def write(folder: Path, *rows: object) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_limit_draws_at_random(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.png").touch()

    def names(seed: int) -> list[str]:
        found = find_questions(str(tmp_path), limit=5, seed=seed)
        return [question.images[0].name for question in found.questions]

    drawn = [names(seed) for seed in range(4)]
    assert drawn[0] == names(0)
    assert all(len(set(each)) == 5 for each in drawn)
    assert len(set(map(tuple, drawn))) == 4


def test_both_forms_of_rows_ask_the_same(folder: Path) -> None:
    llava = {
        "image": "b.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "And then?"},
            {"from": "gpt", "value": "A dog."},
        ],
    }
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = {
        "images": ["b.png"],
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        ],
    }
    found = find_questions(write(folder, llava, messages))
    asked = [(one.images, one.text, one.answer) for one in found.questions]
    picture = (folder / "b.png",)
    assert asked == 2 * [(picture, "What?", "A cat."), (picture, "And then?", "A dog.")]
    whole = folder / "rows.json"
    whole.write_text(json.dumps([llava, messages]))
    again = find_questions(str(whole), image_folder=folder)
    assert [one.text for one in again.questions] == [one.text for one in found.questions]


TURNS = [{"from": "human", "value": "What?"}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("text", "must be an object"),
        ({"conversations": TURNS}, "names no picture"),
        ({"image": "none.png", "conversations": TURNS}, "none.png does not exist"),
        ({"image": "http://a.b/c.png", "conversations": TURNS}, "would have to be fetched"),
        ({"image": 3, "conversations": TURNS}, "must be the name of a file"),
        ({"image": "b.png"}, "neither conversations nor messages"),
        ({"image": "b.png", "conversations": [3]}, "a turn must be an object"),
        ({"image": "b.png", "conversations": [{"from": "cat", "value": "?"}]}, "known speaker"),
        ({"image": "b.png", "conversations": [{"from": "gpt", "value": "A."}]}, "asks nothing"),
    ],
)
def test_rows_that_cannot_be_used_are_listed(folder: Path, row: object, says: str) -> None:
    good = {"image": "b.png", "conversations": TURNS}
    found = find_questions(write(folder, good, row, good))
    assert len(found.questions) == 2
    [(source, reason)] = found.skipped
    assert source == "rows.jsonl:2"
    assert says in reason


def test_what_is_no_data_set_is_an_error(folder: Path) -> None:
    (folder / "a.json").write_text("{}")
    (folder / "b.json").write_text("[")
    (folder / "c.jsonl").write_text("")
    for name, says in (("a", "must hold a list"), ("b", "must be valid JSON")):
        with pytest.raises(ValueError, match=says):
            find_questions(str(folder / f"{name}.json"))
    with pytest.raises(ValueError, match="it is empty"):
        find_questions(str(folder / "c.jsonl"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_questions(str(folder / "none"))


def test_pictures_are_read_when_they_are_needed(folder: Path, loaded) -> None:
    found = find_questions(str(folder), prompts=("What?",))
    asked = PromptMaker(loaded, "hash").ask_all(found)
    for one in asked:
        pixels = np.array(one.prompt.inputs["pixel_values"])
        again = PromptMaker(loaded, "hash").ask_all(found)[asked.index(one)]
        assert np.array_equal(pixels, np.array(again.prompt.inputs["pixel_values"]))
        assert one.digest == again.digest
    assert len({one.digest for one in asked}) == 2
    assert PromptMaker(loaded, "other").ask_all(found)[0].digest != asked[0].digest


def test_videos_are_a_few_frames(tmp_path: Path, llava) -> None:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(
        str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48)
    )
    for level in range(20):
        writer.write(np.full((48, 64, 3), 10 * level, dtype=np.uint8))
    writer.release()
    found = find_questions(str(tmp_path))
    assert found.questions[0].text in VIDEO_INSTRUCTIONS
    [asked] = PromptMaker(llava, "").ask_all(found)
    assert len(asked.prompt.image_spans) == 2
    assert asked.prompt.inputs["pixel_values"].dtype == mx.float32


def test_a_group_is_on_one_side() -> None:
    items = [(picture, question) for picture in range(30) for question in range(3)]
    kept, held = hold_out(items, lambda item: item[0], 16, 0)
    assert len({item[0] for item in held}) == 3
    assert {item[0] for item in held}.isdisjoint({item[0] for item in kept})
    assert sorted(kept + held) == items
    assert len({item[0] for item in hold_out(items, lambda item: item[0], 2, 0)[1]}) == 2
    assert hold_out(items[:3], lambda item: item[0], 16, 0) == (items[:3], [])
