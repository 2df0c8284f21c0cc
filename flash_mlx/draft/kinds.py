"""The kinds of drafters with weights: the `draft_kind` of their `config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from flash_mlx.draft.config import FlashConfig
from flash_mlx.draft.decoder import DecoderConfig
from flash_mlx.draft.eagle import EagleModel
from flash_mlx.draft.eagle3 import Eagle3Model
from flash_mlx.draft.model import FlashModel
from flash_mlx.draft.msd import MsdModel
from flash_mlx.draft.one_layer import OneLayerModel
from flash_mlx.draft.vispec import ViSpecModel

DraftModel = FlashModel | OneLayerModel


@dataclass(frozen=True)
class Kind:
    """A kind's settings and its weights."""

    config: type[FlashConfig] | type[DecoderConfig]
    model: type[DraftModel]


KINDS: dict[str, Kind] = {
    "flash": Kind(FlashConfig, FlashModel),
    "eagle": Kind(DecoderConfig, EagleModel),
    "eagle3": Kind(DecoderConfig, Eagle3Model),
    "msd": Kind(DecoderConfig, MsdModel),
    "vispec": Kind(DecoderConfig, ViSpecModel),
}


def kind_of(model: DraftModel) -> str:
    """Return the kind of a drafter's weights."""
    return next(name for name, kind in KINDS.items() if type(model) is kind.model)
