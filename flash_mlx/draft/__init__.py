"""The FLASH drafter: what it is (`config`, `model`), where rows go (`layout`), how it drafts."""

from flash_mlx.draft.config import FlashConfig
from flash_mlx.draft.drafter import FlashDrafter, FlashState
from flash_mlx.draft.layout import Layout
from flash_mlx.draft.model import FlashModel

__all__ = ["FlashConfig", "FlashDrafter", "FlashModel", "FlashState", "Layout"]
