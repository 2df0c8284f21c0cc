"""What a benchmark asks: pictures and videos with prompts, rows of a data set, or text alone.

    FOLDER          its pictures and videos; number i gets prompt i, over and over
    FILE.jsonl      a row each question; `.json` may hold a list of rows instead
    FILE.txt        a question a line, without a picture
    scenes          the bundled pictures

A row has its text in `turns` (a list: MMSpec, Spec-Bench), `text` (LLaVA-Bench), `prompt` or
`question`, and its picture in `image` (or `images`, `path`, `file_name`) or its video in `video`
(or `videos`), beside the file, in its folder `images`, or in the folder that `--image-folder`
names. Without either it is asked as text. A row that cannot be asked is skipped, and the report
says which and why.

Later turns of a conversation follow plain decoding's own answers to the earlier ones, so all
contenders answer the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flash_mlx.files import read_rows
from flash_mlx.images import PICTURES
from flash_mlx.loading import demo_pictures
from flash_mlx.messages import Media, Message, as_media
from flash_mlx.processing import make_chat_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import LoadedTarget
from flash_mlx.video import FPS, MAX_FRAMES, VIDEOS

SCENES = "scenes"
ROWS, LINES = (".jsonl", ".ndjson", ".json"), ".txt"
TEXTS = ("turns", "text", "prompt", "question")
IMAGES, CLIPS = ("image", "images", "path", "file_name"), ("video", "videos")
NAMES = ("id", "question_id")

AsMedia = Callable[[Path], Media]


@dataclass(frozen=True)
class Question:
    """What is asked of all contenders, in one turn or several.

    Attributes:
        name: Of the row or the picture, in reports.
        turns: What the user says, one after the other.
        images: Pictures and videos that come with the first turn.
        topic: The row's own, for figures by topic; empty without one.
        error: Why it cannot be asked; None if it can.
    """

    name: str
    turns: tuple[str, ...]
    images: tuple[Media, ...] = ()
    topic: str = ""
    error: str | None = None

    def prompt(self, loaded: LoadedTarget, said: Sequence[str]) -> Prompt:
        """Return the next turn as the target reads it.

        Args:
            loaded: The target.
            said: Its answers to the turns before.

        Raises:
            OSError: A picture is missing.
            ValueError: The row is bad, a picture is damaged, or the prompt exceeds the context.
        """
        if self.error is not None:
            raise ValueError(self.error)
        messages = [Message("user", self.turns[0], self.images)]
        for text, turn in zip(said, self.turns[1:], strict=False):
            messages += [Message("assistant", text), Message("user", turn)]
        return make_chat_prompt(loaded, messages)


def read_questions(
    data: str,
    prompts: Sequence[str],
    limit: int,
    image_folder: Path | None = None,
    *,
    fps: float = FPS,
    max_frames: int = MAX_FRAMES,
) -> list[Question]:
    """Return what to ask.

    Args:
        data: A folder, a file, or `scenes`; see the module.
        prompts: What to ask about pictures that come without a text.
        limit: Most questions, the first ones.
        image_folder: Where rows' pictures are; None: beside their file, or in `images` there.
        fps: Frames to read of a second of video.
        max_frames: Most frames to read of a video.

    Raises:
        OSError: There is no such file or folder.
        ValueError: It holds no question, or a number is out of its range.
    """
    path, media_of = Path(data), partial(as_media, fps=fps, max_frames=max_frames)
    if data == SCENES and not path.exists():
        found = _of_pictures(demo_pictures(), prompts, media_of)
    elif path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in (*PICTURES, *VIDEOS))
        found = _of_pictures(files, prompts, media_of)
    elif not path.exists():
        raise FileNotFoundError(
            f"--data must be a folder, a file or `{SCENES}`; {data} does not exist. Check the path."
        )
    elif path.suffix.lower() in ROWS:
        found = _of_rows(path, prompts, image_folder, media_of)
    elif path.suffix.lower() == LINES:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [Question(f"line {n}", (line,)) for n, line in enumerate(lines, 1) if line.strip()]
    else:
        raise ValueError(
            f"--data must be a folder of pictures, rows ({', '.join(ROWS)}) or text ({LINES}); "
            f"got {data}."
        )
    if not found:
        raise ValueError(
            f"--data must hold something to ask: pictures ({', '.join(PICTURES)}), videos, rows "
            f"({', '.join(ROWS)}) or lines ({LINES}); {data} has none."
        )
    return found[:limit]


def first_prompt(loaded: LoadedTarget, questions: Sequence[Question]) -> Prompt:
    """Return the prompt of the first question that can be asked.

    Raises:
        ValueError: There is none.
    """
    why = ""
    for question in questions:
        try:
            return question.prompt(loaded, ())
        except (ValueError, OSError) as error:
            why = why or f"{question.name}: {error}"
    raise ValueError(
        f"--data must hold a question that this model can be asked; none of {len(questions)} is. "
        f"The first, {why}"
    )


def _of_pictures(
    files: Sequence[Path], prompts: Sequence[str], media_of: AsMedia
) -> list[Question]:
    return [
        Question(file.name, (prompts[i % len(prompts)],), (media_of(file),))
        for i, file in enumerate(files)
    ]


def _of_rows(
    file: Path, prompts: Sequence[str], image_folder: Path | None, media_of: AsMedia
) -> list[Question]:
    folders = [file.parent, file.parent / "images"] if image_folder is None else [image_folder]

    def find(name: str) -> Media:
        found = next((f / name for f in folders if (f / name).exists()), folders[0] / name)
        return media_of(found)

    return [
        _question(number, row, prompts[(number - 1) % len(prompts)], find)
        for number, row in read_rows(file)
    ]


def _question(number: int, row: Any, prompt: str, find: Callable[[str], Media]) -> Question:
    try:
        return _read_row(number, row, prompt, find)
    except ValueError as error:
        return Question(f"row {number}", ("",), error=f"A row must be a question: {error}")


def _read_row(number: int, row: Any, prompt: str, find: Callable[[str], Media]) -> Question:
    if isinstance(row, Exception):
        raise ValueError(str(row))
    if not isinstance(row, dict):
        raise ValueError(f"it must be a JSON object; it is a {type(row).__name__}.")
    turns: Any = next((row[name] for name in TEXTS if row.get(name) is not None), None)
    turns = [turns] if isinstance(turns, str) else turns
    images = [*_files(row, IMAGES, "picture"), *_files(row, CLIPS, "video")]
    if turns is None and images:
        turns = [prompt]
    if not _are_texts(turns) or not turns or not turns[0].strip():
        raise ValueError(f"its text must stand in {', '.join(TEXTS)}; got {turns!r}.")
    name = next((str(row[key]) for key in NAMES if key in row), f"row {number}")
    topic = next((str(row[key]) for key in ("topic", "category") if row.get(key)), "")
    return Question(name, tuple(turns), tuple(map(find, images)), topic)


def _files(row: dict[str, Any], keys: Sequence[str], what: str) -> list[str]:
    """Return the names of files that stand under the first of some keys."""
    names: Any = next((row[key] for key in keys if row.get(key) is not None), [])
    names = [names] if isinstance(names, str) else names
    if not _are_texts(names) or any(not name or "\0" in name for name in names):
        raise ValueError(f"its {what} must be a file's name; got {names!r}.")
    return list(names)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
