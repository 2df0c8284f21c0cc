"""Where other programs meet flash-mlx."""
