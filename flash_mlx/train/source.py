r"""From pictures and data sets to questions: what the target is asked, and what others answered.

A folder or glob of pictures and videos is asked built-in questions, or the user's. A data set is
JSON (a list) or JSONL, each row in one of two forms:

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                         {"from": "gpt", "value": "A cat."}]}     LLaVA
    {"images": ["a.png"], "messages": [{"role": "user", "content": "What is this?"},
                                       {"role": "assistant", "content": "A cat."}]}     mlx-vlm

`video` and `videos` name videos, which are read as a few frames. Each question of a conversation is
asked by itself, with all of the row's pictures. A picture is a file, beside the data set, under the
image folder or at its full path, and never fetched; in Parquet files and data sets of the hub,
whose rows have the same two forms, it is in the row. What cannot be used is left out and listed.
"""

from __future__ import annotations

import glob
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash_mlx.files import read_rows
from flash_mlx.images import PICTURES
from flash_mlx.train.prompts import INSTRUCTIONS, VIDEO_INSTRUCTIONS
from flash_mlx.train.tables import is_table, read_table
from flash_mlx.video import VIDEOS

DATA_SETS = (".json", ".jsonl", ".ndjson")
PLACEHOLDERS = ("<image>", "<video>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SPEAKERS |= {"system": "system"}


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Attributes:
        source: Where it comes from, for messages and lists.
        images: The pictures and videos it is about.
        text: What is asked.
        system: System message, if any.
        answer: The data set's answer, if it has one.
    """

    source: str
    images: tuple[Path, ...]
    text: str
    system: str | None = None
    answer: str | None = None


@dataclass
class Found:
    """What a source holds.

    Attributes:
        questions: In order.
        skipped: Source and reason of what cannot be used.
    """

    questions: list[Question] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def find_questions(
    data: str,
    *,
    prompts: Sequence[str] = (),
    prompts_per_image: int = 1,
    image_folder: Path | None = None,
    text_rows: bool = False,
    limit: int | None = None,
    split: str = "train",
    seed: int = 0,
) -> Found:
    """List what there is to ask.

    Args:
        data: A folder of pictures and videos (with its subfolders), a glob, one of them, a data
            set or the id of one on the hub.
        prompts: What to ask about pictures that come without questions; built-in ones if empty.
        prompts_per_image: How many of them to ask about each.
        image_folder: Where a data set's pictures are; its own folder if None.
        text_rows: Whether rows without pictures are used.
        limit: Most pictures or rows to use, drawn at random; None: all.
        split: Part of a Parquet or hub data set.
        seed: Of which prompt goes to which picture, and of what a limit leaves.

    Raises:
        OSError: If there is no such folder or file.
        ValueError: If it holds nothing to ask, or is no data set.
    """
    path = Path(data).expanduser()
    if path.suffix.lower() in DATA_SETS and not path.is_dir():
        rows = _draw(_read_rows(path), limit, seed)
        return _from_rows(rows, image_folder or path.parent, text_rows=text_rows)
    if is_table(data):
        rows = read_table(data, split, lambda numbers: _draw(numbers, limit, seed))
        return _from_rows(rows, Path("/"), text_rows=text_rows)
    files = _draw(_pictures(path), limit, seed)
    found, rng = Found(), random.Random(seed)  # noqa: S311  nothing secret
    for file in files:
        known = list(prompts or (VIDEO_INSTRUCTIONS if is_video(file) else INSTRUCTIONS))
        for text in rng.sample(known, min(prompts_per_image, len(known))):
            found.questions.append(Question(str(file), (file,), text))
    return found


def is_video(file: Path) -> bool:
    """Tell a video from a picture, by its name."""
    return file.suffix.lower() in VIDEOS


def _draw(items: list[Any], limit: int | None, seed: int) -> list[Any]:
    if limit is None or limit >= len(items):
        return items
    chosen = sorted(random.Random(seed).sample(range(len(items)), limit))  # noqa: S311
    return [items[i] for i in chosen]


def _pictures(path: Path) -> list[Path]:
    if path.is_dir():
        files = [Path(parent, name) for parent, _, names in os.walk(path) for name in names]
    elif path.exists():
        files = [path]
    elif glob.has_magic(str(path)):
        # Not Path.glob: it refuses absolute patterns.
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    else:
        raise FileNotFoundError(
            f"The data must be a folder or glob of pictures, or a JSON or JSONL file; {path} does "
            "not exist. Check the path."
        )
    visible = [
        file for file in files if not any(part.startswith(".") for part in _below(file, path))
    ]
    pictures = sorted(file for file in visible if file.suffix.lower() in (*PICTURES, *VIDEOS))
    if not pictures:
        raise ValueError(
            f"The data must hold pictures ({', '.join(PICTURES)}) or videos; {path} has none. A "
            f"data set ({', '.join(DATA_SETS)}) is named as a file."
        )
    return pictures


def _below(file: Path, folder: Path) -> tuple[str, ...]:
    """Return the parts of a path under a folder; its name if it is elsewhere."""
    return file.relative_to(folder).parts if file.is_relative_to(folder) else (file.name,)


def _read_rows(file: Path) -> list[tuple[str, Any]]:
    """Return each row with its place; one that is no JSON is given as the error."""
    if not file.is_file():
        raise FileNotFoundError(f"The data set must be a file; {file} does not exist.")
    rows = read_rows(file)
    if not rows:
        raise ValueError(f"{file} must hold rows; it is empty.")
    if file.suffix.lower() == ".json":
        return [(f"{file.name}[{number - 1}]", row) for number, row in rows]
    return [(f"{file.name}:{number}", row) for number, row in rows]


def _from_rows(rows: Sequence[tuple[str, Any]], folder: Path, *, text_rows: bool) -> Found:
    found = Found()
    for place, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            found.questions += _read_row(place, row, folder, text_rows=text_rows)
        except (ValueError, OSError) as error:
            found.skipped.append((place, str(error)))
    return found


def _read_row(place: str, row: Any, folder: Path, *, text_rows: bool) -> list[Question]:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object; it is a {type(row).__name__}")
    images = _images(row, folder)
    if not images and not text_rows:
        raise ValueError("it names no picture in image or images, and no video")
    questions: list[Question] = []
    system: str | None = None
    asked: str | None = None
    for speaker, text in _turns(row):
        if speaker == "system":
            system = text
        elif speaker == "user":
            if asked is not None:
                questions.append(Question(place, images, asked, system))
            asked = text
        elif asked is not None:
            questions.append(Question(place, images, asked, system, text))
            asked = None
    if asked is not None:
        questions.append(Question(place, images, asked, system))
    if not questions:
        raise ValueError("it asks nothing")
    return questions


def _images(row: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    files = []
    for name in _named(row, "image") + _named(row, "video"):
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"a picture must be the name of a file; got {name!r}")
        if "://" in name or name.startswith("data:"):
            raise ValueError(f"a picture must be a file; {name[:60]} would have to be fetched")
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"its picture {name} does not exist in {folder}")
        files.append(file)
    return tuple(files)


def _named(row: Mapping[str, Any], kind: str) -> list[Any]:
    named = row.get(f"{kind}s", row.get(kind))
    return [] if named is None else named if isinstance(named, list) else [named]


def _turns(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield who speaks, and the text without the places of pictures."""
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list):
        raise ValueError("it has neither conversations nor messages")
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn must be an object; got {turn!r:.60}")
        speaker = SPEAKERS.get(str(turn.get("from", turn.get("role"))))
        content = turn.get("value", turn.get("content"))
        if isinstance(content, list):
            content = " ".join(
                str(part.get("text", "")) for part in content if isinstance(part, dict)
            )
        if speaker is None or not isinstance(content, str):
            raise ValueError(f"a turn must have a known speaker and text; got {turn!r:.80}")
        for placeholder in PLACEHOLDERS:
            content = content.replace(placeholder, "")
        if content.strip():
            yield speaker, content.strip()
