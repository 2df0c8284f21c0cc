"""What a run leaves in its output folder besides the drafter: its state and its metrics.

`training.safetensors` holds all arrays of a run under `group.name`, and in its header the number
of steps done and what the run must not change. It is replaced as a whole. `metrics.jsonl` only
grows; a resumed run drops what was reported after its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from flash_mlx.files import read_header, replacing

STATE, METRICS = "training.safetensors", "metrics.jsonl"


@dataclass(frozen=True, eq=False)
class RunState:
    """A run after some steps.

    Attributes:
        step: Steps done.
        run: Settings that must be the same when it goes on, as JSON values.
        arrays: For each group (`model`, ...), its arrays by dotted name.
        best: The best that was measured; None if nothing was.
        worse: Measurements since.
    """

    step: int
    run: Mapping[str, object]
    arrays: Mapping[str, Mapping[str, mx.array]]
    best: float | None = None
    worse: int = 0

    def save(self, folder: Path) -> None:
        """Replace the folder's state.

        Raises:
            OSError: If it cannot be written; the old one is intact.
        """
        arrays = {
            f"{group}.{name}": value
            for group, values in self.arrays.items()
            for name, value in values.items()
        }
        progress = {"step": self.step, "best": self.best, "worse": self.worse}
        notes = {"progress": json.dumps(progress), "run": json.dumps(self.run)}
        with replacing(folder / STATE) as file:
            mx.save_safetensors(str(file), arrays, metadata=notes)

    @classmethod
    def load(cls, folder: Path, run: Mapping[str, object]) -> RunState:
        """Return the folder's state.

        Args:
            folder: Output of the run.
            run: What it must have begun with.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or of a run with other settings.
        """
        file = folder / STATE
        if not file.is_file():
            raise FileNotFoundError(f"There is no run to resume: {file} does not exist.")
        read_header(file)
        arrays, notes = cast(
            tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True)
        )
        if not {"run", "progress"} <= notes.keys():
            raise ValueError(f"{file} must be the state of a run of this version of flash-mlx.")
        theirs = json.loads(notes["run"])
        if different := sorted(name for name in run if run[name] != theirs.get(name)):
            changes = ", ".join(f"{n} ({theirs.get(n)}, now {run[n]})" for n in different)
            raise ValueError(
                f"A run must go on with what it began with; in {folder} it began with other "
                f"{changes}. Use the same settings or another output folder."
            )
        groups: dict[str, dict[str, mx.array]] = {}
        for name, value in arrays.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = value
        progress = json.loads(notes["progress"])
        return cls(progress["step"], theirs, groups, progress["best"], progress["worse"])


def log_metrics(folder: Path, info: Mapping[str, object]) -> None:
    """Append a line to the folder's metrics.

    Raises:
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(info) + "\n")


def forget_metrics_after(folder: Path, step: int) -> None:
    """Drop what was reported after a step, and a last line that was cut off.

    Raises:
        OSError: If it cannot be written.
    """
    if not (folder / METRICS).is_file():
        return
    kept = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    with replacing(folder / METRICS) as new:
        new.write_text("".join(kept), encoding="utf-8")


def flat(tree: object) -> dict[str, mx.array]:
    """Return the arrays of a tree by their dotted names."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))
