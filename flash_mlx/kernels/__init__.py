"""Operations that have a Metal kernel besides their definition in MLX's operations.

Each file is one of them: the formula, the Metal text, `x` (what callers use: it chooses), `x_ops`
(the definition) and `x_kernel` (the launch). `dispatch` says when a kernel is used.
"""

from flash_mlx.kernels.latent_pool import latent_pool

__all__ = ["latent_pool"]
