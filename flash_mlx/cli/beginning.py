"""Where `flash-mlx train` begins: a new drafter, or one that is there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from flash_mlx.checkpoint import load_network, read_settings, resolve_path
from flash_mlx.draft.config import FlashConfig
from flash_mlx.draft.decoder import DecoderConfig
from flash_mlx.draft.kinds import DraftModel
from flash_mlx.hub import HUB_FILES
from flash_mlx.loading import DEMO, Model, load
from flash_mlx.train import TrainConfig
from flash_mlx.train.config import PRESET_OF
from flash_mlx.train.initial import BEST_START, Start, drafter_config, new_model


@dataclass(frozen=True)
class Origin:
    """A drafter to go on with.

    Attributes:
        name: As it was asked for.
        folder: Where it lies.
        kind: One of `PRESET_OF`.
        config: Its settings.
    """

    name: str
    folder: Path
    kind: str
    config: FlashConfig | DecoderConfig


def origin(options: Mapping[str, Any]) -> Origin | None:
    """Return what --init-from names; None: a new drafter is wanted.

    Raises:
        OSError: There is no such drafter.
        ValueError: It is of a kind that cannot be trained.
    """
    name = options["init_from"]
    if not name:
        return None
    only = ("config.json",) if options["plan"] else HUB_FILES
    folder = DEMO / "drafter" if name == "demo" else resolve_path(name, only=only)
    kind, config = read_settings(folder)
    if kind not in PRESET_OF:
        raise ValueError(
            f"Drafters that can be trained are {', '.join(PRESET_OF)}; {name} is {kind}, whose "
            "outputs stand for no states of the target that could teach them. Begin with another."
        )
    return Origin(name, folder, kind, config)


def start_of(
    options: Mapping[str, Any],
    begin: Origin | None,
    config: TrainConfig,
    sizes: Mapping[str, Any],
) -> tuple[Model, DraftModel]:
    """Return the target with what drafts its answers, and the drafter to train.

    Args:
        options: Of the command.
        begin: From `origin`.
        config: How to train.
        sizes: Settings of a new drafter that were chosen.

    Raises:
        UsageError: These do not fit.
        OSError: A file is missing.
        ValueError: Target or drafter are damaged, or do not fit.
    """
    if begin is not None:
        model = load(options["model"], begin.folder, revision=options["revision"])
        return model, load_network(begin.folder)[0]
    start: Start = options["start"] or BEST_START
    model = load(options["model"], "auto", revision=options["revision"])
    try:
        shape = drafter_config(model.loaded, start, sizes)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return model, new_model(model.loaded, shape, start, config.seed)
