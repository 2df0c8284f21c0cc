"""Quantised layers that read their weights once for all rows of a verification.

On Metal, `nn.QuantizedLinear` with 2 to 16 rows becomes `verify_qmm`, where that is right and
faster on this machine; mlx-vlm's kernel for verification, whose rows have the bits of single ones,
competes with it. One row and prompts stay MLX's own.

Shapes:
    m: rows.    K: inputs.    N: outputs.    ...: any leading axes.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn

from flash_mlx import kernels
from flash_mlx.kernels import metal
from flash_mlx.kernels.dispatch import Rival, run
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
        y = few_rows(flat, self.weight, self.scales, biases, self.group_size, self.bits)
        y = y.reshape(*x.shape[:-1], -1)
        return y + self.bias if "bias" in self else y


def few_rows(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """Return x W^T as `kernels.verify_qmm` does, with mlx-vlm's kernel among the forms.

    Args:
        x: [m, K].
        weight: [N, K * bits / 32], packed by MLX.
        scales: [N, K / group_size].
        biases: [N, K / group_size].
        group_size: Weights that share a scale.
        bits: Of a weight.
    """
    return run(FEW_ROWS, x, weight, scales, biases, group_size, bits)[0]


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


def _exactly(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> tuple[mx.array]:
    """Launch mlx-vlm's kernel.

    Raises:
        ValueError: If it does not take the arguments.
    """
    from mlx_vlm.models.quantized_verifier import optimized_affine_linear

    layer = _layer(weight, scales, biases, group_size, bits)
    found = optimized_affine_linear(layer, x[None])
    if found is None:
        raise ValueError("mlx-vlm's kernel for verification does not take these arguments.")
    return (found[0],)


def _exactly_fits(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> bool:
    from mlx_vlm.models.quantized_verifier import supports_optimized_affine_head

    if x.ndim != 2 or not 2 <= x.shape[0] <= MAX_ROWS or x.dtype != scales.dtype:
        return False
    return bool(supports_optimized_affine_head(_layer(weight, scales, biases, group_size, bits)))


def _layer(
    weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> nn.QuantizedLinear:
    """Return packed weights as the layer that mlx-vlm asks for, made without initial weights."""
    layer = nn.QuantizedLinear.__new__(nn.QuantizedLinear)
    nn.Module.__init__(layer)
    layer.weight, layer.scales, layer.biases = weight, scales, biases
    layer.group_size, layer.bits, layer.mode = group_size, bits, "affine"
    return layer


EXACT = Rival(
    "mlx-vlm's exact kernel", version("mlx-vlm"), _exactly, metal.available, _exactly_fits
)
FEW_ROWS = replace(kernels.VERIFY_QMM, rivals=(*kernels.VERIFY_QMM.rivals, EXACT))
KERNELS = tuple(FEW_ROWS if each is kernels.VERIFY_QMM else each for each in kernels.KERNELS)
