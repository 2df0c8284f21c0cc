"""Quantised weights made plain, for backends where quantised products are slow."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


def dequantize(model: nn.Module) -> None:
    """Replace quantised layers by plain float32 ones that compute the same; lazy.

    Raises:
        ValueError: If a layer is quantised in a way that is not MLX's own.
    """
    plain: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            linear = nn.Linear(1, 1, bias="bias" in module)
            linear.weight = plain_weight(module)
            if "bias" in module:
                linear.bias = module.bias
            plain.append((name, linear))
        elif isinstance(module, nn.QuantizedEmbedding):
            embedding = nn.Embedding(1, 1)
            embedding.weight = plain_weight(module)
            plain.append((name, embedding))
        elif "scales" in module:
            raise ValueError(
                f"Quantised layers must be MLX's own to be computed in float32 on a CPU; {name} is "
                f"a {type(module).__name__}. Convert the checkpoint without quantisation."
            )
    if plain:
        model.update_modules(tree_unflatten(plain))


def plain_weight(layer: nn.QuantizedLinear | nn.QuantizedEmbedding) -> mx.array:
    """Return the weight of a quantised layer, in float32."""
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )
