"""What to caption: folders, globs, files and JSONL lists as a plain list of items.

A folder and a glob bring the pictures and videos in them, by suffix; a file that is named is taken
as it is. A list has one JSON object a line: `path` (or `image`, or `file_name`), perhaps a
`prompt`, and any other fields, which a template may name: `--prompt "Describe this {style} work."`.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flash_mlx.images import PICTURES
from flash_mlx.messages import default_prompt
from flash_mlx.video import VIDEOS

SEEN = PICTURES + VIDEOS
LISTS = (".jsonl", ".ndjson")
PATH_FIELDS = ("path", "image", "file_name")
FIELD = re.compile(r"\{([^\W\d]\w*)\}")


@dataclass(frozen=True, slots=True)
class Item:
    """One picture, or video, and what to ask about it.

    Attributes:
        path: Its name in the output: as a list says it, else the file's.
        file: Where it is; None if a list's row is bad.
        prompt: What to ask; empty if the row is bad.
        error: What is wrong with the row; None if nothing is.
    """

    path: str
    file: Path | None
    prompt: str
    error: str | None = None


def find_items(inputs: Sequence[str | os.PathLike[str]], prompt: str | None = None) -> list[Item]:
    """List what the inputs hold, in order; what occurs twice is taken once.

    Args:
        inputs: Files, folders (with their subfolders), globs, and lists (`.jsonl`).
        prompt: What to ask where a list's row has no `prompt` of its own. `{name}` stands for a
            field of the row; for a file there are `path`, `name` (without suffix) and `folder`.
            None: to describe the image, or the video, in detail.

    Raises:
        OSError: If a list cannot be read, or nothing that was named exists.
        ValueError: If there is no picture, or the prompt names a field that files do not have.
    """
    items = list(dict.fromkeys(item for each in inputs for item in _items(Path(each), prompt)))
    if not items:
        raise ValueError(
            f"There must be pictures or videos to caption ({', '.join(SEEN)}); "
            f"{', '.join(str(each) for each in inputs) or 'no input'} has none."
        )
    if not any(item.error or (item.file and item.file.exists()) for item in items):
        raise FileNotFoundError(
            f"What to caption must exist; {items[0].path} does not. Check the path."
        )
    return items


def _items(path: Path, prompt: str | None) -> Iterator[Item]:
    files: Iterable[Path] = [path]
    if path.is_dir():
        files = _walk(path)
    elif path.suffix.lower() in LISTS:
        yield from _read_list(path, prompt)
        return
    elif not path.exists() and glob.has_magic(str(path)):
        # Not Path.glob: it refuses absolute patterns.
        found = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
        files = (file for file in found if file.is_file() and _is_seen(file.name))
    for file in files:
        fields = {"path": str(file), "name": file.stem, "folder": file.parent.name}
        yield Item(str(file), file, _asked(prompt, file, fields))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield what can be seen by name; hidden files and folders hold thumbnails and the like."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if _is_seen(name))


def _is_seen(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SEEN)


def _read_list(file: Path, prompt: str | None) -> Iterator[Item]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield _read_row(line, file.parent, prompt)
            except (ValueError, RecursionError) as error:
                yield Item(f"{file}:{number}", None, "", f"This row must be an item: {error}")


def _read_row(line: bytes, folder: Path, prompt: str | None) -> Item:
    row = json.loads(line.decode("utf-8-sig"))
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, and it is a {type(row).__name__}.")
    path = next((row[name] for name in PATH_FIELDS if name in row), None)
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"it must name a file in {', '.join(PATH_FIELDS)}; got {path!r}.")
    own = row.get("prompt")
    if not isinstance(own, str | None):
        raise ValueError(f"its prompt must be text; got {own!r}.")
    beside = folder / path
    file = beside if beside.exists() or not Path(path).exists() else Path(path)
    fields = {"path": path, "name": file.stem, "folder": file.parent.name, **row}
    return Item(path, file, _asked(prompt, file, fields) if own is None else own)


def _asked(prompt: str | None, file: Path, fields: Mapping[str, object]) -> str:
    if prompt is None:
        return default_prompt(video=file.suffix.lower() in VIDEOS)
    return _fill(prompt, fields)


def _fill(template: str, fields: Mapping[str, object]) -> str:
    """Replace each `{name}` by the field of that name.

    Raises:
        ValueError: If there is no such field, or it holds neither text nor a number.
    """

    def value(match: re.Match[str]) -> str:
        found = fields.get(match[1])
        if not isinstance(found, str | int | float):
            known = ", ".join(name for name in fields if isinstance(name, str))
            raise ValueError(
                f"The prompt must name fields that hold text or a number; {match[0]} is none "
                f"(there are: {known})."
            )
        return str(found)

    return FIELD.sub(value, template)
