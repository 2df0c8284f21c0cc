"""Weights laid out for products with few rows on a CPU.

A linear layer computes `x @ W.T` with W [out, in] stored row by row. For the few rows of a decode
pass, OpenBLAS reads such a W up to twice as slowly as its transpose, unless W is wider than tall.
So the transpose is stored, behind a view of the same shape: nothing else changes, and the products
are the same bit for bit.

Measured with OpenBLAS on x86, float32, one thread, 1 to 8 rows: 1024 x 384 takes 0.5 to 0.6 of the
time, 384 x 384 0.7, 2048 x 2048 0.8, but 384 x 1024 1.1; a 12-layer model's pass 0.8.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def lay_out_for_few_rows(model: nn.Module) -> None:
    """On a CPU, store the float32 weights of a model's linear layers as their transposes; lazy.

    For inference only. Elsewhere nothing happens. Shapes, values and names of the parameters stay.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == mx.float32:
            num_outputs, num_inputs = module.weight.shape
            if num_outputs >= num_inputs:
                module.weight = mx.contiguous(module.weight.T).T


def join_layers(*layers: nn.Linear | nn.QuantizedLinear) -> nn.Linear | nn.QuantizedLinear:
    """Return linear layers that read the same rows as one, its outputs side by side.

    Layers that are quantised stay so: each row of weights has its own scales.

    Raises:
        ValueError: If some are quantised and others are not.
    """
    if len({type(layer) for layer in layers}) > 1:
        raise ValueError(
            "Layers that read the same rows must all be quantised, or none; some are. Convert the "
            "drafter again."
        )
    first, bias = layers[0], "bias" in layers[0]
    joined: nn.Linear | nn.QuantizedLinear = nn.Linear(1, 1, bias=bias)
    if isinstance(first, nn.QuantizedLinear):
        joined = nn.QuantizedLinear(first.group_size, 1, bias, first.group_size, first.bits)
        joined.scales = mx.concatenate([layer.scales for layer in layers])
        joined.biases = mx.concatenate([layer["biases"] for layer in layers])
    joined.weight = mx.concatenate([layer.weight for layer in layers])
    if "bias" in joined:
        joined.bias = mx.concatenate([layer.bias for layer in layers])
    lay_out_for_few_rows(joined)
    return joined
