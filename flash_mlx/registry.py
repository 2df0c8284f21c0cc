"""Which published drafter belongs to which target, fetched and converted when it is first wanted.

The list is `registry.json` beside this file. The user's own list, of the same form, comes first:
the file that `FLASH_MLX_REGISTRY` names, else `~/.config/flash-mlx/registry.json`. A target's MLX
conversions (`mlx-community/NAME-4bit`) count as the target.

Converted drafters are kept in the cache folder (`files.cache_folder`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flash_mlx.draft.kinds import KINDS
from flash_mlx.files import cache_folder, read_json
from flash_mlx.hub import resolve_path

SHIPPED = Path(__file__).parent / "registry.json"
CONVERSION = re.compile(r"mlx-community/(.+?)-(?:\d+bit|bf16|fp16|fp32|mxfp4|nvfp4)", re.IGNORECASE)
WORDS = ("target", "drafter", "kind")


@dataclass(frozen=True)
class Entry:
    """A drafter of a target.

    Attributes:
        target: Hub id.
        drafter: Hub id or folder.
        kind: Its `draft_kind`.
    """

    target: str
    drafter: str
    kind: str

    def belongs_to(self, name: str) -> bool:
        """Whether `name` is the target or an MLX conversion of it."""
        wanted, name = self.target.lower(), name.lower()
        conversion = CONVERSION.fullmatch(name)
        return name == wanted or (
            conversion is not None and conversion[1] == wanted.rpartition("/")[2]
        )


@dataclass(frozen=True)
class Choice:
    """A drafter: its name, its folder if it has weights, and why `auto` chose it."""

    name: str
    folder: Path | None = None
    reason: str = ""


def choose(target: str, path: Path, *, force: bool = False) -> Choice:
    """Return the registered drafter of a target, `ngram` if there is none or it cannot be had.

    Args:
        target: Hub id.
        path: The target's folder.
        force: Download even if disk or memory seem too small.
    """
    lookup = "so drafts are looked up in the text so far (ngram)"
    if (entry := find(target)) is None:
        reason = f"no drafter is known for {target}, {lookup}; --draft-model names one"
        return Choice("ngram", None, reason)
    try:
        folder = fetch(entry, target, path, force=force)
    except (OSError, ValueError) as error:
        return Choice("ngram", None, f"{entry.drafter} cannot be had, {lookup}: {error}")
    reason = f"{entry.drafter} ({entry.kind}) is registered for {entry.target}"
    return Choice(entry.drafter, folder, reason)


def find(name: str) -> Entry | None:
    """Return the drafter of a target, or None if none is known.

    Args:
        name: The target's hub id.

    Raises:
        OSError: If `FLASH_MLX_REGISTRY` names no file.
        ValueError: If the user's list is damaged.
    """
    return next((entry for entry in _entries() if entry.belongs_to(name)), None)


def fetch(entry: Entry, name: str, target: Path, *, force: bool = False) -> Path:
    """Return the folder of a drafter, downloading and converting it at first.

    Args:
        entry: From `find`.
        name: The target's hub id.
        target: The target's folder.
        force: Download even if disk or memory seem too small.

    Raises:
        OSError: If it cannot be downloaded or written.
        ValueError: If it is damaged, needs torch, or is not what the list says.
    """
    slug = re.sub(r"[^\w.-]+", "--", f"{entry.drafter}--for--{name}")
    folder = cache_folder() / "drafters" / slug
    if not (folder / "config.json").is_file():
        # Not at the top: it is missing where this package is imported from the bare tree.
        from flash_mlx.convert import convert_drafter

        source = resolve_path(entry.drafter, torch_files=True, force=force)
        convert_drafter(source, folder, name=entry.drafter, target=target, kind=entry.kind)
    return folder


def _entries() -> Iterator[Entry]:
    named = os.environ.get("FLASH_MLX_REGISTRY")
    own = Path(named) if named else Path.home() / ".config" / "flash-mlx" / "registry.json"
    if named or own.is_file():
        yield from _read(own)
    yield from _read(SHIPPED)


def _read(file: Path) -> list[Entry]:
    listed = read_json(file).get("drafters")
    entries = []
    for each in listed if isinstance(listed, list) else [None]:
        found = [each.get(word) for word in WORDS] if isinstance(each, dict) else []
        values = [value for value in found if isinstance(value, str)]
        if len(values) != len(WORDS):
            raise ValueError(
                f'{file} must hold {{"drafters": [...]}} whose entries have {", ".join(WORDS)}, '
                f"each a text; it has {each!r}."
            )
        if values[2] not in KINDS:
            raise ValueError(f"{file}: kind must be one of {', '.join(KINDS)}; got {values[2]!r}.")
        entries.append(Entry(*values))
    return entries
