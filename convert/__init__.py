"""Hugging Face weights to MLX.

This folder stands at the top of the tree and is installed as `flash_mlx.convert`.
"""

from flash_mlx.convert.target import convert_target

__all__ = ["convert_target"]
