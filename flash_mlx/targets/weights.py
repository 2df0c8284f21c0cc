"""A target's weights: numbers that can be computed with, and quantised ones made plain."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def check_numbers(model: nn.Module) -> None:
    """See that all weights are finite numbers of a floating type, or packed by MLX.

    Raises:
        ValueError: If some are not.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    packed = {name.removesuffix("scales") + "weight" for name in weights if name.endswith("scales")}
    whole = [
        name
        for name, value in weights.items()
        if not mx.issubdtype(value.dtype, mx.floating) and name not in packed
    ]
    if whole:
        raise ValueError(
            f"Weights must be floating-point numbers; {whole[0]} is {weights[whole[0]].dtype}. "
            "Convert the original checkpoint again."
        )
    finite = {name: mx.isfinite(value).all() for name, value in weights.items()}
    mx.eval(finite)
    if broken := [name for name, good in finite.items() if not good.item()]:
        raise ValueError(
            f"Weights must be finite numbers; NaN or infinity is in {len(broken)} of them, "
            f"{broken[0]} first. Copy or download the checkpoint again."
        )


def num_bytes(model: nn.Module) -> int:
    """Return what a model's weights take [bytes]."""
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return sum(value.nbytes for value in weights.values())


def dequantize(model: nn.Module, start: tuple[str, ...] = ("",)) -> None:
    """Replace quantised layers by plain float32 ones that compute the same; lazy.

    Args:
        model: The model.
        start: What the names of the layers to replace begin with; by default all are replaced.

    Raises:
        ValueError: If a layer is quantised in a way that is not MLX's own.
    """
    plain: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not name.startswith(start):
            continue
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
