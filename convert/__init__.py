"""Hugging Face weights to MLX: targets, and published drafters.

This folder stands at the top of the tree and is installed as `flash_mlx.convert`.
"""

from flash_mlx.convert.drafter import convert_drafter, is_drafter
from flash_mlx.convert.target import convert_target

__all__ = ["convert_drafter", "convert_target", "is_drafter"]
