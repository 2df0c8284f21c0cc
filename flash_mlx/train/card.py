"""The model card of a trained drafter: Markdown that the hub shows, made from the run's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flash_mlx.draft.settings import Settings
from flash_mlx.files import replacing
from flash_mlx.train.config import TrainConfig
from flash_mlx.train.folder import CARD, PLOT


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        target: Name, revision, hash and family of the target.
        data: What it was trained on, in words and numbers.
        config: How it was trained.
        tokens_per_second: Tokens that it learned from per second of training, the median.
        target_share: Share of that time that the target's passes took.
        drafter: Its sizes.
        start: Where its weights began.
        best: The best mean acceptance length on held-out questions; None if not measured.
        bench: Rows of `bench.run` on held-out questions; empty if not measured.
        machine: Where that was measured.
    """

    target: Mapping[str, Any]
    data: Mapping[str, Any]
    config: TrainConfig
    tokens_per_second: float
    target_share: float
    drafter: Settings
    start: str
    best: float | None
    bench: Sequence[Mapping[str, Any]]
    machine: str


def write_card(facts: Facts, output: Path) -> None:
    """Write the card into the drafter's folder.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(output / CARD) as file:
        file.write_text(_text(facts, has_plot=(output / PLOT).is_file()), encoding="utf-8")


def _text(facts: Facts, *, has_plot: bool) -> str:
    name = str(facts.target["name"])
    # JSON strings are YAML strings: a name cannot add lines of its own.
    header = ["---", "library_name: flash-mlx", "tags: [mlx, speculative-decoding, flash-mlx]"]
    if facts.target.get("on_hub"):
        header.append(f"base_model: {json.dumps(name)}")
    header.append("---")
    parts = [
        "\n".join(header),
        f"# A drafter for {_plain(name)}",
        "With it, flash-mlx needs fewer passes of the target for the same text. The text is the "
        "target's own, whatever the drafter does.",
        f"```sh\nflash-mlx generate --model {_plain(name)} --draft-model FOLDER --image a.png\n```",
        "## Measured",
        _measured(facts),
    ]
    if has_plot:
        parts.append(f"![Loss and acceptance by training step]({PLOT})")
    parts += [
        "## Target",
        _table({key: value for key, value in facts.target.items() if key != "on_hub"}),
        "## Data",
        _table(facts.data),
        "## Settings",
        f"Initial weights: {_plain(facts.start)}. Training ran at {facts.tokens_per_second:.0f} "
        f"tokens per second; the target took {facts.target_share:.0%} of the time.",
        _code({"training": asdict(facts.config), "drafter": facts.drafter.to_dict()}),
        "The files `training.safetensors`, `answers.jsonl`, `skipped.jsonl`, `run.json` and "
        "`metrics.jsonl` are of the run, not of the drafter; an upload does not need them.",
    ]
    return "\n\n".join(parts) + "\n"


def _measured(facts: Facts) -> str:
    lines = []
    if facts.best is not None:
        lines.append(
            f"Mean acceptance length on questions that were held out, greedy: "
            f"**{facts.best:.2f}** tokens a pass of the target (plain decoding has 1)."
        )
    rows = [row for row in facts.bench if row.get("error") is None]
    if rows:
        lines.append(
            f"Against plain decoding on the same questions, interleaved ({_plain(facts.machine)}):"
        )
        table = ["| drafter | temperature | tokens a pass | speed-up (95%) | same text |"]
        table.append("| --- | --- | --- | --- | --- |")
        table += [
            f"| {_plain(str(row['drafter']))} | {row['temperature']:g} | "
            f"{row['mean_acceptance_length']:.2f} | {row['speedup']:.2f}x "
            f"({row['speedup_low']:.2f} - {row['speedup_high']:.2f}) | {row['identical']:.2f} |"
            for row in rows
        ]
        lines.append("\n".join(table))
    return "\n\n".join(lines) or "Nothing was measured."


def _table(values: Mapping[str, Any]) -> str:
    lines = [f"| {_plain(str(key))} | {_plain(str(value))} |" for key, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _code(values: Mapping[str, Any]) -> str:
    return f"```json\n{json.dumps(values, indent=2)}\n```"


def _plain(text: str) -> str:
    """Return text that is neither markup nor more than a line."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
