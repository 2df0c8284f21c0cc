"""The output folder of a run: whose it is, and what lies in it.

    config.json, model.safetensors, README.md, training.png   the drafter and its model card
    training.safetensors, metrics.jsonl, run.json, answers.jsonl, skipped.jsonl   the run

`run.json` is written first and marks the folder as a run's. Nothing outside of it is written, and
nothing in it that is not in this list is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from flash_mlx.checkpoint import CONFIG, WEIGHTS
from flash_mlx.files import read_json, replacing
from flash_mlx.loading import Model
from flash_mlx.train.state import METRICS, STATE

RUN, ANSWERS, SKIPPED, CARD, PLOT = (
    "run.json",
    "answers.jsonl",
    "skipped.jsonl",
    "README.md",
    "training.png",
)


def check(output: Path, request: Mapping[str, object], *, resume: bool, overwrite: bool) -> bool:
    """See whether a run may have the folder; nothing is written.

    Args:
        output: The folder.
        request: What is asked for, as JSON values.
        resume: Whether to go on with the run in it, if there is one.
        overwrite: Whether to begin again where another run was.

    Returns:
        Whether there is a checkpoint to go on from.

    Raises:
        OSError: If the folder belongs to something else, or to another run.
        ValueError: If the run to resume was asked for something else.
    """
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise OSError(
            f"The output must be a folder that can be written; {there} is not. Name another."
        )
    if not output.exists():
        return False
    is_run = (output / RUN).is_file()
    foreign = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    if foreign and not is_run:
        raise FileExistsError(
            f"The output must be a new or empty folder, or that of a run; {output} holds "
            f"{', '.join(foreign[:3])}. Name another."
        )
    if is_run and not (resume or overwrite):
        raise FileExistsError(
            f"The output must be a new folder; {output} holds a run. Go on with --resume, begin "
            "again with --overwrite, or name another."
        )
    if not (is_run and resume):
        return False
    began, wanted = read_json(output / RUN), json.loads(json.dumps(request))
    if different := sorted(name for name in wanted if wanted[name] != began.get(name)):
        changes = ", ".join(f"{n} ({began.get(n)}, now {wanted[n]})" for n in different)
        raise ValueError(
            f"A run must go on with what it began with; the one in {output} began with other "
            f"{changes}. Use the same, or another output."
        )
    return (output / STATE).is_file()


def claim(output: Path, request: Mapping[str, object], *, resume: bool) -> None:
    """Make the folder this run's, after `check`. Of another run only answers and lists stay.

    Raises:
        OSError: If it cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in (STATE, METRICS, CONFIG, WEIGHTS, RUN, CARD, PLOT):
        for leftover in output.glob(f".{name}-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if not resume:
            (output / name).unlink(missing_ok=True)
    with replacing(output / RUN) as file:
        file.write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")


def list_skipped(output: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """Write what could not be used, a JSON object a line.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(output / SKIPPED) as file:
        rows = (json.dumps({"source": source, "reason": reason}) for source, reason in skipped)
        file.write_text("".join(row + "\n" for row in rows), encoding="ascii")


def describe_target(model: Model) -> dict[str, object]:
    """Return what is told about a target: name, family, revision on the hub, and hash.

    The hash is the SHA-256 of the checkpoint's configuration and weights.
    """
    path = model.loaded.path
    digest = hashlib.sha256()
    for file in sorted([path / CONFIG, *path.glob("*.safetensors")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    on_hub = path.parent.name == "snapshots" and not Path(model.name).is_dir()
    return {
        "name": model.name,
        "model_type": model.loaded.model_type,
        "revision": path.name if on_hub else None,
        "sha256": digest.hexdigest(),
        "on_hub": on_hub,
    }
