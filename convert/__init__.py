"""Hugging Face weights to MLX; installed as `flash_mlx.convert`."""
