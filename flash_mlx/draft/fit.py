"""Does a drafter fit a target? Asked before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flash_mlx.decode import Target
from flash_mlx.draft.config import FlashConfig
from flash_mlx.draft.decoder import DecoderConfig

PADDING = 1024  # rows by which targets pad their vocabulary, at most


@dataclass(frozen=True)
class TargetFacts:
    """What is known of a target besides its protocol; None: not known, not checked.

    Attributes:
        model_type: Its family.
        rope_base: Base of its rotary frequencies.
        num_layers: Decoder layers.
        trees: Whether it takes trees.
    """

    model_type: str | None = None
    rope_base: float | None = None
    num_layers: int | None = None
    trees: bool = True


def check_notes(path: Path, note: object, facts: TargetFacts) -> None:
    """Require the target to be the one that the drafter's notes tell of, as far as both are known.

    A drafter reads what its target computes, so one of another depth or with other rotations is
    another target, even if the sizes agree.

    Args:
        path: The drafter's folder.
        note: The entry `target` of its `config.json`.
        facts: Of the target.

    Raises:
        ValueError: If they differ; the message names both.
    """
    told = note if isinstance(note, Mapping) else {}
    for name, words, theirs in (
        ("model_type", "model type", facts.model_type),
        ("rope_base", "RoPE base", facts.rope_base),
        ("num_layers", "number of decoder layers", facts.num_layers),
    ):
        ours = told.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"A drafter must be made for its target: the drafter in {path} is for the {words} "
                f"{ours!r}, this target's is {theirs!r}. Use the drafter of this target."
            )


def check_sizes(path: Path, config: FlashConfig | DecoderConfig, target: Target) -> None:
    """Require the sizes that drafter and target share to be the same.

    Args:
        path: The drafter's folder.
        config: The drafter's settings.
        target: The target.

    Raises:
        ValueError: If they differ; the message names both.
    """
    ours = config.hidden_size
    least = target.vocab_size
    if isinstance(config, DecoderConfig):
        ours = config.feature_size or ours
        least -= PADDING  # a target may pad its vocabulary; drafts stay inside the common part
    fits = (
        ("hidden size", ours, target.hidden_size, ours == target.hidden_size),
        (
            "vocabulary",
            config.vocab_size,
            target.vocab_size,
            least <= config.vocab_size <= target.vocab_size,
        ),
    )
    for name, wanted, found, fit in fits:
        if not fit:
            raise ValueError(
                f"A drafter must be made for its target: the drafter in {path} expects a {name} "
                f"of {wanted}, this target's is {found}. Use the drafter of this target."
            )
