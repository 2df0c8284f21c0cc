"""What a target was asked and said in use, for a drafter that learns from it later.

Only on request (`--learn DIR`): prompts and pictures are private. `traffic.jsonl` has a line for
each answer, with the ids of prompt and answer; the processor's arrays of the pictures lie beside
it, in a file named by its content's SHA-256, so that a picture is stored once. Several processes
may add at once; the folder never outgrows its bound. Nothing is sent anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_mlx.checkpoint import CONFIG
from flash_mlx.files import append_line, appending, read_header
from flash_mlx.prompt import Prompt
from flash_mlx.train.answers import Arrays, Asked, token_ids
from flash_mlx.train.source import Found, Question

TRAFFIC = "traffic.jsonl"
EDGE = 1 << 16  # bytes at either end of a weights file that tell it from others
NAME = re.compile(r"[0-9a-f]{64}")


@dataclass
class TrafficLog:
    """Writes what a model is asked and says.

    Attributes:
        folder: Made for its owner alone if need be; one that was there keeps its mode. Whatever is
            put into it only its owner may read.
        limit: Most bytes in it.
        target: From `identify`.
        is_open: Whether there was room so far.
    """

    folder: Path
    limit: int
    target: str
    is_open: bool = True

    def __post_init__(self) -> None:
        """Make the folder.

        Raises:
            OSError: If it cannot be made or written.
        """
        make_folder(self.folder)

    def __call__(self, prompt: Prompt, answer: tuple[int, ...]) -> None:
        """Add an answer, unless the folder is full; a disk that fails only warns."""
        if not self.is_open or len(answer) < 2:
            return
        try:
            with appending(self.folder / TRAFFIC, 0o600) as descriptor:
                self.is_open = self._add(descriptor, prompt, answer)
        except OSError as error:
            self.is_open = False
            warnings.warn(f"No more is written to {self.folder}: {error}.", stacklevel=2)

    def _add(self, descriptor: int, prompt: Prompt, answer: tuple[int, ...]) -> bool:
        """Return whether there was room."""
        part = self.folder / f".part-{os.getpid()}.safetensors"
        row: dict[str, object] = {
            "target": self.target,
            "tokens": prompt.tokens,
            "spans": prompt.image_spans,
        }
        row |= {"videos": prompt.videos, "inputs": None, "answer": answer}
        try:
            if prompt.inputs:
                part.unlink(missing_ok=True)
                part.touch(mode=0o600, exist_ok=False)
                mx.save_safetensors(str(part), dict(prompt.inputs))
                row["inputs"] = hashlib.sha256(part.read_bytes()).hexdigest()
            file = self.folder / f"{row['inputs']}.safetensors"
            line = json.dumps(row).encode("ascii") + b"\n"
            new = part.stat().st_size if prompt.inputs and not file.exists() else 0
            used = sum(each.stat().st_size for each in self.folder.iterdir() if each != part)
            if used + new + len(line) > self.limit:
                warnings.warn(
                    f"{self.folder} has reached its {self.limit / 1e6:g} MB (--learn-limit-mb), so "
                    "nothing more is collected.",
                    stacklevel=2,
                )
                return False
            if new:
                part.replace(file)
            append_line(descriptor, line)
        finally:
            part.unlink(missing_ok=True)
        return True


def make_folder(folder: Path) -> None:
    """Make the folder of a log if need be, and see that it can be written.

    Raises:
        OSError: If it cannot.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if is_new:
        folder.chmod(0o700)
    with appending(folder / TRAFFIC, 0o600):
        pass
    part = folder / f".part-{os.getpid()}.safetensors"
    part.touch(mode=0o600)
    part.unlink()


def identify(path: Path) -> str:
    """Return what tells a checkpoint from others, without reading all of its weights.

    The SHA-256 of its configuration, and of size, beginning and end of each weights file.
    """
    digest = hashlib.sha256((path / CONFIG).read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(EDGE))
            stream.seek(max(size - EDGE, 0))
            digest.update(stream.read(EDGE))
    return digest.hexdigest()


def read_traffic(
    folder: Path, target: str, found: Found, vocab_size: int
) -> list[tuple[Asked, tuple[int, ...]]]:
    """Return prompts and answers; what cannot be used is added to `found.skipped`.

    Args:
        folder: Of a `TrafficLog`.
        target: From `identify`: whose answers are wanted.
        found: Gets the lines that are left out.
        vocab_size: Of the target; a line with other ids is left out.

    Raises:
        OSError: If there is no such folder.
    """
    rows = []
    pictures = _Pictures(folder)
    for number, line in enumerate(read_lines(folder), start=1):
        place = f"{TRAFFIC}:{number}"
        try:
            rows.append(_read(pictures, place, json.loads(line), target, vocab_size))
        except (
            ValueError,
            KeyError,
            TypeError,
            OSError,
            OverflowError,
            RecursionError,
        ) as error:
            found.skipped.append((place, str(error)))
    return rows


def read_lines(folder: Path) -> list[bytes]:
    """Return the lines of a folder's log, unchecked.

    Raises:
        OSError: If there is no such folder.
    """
    file = folder / TRAFFIC
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} must be a folder that generate, caption or chat collected with --learn; "
            f"it has no {TRAFFIC}."
        )
    return file.read_bytes().splitlines()


class _Pictures:
    """The files of pictures beside a log, each looked at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Arrays | None] = {}  # None: not what its name says

    def __call__(self, name: str) -> tuple[Path, Arrays]:
        """Return a file and its arrays, read when they are needed.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is no file of this log, or has been changed.
        """
        if not NAME.fullmatch(name):
            raise ValueError("its pictures must be named by a hash")
        file = self._folder / f"{name}.safetensors"
        if name not in self._known:
            self._known[name] = _open(file) if _is_whole(file, name) else None
        arrays = self._known[name]
        if arrays is None:
            raise ValueError("its pictures are not there, or are not what their name says")
        return file, arrays


def _is_whole(file: Path, name: str) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == name


def _open(file: Path) -> Arrays:
    return Arrays(tuple(read_header(file)), lambda: mx.load(str(file)))  # type: ignore[arg-type, return-value]


def _read(
    pictures: _Pictures, place: str, row: dict[str, Any], target: str, vocab_size: int
) -> tuple[Asked, tuple[int, ...]]:
    if row["target"] != target:
        raise ValueError("another target said it")
    spans, videos = (
        tuple((int(start), int(stop)) for start, stop in row[name]) for name in ("spans", "videos")
    )
    if any(not 0 <= start < stop <= len(spans) for start, stop in videos):
        raise ValueError("its videos must be made of its pictures")
    tokens, answer = (token_ids(row[name], vocab_size) for name in ("tokens", "answer"))
    images: tuple[Path, ...] = ()
    inputs: Arrays | None = None
    if row["inputs"] is not None:
        file, inputs = pictures(row["inputs"])
        images = (file,)
    if not videos and bool(spans) != (inputs is not None):
        raise ValueError("its pictures must have places in its text, and the places pictures")
    digest = hashlib.sha256(json.dumps([target, tokens, row["inputs"]]).encode())
    prompt = Prompt(tokens, spans, {} if inputs is None else inputs, videos=videos)
    return Asked(Question(place, images, ""), prompt, digest.hexdigest()), answer
