"""What was decided about kernels, remembered in a file."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flash_mlx.files import cache_folder, replacing


@dataclass(frozen=True)
class Decision:
    """Which form of an operation is used, and why.

    Attributes:
        use: Whether it is another one than MLX's own operations.
        reason: In a few words.
        error: Largest difference from the definition over its largest value; None: not tested.
        kernel_seconds: Time of the fastest form that is right [s]; None: not timed.
        ops_seconds: The time of MLX's own operations [s].
        form: The name of that form: the operation's for this project's kernel, or a rival's.
    """

    use: bool
    reason: str
    error: float | None = None
    kernel_seconds: float | None = None
    ops_seconds: float | None = None
    form: str = ""


class Decisions:
    """Decisions by what they depend on. Reading and writing never fail: at worst, it is forgotten.

    Args:
        file: Where they are kept; None: only in memory.
        entries: What is known already.
    """

    def __init__(self, file: Path | None, entries: dict[str, Decision]) -> None:
        """Keep them."""
        self._file, self._entries = file, entries

    @classmethod
    def load(cls, file: Path | None = None) -> Decisions:
        """Read a file, by default this user's; one that is damaged counts as empty."""
        try:
            file = cache_folder() / "kernels.json" if file is None else file
            found = json.loads(file.read_text(encoding="utf-8"))
            entries = {key: _read(value) for key, value in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            entries = {}
        return cls(file, entries)

    def get(self, key: tuple[str, ...]) -> Decision | None:
        """Return what is known."""
        return self._entries.get("; ".join(key))

    def put(self, key: tuple[str, ...], decision: Decision) -> None:
        """Remember, and write the file."""
        self._entries["; ".join(key)] = decision
        if self._file is None:
            return
        text = json.dumps({k: asdict(d) for k, d in self._entries.items()}, indent=1)
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._file) as new:
                new.write_text(text, encoding="utf-8")

    def named(self, kernel: str) -> dict[str, Decision]:
        """Return the decisions about one kernel, by the rest of their keys."""
        start = f"{kernel}; "
        return {k.removeprefix(start): d for k, d in self._entries.items() if k.startswith(start)}


def _read(value: object) -> Decision:
    """Return a decision from its entry.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, dict) or not isinstance(value.get("use"), bool):
        raise ValueError(f"A decision must say whether a kernel is used; got {value!r}.")
    return Decision(**value)
