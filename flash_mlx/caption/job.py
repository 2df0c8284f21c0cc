"""A job: pictures to describe, the file that gets the captions, and what is done already."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flash_mlx.caption.describe import Caption, describe, hash_file
from flash_mlx.caption.listing import Item, find_items
from flash_mlx.caption.rows import RowFile
from flash_mlx.files import replacing
from flash_mlx.generate import Model

Key = tuple[str, object]  # path and prompt


class Job:
    """Pictures to describe and where their captions go.

    With `resume`, what the output already has is not done again. A picture that has changed since
    (its bytes are not those of the row's `sha256`) loses its row and is described anew, and so does
    one that could not be read and now can.

    Args:
        inputs: As for `find_items`.
        prompt: Likewise.
        output: File of rows; None writes none.
        resume: Whether the output may have rows.
        sidecar: Whether to write each caption beside its picture.

    Attributes:
        todo: What is left to describe.
        num_done: Captions that the output had already.
        num_failed: Errors among them.
        batches: How many texts are decoded together, and why; empty before the first.

    Raises:
        OSError: The inputs or the output cannot be used.
        ValueError: There is nothing to describe, or a sidecar would replace a file.
    """

    def __init__(
        self,
        inputs: Sequence[str | os.PathLike[str]],
        prompt: str | None = None,
        *,
        output: str | os.PathLike[str] | None = None,
        resume: bool = False,
        sidecar: bool = False,
    ) -> None:
        """Find out what there is to do, and whether its results can be written."""
        if resume and output is None:
            raise ValueError("To resume, there must be an output to go on with; name one.")
        items = find_items(inputs, prompt)
        if output is not None:
            _require_other(Path(output), inputs)
        self._rows = None if output is None else RowFile(Path(output), resume=resume)
        self._sidecar = sidecar
        self.batches = ""
        try:
            done, stale = _read_done(items, self._rows) if self._rows else ({}, {})
            self.todo = [item for item in items if (item.path, item.prompt) not in done]
            if sidecar:
                _check_sidecars(items, self.todo, stale)
            if self._rows is not None and stale:
                self._rows.keep(lambda row: _key(row) not in stale)
            for item in items if sidecar else ():
                text, file = done.get((item.path, item.prompt)), _sidecar(item)
                if text is not None and file is not None and not file.exists():
                    _write_sidecar(file, text)
        except BaseException:
            self.close()
            raise
        self.num_done = len(items) - len(self.todo)
        failed = {key for key, text in done.items() if text is None}
        self.num_failed = sum((item.path, item.prompt) in failed for item in items)

    def run(self, model: Model, **settings: Any) -> Iterator[Caption]:
        """Describe what is to be done, and write down each caption before it is returned.

        They come in the order of the pictures. Of texts that are decoded together, those that end
        early wait for those before them.

        Args:
            model: From `load`.
            settings: `system`, `fps`, `max_frames` and `batch_size` as for `caption`, and those of
                `stream_generate`.

        Raises:
            OSError: A caption could not be written.
            ValueError: A setting is out of its range.
        """
        try:
            for item, each in describe(model, self.todo, note=self._note, **settings):
                if self._rows is not None:
                    self._rows.append(each.to_row())
                file = _sidecar(item) if self._sidecar else None
                if file is not None and each.text is not None:
                    _write_sidecar(file, each.text)
                yield each
        finally:
            self.close()

    def _note(self, reason: str) -> None:
        self.batches = reason

    def close(self) -> None:
        """Let others have the output."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None


def _key(row: Mapping[str, Any]) -> Key:
    return row["path"], row.get("prompt")


def _read_done(items: Sequence[Item], rows: RowFile) -> tuple[dict[Key, str | None], ...]:
    """Compare rows with the pictures as they are now.

    Returns:
        What is done, with its text, and what was done of pictures that are others now.
    """
    files: dict[Key, Path | None] = {(item.path, item.prompt): item.file for item in items}
    done: dict[Key, str | None] = {}
    stale: dict[Key, str | None] = {}
    for row in rows:
        key = _key(row)
        file = files.get(key)
        now = None if file is None else _sha256(file)
        if now is None or now == row.get("sha256"):
            done[key] = row.get("text")
        else:
            stale[key] = row.get("text")
    return done, {key: text for key, text in stale.items() if key not in done}


def _sha256(file: Path) -> str | None:
    """Return the hash of a file's bytes; None if it cannot be read."""
    try:
        return hash_file(file) if file.is_file() else None
    except OSError:
        return None


def _require_other(output: Path, inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Require an output that is no input.

    Raises:
        ValueError: It is one, perhaps by another name.
    """
    if output.exists():
        same = [each for each in inputs if Path(each).exists() and output.samefile(each)]
        if same:
            raise ValueError(
                f"The output must be another file than the inputs; {output} is both. Name another."
            )


def _sidecar(item: Item) -> Path | None:
    """Return where the caption of a picture stands; None if the item is none."""
    none = item.file is None or item.file.is_dir()
    return None if none or item.file is None else item.file.with_suffix(".txt")


def _write_sidecar(file: Path, text: str) -> None:
    with replacing(file) as new:
        new.write_text(text, encoding="utf-8")


def _check_sidecars(
    items: Sequence[Item], todo: Sequence[Item], stale: Mapping[Key, str | None]
) -> None:
    """Find out before anything is described whether all sidecars can be written.

    Args:
        items: All pictures.
        todo: Those to describe.
        stale: What was said of pictures that are others now; only that may be replaced.

    Raises:
        OSError: A folder of pictures cannot be written.
        ValueError: Two captions would have the same file, or one would replace another text.
    """
    files = {item: file for item in items if (file := _sidecar(item)) is not None}
    for folder in {file.parent for file in files.values()}:
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(f"Captions are to stand beside the pictures, and {folder} is read-only.")
    taken: dict[Path, Item] = {}
    for item, file in files.items():
        other = taken.setdefault(file, item)
        if other != item:
            raise ValueError(
                f"Each picture must have a caption file of its own; {other.path} and {item.path} "
                f"would share {file}. Rename one, or leave --sidecar out."
            )
    for item in todo:
        file, said = files.get(item), stale.get((item.path, item.prompt))
        if file is None or not file.exists():
            continue
        if said is None or file.read_bytes() != said.encode():
            raise FileExistsError(
                f"A caption must not replace another text; {file} exists. Move such files away, "
                "or leave --sidecar out."
            )
