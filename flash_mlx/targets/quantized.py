"""Quantised layers that read their weights once for all rows of a verification.

On Metal, `nn.QuantizedLinear` with 2 to 16 rows becomes `verify_qmm`, where that is right and
faster on this machine. One row and prompts stay MLX's own.

Shapes:
    K: inputs.    N: outputs.    ...: any leading axes.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.kernels import metal, verify_qmm
from flash_mlx.kernels.few_rows import MAX_ROWS


class FewRowsLinear(nn.QuantizedLinear):
    """A quantised layer; the class of instances that `use_few_rows` found."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return [..., N] of x [..., K]."""
        rows, biases = x.size // x.shape[-1], self.biases
        if biases is None or not 2 <= rows <= MAX_ROWS:
            outputs: mx.array = super().__call__(x)
            return outputs
        flat = x.reshape(rows, -1)
        y = verify_qmm(flat, self.weight, self.scales, biases, self.group_size, self.bits)
        y = y.reshape(*x.shape[:-1], -1)
        return y + self.bias if "bias" in self else y


def use_few_rows(model: nn.Module) -> None:
    """On Metal, give quantised layers the class above; weights and names stay.

    Not the LM head: a drafter's training takes gradients through it, and the kernel has none.
    """
    if not metal.available():
        return
    for name, module in model.named_modules():
        if (
            name.rpartition(".")[2] != "lm_head"
            and type(module) is nn.QuantizedLinear
            and module.mode == "affine"
        ):
            module.__class__ = FewRowsLinear
