"""What drafts.

FLASH: what it is (`config`, `model`), where rows go (`layout`), how it drafts (`drafter`). `ngram`
needs no model. `adaptive` drafts with both as much as pays, by costs that `calibrate` measures.
"""

from flash_mlx.draft.adaptive import AdaptiveDrafter, AdaptiveState
from flash_mlx.draft.calibrate import Calibrator
from flash_mlx.draft.config import FlashConfig
from flash_mlx.draft.drafter import FlashDrafter, FlashState
from flash_mlx.draft.layout import Layout
from flash_mlx.draft.model import FlashModel
from flash_mlx.draft.ngram import NgramDrafter, NgramRule, NgramState

__all__ = [
    "AdaptiveDrafter",
    "AdaptiveState",
    "Calibrator",
    "FlashConfig",
    "FlashDrafter",
    "FlashModel",
    "FlashState",
    "Layout",
    "NgramDrafter",
    "NgramRule",
    "NgramState",
]
