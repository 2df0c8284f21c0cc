"""Operations that have a Metal kernel besides their definition in MLX's operations.

Each file is one of them: the formula, the Metal text, `x` (what callers use: it chooses), `x_ops`
(the definition) and `x_kernel` (the launch). `dispatch` says when a kernel is used.
"""

from flash_mlx.kernels.accept_tree import ACCEPT_TREE, accept_tree
from flash_mlx.kernels.latent_pool import LATENT_POOL, latent_pool
from flash_mlx.kernels.lmhead_topk import LMHEAD_TOPK, lmhead_topk
from flash_mlx.kernels.slot_attention import SLOT_ATTENTION, slot_attention
from flash_mlx.kernels.tree_attention import TREE_ATTENTION, ancestor_bits, tree_attention
from flash_mlx.kernels.verify_qmm import VERIFY_QMM, verify_qmm

KERNELS = (VERIFY_QMM, LMHEAD_TOPK, TREE_ATTENTION, SLOT_ATTENTION, LATENT_POOL, ACCEPT_TREE)

__all__ = [
    "KERNELS",
    "accept_tree",
    "ancestor_bits",
    "latent_pool",
    "lmhead_topk",
    "slot_attention",
    "tree_attention",
    "verify_qmm",
]
