"""A file of JSON rows that grows line by line and is never torn for its reader.

Each row is one write to the end of the file. A process that is killed in the midst of one leaves
an unfinished last line, which the next run removes. Rows are ASCII, so no reader finds an end of
line within one; file names that are no UTF-8 keep their bytes (as Python's surrogates).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flash_mlx.files import append_line, replacing

START = b'{"path": '


class RowFile:
    """Rows on the disk, each with a `path` first. One process at a time may hold the file.

    Args:
        file: Made if it is missing.
        resume: Whether it may hold rows already.

    Raises:
        OSError: If it cannot be written, another process holds it, or it holds rows without
            `resume`.
        ValueError: If it holds anything but rows.
    """

    def __init__(self, file: Path, *, resume: bool = False) -> None:
        """Open the file and remove what a killed process left unfinished."""
        self._file = file
        self._descriptor = self._open()
        try:
            if os.fstat(self._descriptor).st_size and not resume:
                raise FileExistsError(
                    f"The output must be a new file; {file} holds something already. Name another, "
                    "or go on with --resume."
                )
            self._mend()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows."""
        return (json.loads(line) for line in self._lines())

    def append(self, row: Mapping[str, object]) -> None:
        """Add a row, all of it or nothing.

        Raises:
            OSError: If there is no room for it.
        """
        append_line(self._descriptor, json.dumps(dict(row)).encode("ascii") + b"\n")

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop all other rows; a process that is killed meanwhile has dropped all or none."""
        with replacing(self._file) as new, new.open("wb") as stream:
            stream.writelines(line for line in self._lines() if wanted(json.loads(line)))
        old, self._descriptor = self._descriptor, self._open()
        os.close(old)

    def close(self) -> None:
        """Let others have the file."""
        os.close(self._descriptor)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        if self._file.exists() and not self._file.is_file():
            raise OSError(f"The output must be a file; {self._file} is none. Name another.")
        try:
            descriptor = os.open(self._file, flags, 0o666)
        except OSError as error:
            raise OSError(
                f"The output must be a file that can be written; {self._file} is none: "
                f"{error.strerror}."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise OSError(
                f"Only one process may write to {self._file}, and another does. Wait for it, or "
                "name another output."
            ) from error
        return descriptor

    def _lines(self) -> Iterator[bytes]:
        with self._file.open("rb") as stream:
            yield from stream

    def _mend(self) -> None:
        """Check all lines and cut an unfinished last one off."""
        end = 0
        for number, line in enumerate(self._lines(), start=1):
            whole = line.endswith(b"\n")
            if _is_row(line):
                end += len(line)
                if not whole:
                    os.write(self._descriptor, b"\n")
                    break
            elif whole or line[: len(START)] != START[: len(line)]:
                raise ValueError(
                    f"{self._file} must hold rows of captions only; line {number} is none. Name "
                    "another output, or remove that line."
                )
            else:
                os.ftruncate(self._descriptor, end)


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and isinstance(row.get("path"), str)
