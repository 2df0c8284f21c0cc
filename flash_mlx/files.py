"""Files: JSON objects, rows of JSON, safetensors headers, and writing that never tears.

A reader of a replaced file sees the old one or the new one, whatever happens meanwhile.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
ITEM_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
ITEM_BYTES |= {"BOOL": 1}


@dataclass(frozen=True)
class Tensor:
    """What a header says of a tensor: its dtype (such as `BF16`) and its shape."""

    dtype: str
    shape: tuple[int, ...]


def cache_folder() -> Path:
    """Return where to keep what can be made again.

    It is `FLASH_MLX_CACHE`, or else the platform's cache folder.

    Raises:
        FileNotFoundError: If the user has no home; some daemons have none.
    """
    if chosen := os.environ.get("FLASH_MLX_CACHE"):
        return Path(chosen)
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "flash-mlx"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash-mlx"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


def read_json(file: Path) -> dict[str, object]:
    """Return a JSON file that holds an object.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it does not hold one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be valid JSON; {error}. Write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object; it holds a {type(content).__name__}.")
    return content


def read_rows(file: Path) -> list[tuple[int, Any]]:
    """Return the rows of a `.json` file that holds a list, or else the lines of one of JSONL.

    Returns:
        Number of the row or line, from 1, and its content; of a line that is no JSON the error.
        Empty lines are left out.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a `.json` file is damaged or holds no list.
    """
    content = file.read_bytes()
    if file.suffix.lower() == ".json":
        try:
            rows = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} must be valid JSON; {error}. Write it again.") from error
        if not isinstance(rows, list):
            raise ValueError(
                f"{file} must hold a list of rows; it holds a {type(rows).__name__}. One object a "
                "line is JSONL: name it .jsonl."
            )
        return list(enumerate(rows, start=1))
    found: list[tuple[int, Any]] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                found.append((number, json.loads(line.decode("utf-8-sig"))))
            except (ValueError, RecursionError) as error:
                found.append((number, ValueError(f"it must be valid JSON: {error}")))
    return found


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors that a safetensors file really holds; none is read.

    Raises:
        OSError: If it cannot be read.
        ValueError: If the header is damaged, or speaks of bytes that the file does not have.
    """
    whole = f"{file} must be a whole safetensors file"
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{whole}; its header does not fit in its {size} bytes. Copy or download it again."
            )
        header = stream.read(length)
    tensors, spans = {}, []
    try:
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                begin, end = map(int, entry["data_offsets"])
                tensors[name] = Tensor(str(entry["dtype"]), tuple(map(int, entry["shape"])))
                spans.append((name, begin, end))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{whole}; its header is damaged. Copy or download it again.") from error
    for name, begin, end in spans:
        dtype, shape = tensors[name].dtype, tensors[name].shape
        if not 0 <= begin <= end <= size - 8 - length:
            raise ValueError(f"{whole}; it ends within {name}. Copy or download it again.")
        if dtype not in ITEM_BYTES:
            raise ValueError(
                f"{file} must hold tensors of the types {', '.join(ITEM_BYTES)}; {name} is of the "
                f"type {dtype}. A newer flash-mlx may know it."
            )
        if end - begin != ITEM_BYTES[dtype] * math.prod(shape):
            raise ValueError(
                f"{whole}; its header gives {name} {end - begin} bytes for {dtype} of the shape "
                f"{shape}. Copy or download it again."
            )
    return tensors


def append_line(descriptor: int, line: bytes) -> None:
    """Add a line to the end of a file, all of it or nothing.

    Args:
        descriptor: Of a file that is open for appending, and that no other process writes to now.
        line: Its end included.

    Raises:
        OSError: If there is no room for it.
    """
    end = os.fstat(descriptor).st_size
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    except OSError:
        os.ftruncate(descriptor, end)
        raise


@contextmanager
def appending(file: Path, mode: int = 0o666) -> Iterator[int]:
    """Yield a log, open at its end, while no other process writes; a half line is cut off.

    Args:
        file: Of lines; made if need be.
        mode: Of a new one.

    Raises:
        OSError: If it cannot be read or written.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            content = os.pread(descriptor, size, 0)
            os.ftruncate(descriptor, content.rfind(b"\n") + 1)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path to write to, which then takes the place of `file` at once or not at all.

    Raises:
        OSError: If it cannot be written; `file` is as it was.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{file.name}-", dir=file.parent))
    try:
        yield folder / file.name
        _sync(folder / file.name)
        (folder / file.name).replace(file)
        _sync(file.parent)
    except RuntimeError as error:  # MLX says so when a disk is full
        raise OSError(f"{file} could not be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Put a file, or the entries of a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
