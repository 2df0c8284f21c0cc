"""What drafts.

FLASH: what it is (`config`, `model`), where rows go (`layout`), how it drafts (`drafter`). And
`ngram`, which needs no model.
"""

from flash_mlx.draft.config import FlashConfig
from flash_mlx.draft.drafter import FlashDrafter, FlashState
from flash_mlx.draft.layout import Layout
from flash_mlx.draft.model import FlashModel
from flash_mlx.draft.ngram import NgramDrafter, NgramRule, NgramState

__all__ = [
    "FlashConfig",
    "FlashDrafter",
    "FlashModel",
    "FlashState",
    "Layout",
    "NgramDrafter",
    "NgramRule",
    "NgramState",
]
