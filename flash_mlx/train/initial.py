"""Where a drafter starts: nowhere, or at something that the target knows already.

`random` draws all weights. `last-layer` copies the target's last decoder layer into the drafter's
block: its attention (key and value heads repeated where several query heads share one), its MLP and
its norms. `embeddings` lets the fusion pass the next token's embedding on, and takes embeddings of
random tokens as the queries that pool a picture.

Shapes:
    D: hidden size.    H, G: query heads, key and value heads.    Dh: width of a head.
    F: width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_mlx.draft import FlashConfig, FlashModel
from flash_mlx.draft.vocabulary import frequent_ids
from flash_mlx.targets import LoadedTarget
from flash_mlx.targets.weights import plain_weight

Start = Literal["random", "last-layer", "embeddings"]
STARTS: tuple[Start, ...] = ("random", "last-layer", "embeddings")
BEST_START: Start = "embeddings"  # 8% ahead of random, last-layer 29% behind (docs/ablations.md)
HEAD_DIM = 64  # where the target's own is not taken
BLOCK_SIZE = 10
WIDEST = 1024  # recurrence of a new drafter
LIKE_ONE = 1.2785  # SiLU of this is 1


def drafter_config(loaded: LoadedTarget, start: Start, changes: Mapping[str, Any]) -> FlashConfig:
    """Return the sizes of a new drafter for a target.

    Args:
        loaded: The target.
        start: `last-layer` takes the sizes of that layer.
        changes: Settings of `FlashConfig` that differ.

    Raises:
        ValueError: If a setting is unknown, out of its range, or does not fit the start.
    """
    own = _last_layer_sizes(loaded) if start == "last-layer" else {}
    target = loaded.target
    return default_config(target.hidden_size, target.vocab_size, own | dict(changes))


def default_config(hidden_size: int, vocab_size: int, changes: Mapping[str, Any]) -> FlashConfig:
    """Return the sizes of a new drafter for a target of D and V, but for the changes.

    Raises:
        ValueError: If a setting is unknown or out of its range.
    """
    settings: dict[str, Any] = {
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "block_size": BLOCK_SIZE,
        "num_latents": 16,
        "head_dim": HEAD_DIM,
        "num_heads": max(1, hidden_size // HEAD_DIM),
        "norm_inputs": True,
        "recurrent_size": min(max(32, 2 * hidden_size // 3), WIDEST),
    }
    if changes.get("hydra_size"):
        settings["recurrent_size"] = 0
    return FlashConfig.from_dict(settings | dict(changes))


def new_model(loaded: LoadedTarget, config: FlashConfig, start: Start, seed: int) -> FlashModel:
    """Return a drafter with its initial weights.

    Args:
        loaded: The target.
        config: From `drafter_config`.
        start: Where to start.
        seed: Of the weights that are drawn.

    Raises:
        ValueError: If the target's last layer does not have the drafter's sizes.
    """
    mx.random.seed(seed)
    model = FlashModel(config)
    if start == "last-layer":
        _copy_last_layer(loaded, model)
    elif start == "embeddings":
        _pass_embeddings(loaded, model, seed)
    mx.eval(model.parameters())
    return model


def propose_frequent(
    model: FlashModel, answers: Iterable[Sequence[int]], stop_ids: Iterable[int]
) -> float:
    """Let a new drafter with `draft_vocab_size` propose the answers' most frequent tokens.

    Args:
        model: Changed in place; one that proposes all tokens stays as it is.
        answers: Ids of the target's answers.
        stop_ids: Ids that end one; they are proposed in any case.

    Returns:
        Share of the answers' tokens that it can propose.
    """
    if not model.config.draft_vocab_size:
        return 1.0
    said = np.fromiter(chain.from_iterable(answers), np.int64)
    counts = np.bincount(said, minlength=model.config.vocab_size)
    model.draft_ids = frequent_ids(counts, model.config.draft_vocab_size, stop_ids)
    return float(counts[np.array(model.draft_ids)].sum() / max(1, counts.sum()))


def _last_layer(loaded: LoadedTarget) -> Any:
    return loaded.target.model.language_model.model.layers[-1]


def _last_layer_sizes(loaded: LoadedTarget) -> dict[str, int]:
    text = loaded.target.model.config.text_config
    heads = int(text.num_attention_heads)
    width = _dense(_last_layer(loaded).self_attn.q_proj).shape[0]
    return {
        "num_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": int(text.intermediate_size),
    }


def _copy_last_layer(loaded: LoadedTarget, model: FlashModel) -> None:
    layer, block, config = _last_layer(loaded), model.layers, model.config
    sources: dict[str, Any] = {
        name: getattr(owner, name)
        for owner, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (layer.mlp, ("gate_proj", "up_proj", "down_proj")),
        )
        for name in names
    }
    for name, source in sources.items():
        into = getattr(block, name)
        weight, bias = _dense(source), source.get("bias")
        if name in ("k_proj", "v_proj"):
            num_rows = into.weight.shape[0]
            weight = _repeat(weight, config, num_rows)
            bias = None if bias is None else _repeat(bias, config, num_rows)
        if weight.shape != into.weight.shape:
            raise ValueError(
                f"To start from the target's last layer, a drafter must have its sizes; its "
                f"{name} is {weight.shape}, the drafter's {into.weight.shape}. Leave num_heads, "
                "head_dim and intermediate_size alone."
            )
        into.weight = weight
        if "bias" in into:
            into.bias = mx.zeros(weight.shape[:1]) if bias is None else bias.astype(mx.float32)
    block.input_layernorm.weight = layer.input_layernorm.weight.astype(mx.float32)
    block.post_attn_layernorm.weight = layer.post_attention_layernorm.weight.astype(mx.float32)


def _repeat(rows: mx.array, config: FlashConfig, num_rows: int) -> mx.array:
    """[G * Dh, ...] -> [H * Dh, ...]: each head as often as query heads share it."""
    heads = rows.reshape(-1, config.head_dim, *rows.shape[1:])
    times = num_rows // rows.shape[0]
    return mx.repeat(heads, times, axis=0).reshape(num_rows, *rows.shape[1:])


def _pass_embeddings(loaded: LoadedTarget, model: FlashModel, seed: int) -> None:
    config = model.config
    size, bias = config.hidden_size, config.fusion_bias
    identity = mx.concatenate([mx.eye(size), mx.zeros((size, size))], axis=1)
    model.fc_up.weight = identity + 0.1 * model.fc_up.weight
    if config.fusion == "gated":
        model.fc_gate.weight = 0.1 * model.fc_gate.weight
    if config.fusion == "gated" and bias:
        model.fc_gate.bias = mx.full((size,), LIKE_ONE)
    if not config.learns_queries:
        return
    key = mx.random.key(seed)
    ids = mx.random.randint(0, config.vocab_size, (config.num_latents,), key=key)
    model.A = loaded.target.embed(ids).astype(mx.float32)


def _dense(layer: nn.Module) -> mx.array:
    """Return a linear layer's weight [out, in] in float32, dequantised if need be."""
    if isinstance(layer, nn.QuantizedLinear):
        return plain_weight(layer)
    return mx.array(layer.weight).astype(mx.float32)
