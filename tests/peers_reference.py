"""Outputs of the published drafters' own modules on tiny random weights, and how to compare trees.

The file is test data of third parties, beside a checkout where they lie; without it tests skip.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from flash_mlx.draft.decoder import DecoderConfig, Past
from flash_mlx.draft.eagle import EagleModel
from flash_mlx.draft.eagle3 import Eagle3Model
from flash_mlx.draft.kinds import KINDS
from flash_mlx.draft.msd import MsdModel
from flash_mlx.draft.one_layer import OneLayerModel
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.draft.vispec import ViSpecModel
from flash_mlx.targets import LoadedTarget
from flash_mlx.tree import DraftTree

FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "peers_golden.npz"
MODELS: dict[str, type[OneLayerModel]] = {
    "eagle1": EagleModel,
    "eagle3": Eagle3Model,
    "msd": MsdModel,
    "msdq": MsdModel,
    "vispec": ViSpecModel,
}
Arrays = dict[str, np.ndarray]
SMALL = {"hidden_size": 16, "vocab_size": 11, "intermediate_size": 24, "block_size": 3}
SMALL |= {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}


def golden(kind: str) -> tuple[OneLayerModel, Arrays, Arrays]:
    """Return our model with the golden weights, the other golden arrays, and all the weights."""
    if not FILE.is_file():
        pytest.skip(f"needs {FILE.name}, test data that is not part of the project")
    with np.load(FILE) as file:
        names = [name for name in file.files if name.startswith(f"{kind}/")]
        found = {name.split("/", 1)[1]: file[name] for name in names}
    weights = {name[2:]: value for name, value in found.items() if name.startswith("w:")}
    heads, kv_heads, base, eps, *tree = found["cfg"].tolist()
    size = weights["fc.weight"].shape[0]
    gate = next(value for name, value in weights.items() if "gate_proj" in name)
    config = DecoderConfig(
        hidden_size=size,
        vocab_size=97,
        intermediate_size=gate.shape[0],
        num_heads=int(heads),
        num_kv_heads=int(kv_heads),
        head_dim=size // int(heads),
        rms_norm_eps=eps,
        rope_base=base,
        attention_bias="layers.0.self_attn.q_proj.bias" in weights,
        fusion_bias="fc.bias" in weights,
        input_norm="layers.0.input_layernorm.weight" in weights,
        num_queries=len(weights["imadpt.q"]) if kind == "vispec" else 0,
        draft_vocab_size=len(weights["d2t"]) if kind == "eagle3" else 0,
        **_tree_settings(tree),
    )
    model = MODELS[kind](config)
    ours = {
        name: value.astype(np.int32) if name == "d2t" else value
        for name, value in weights.items()
        if name not in ("embed_tokens.weight", "t2d")
    }
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in ours.items()]))
    return model, {k: v for k, v in found.items() if not k.startswith("w:")}, weights


def _tree_settings(tree: list[float]) -> dict[str, int]:
    """From the authors' count of rows, root included, and of steps after the first level."""
    if not tree:
        return {}
    rows, steps, top_k = map(int, tree)
    return {"num_nodes": rows - 1, "block_size": steps + 1, "top_k": top_k}


def paths(tokens: list[int], mask: np.ndarray) -> set[tuple[int, ...]]:
    """Return the tokens on the way to each node: a tree, whatever the order of its rows.

    Args:
        tokens: [N] ids, the root's first.
        mask: [N, N] bool, True at ancestors and itself.
    """
    depth = mask.sum(axis=1)
    return {
        tuple(tokens[row] for row in sorted(np.flatnonzero(mask[node]), key=lambda r: depth[r]))
        for node in range(1, len(tokens))
    }


def paths_of(tree: DraftTree) -> set[tuple[int, ...]]:
    return paths(tree.tokens.tolist(), tree.topology.mask)


def kept(past: Past) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys and values of the rows read, [K, S, Dh] each."""
    return tuple(np.array(each[0, :, : past.length]) for each in (past.keys, past.values))


SIZE, VOCAB = 64, 400
BASE = DecoderConfig(
    hidden_size=SIZE,
    vocab_size=VOCAB,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    block_size=3,
)
CONFIGS = {
    "eagle": BASE,
    "eagle3": replace(BASE, draft_vocab_size=100, fusion_bias=False),
    "msd": replace(BASE, input_norm=True, attention_bias=True),
    "vispec": replace(BASE, num_kv_heads=4, num_queries=3),
}


def random_model(kind: str, config: DecoderConfig | None = None, seed: int = 0) -> OneLayerModel:
    """A model whose every weight matters: none is 0 or 1."""
    rng = np.random.default_rng(seed)
    model = KINDS[kind].model(CONFIGS[kind] if config is None else config)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        if name == "d2t":
            weight = 3 * np.arange(len(value))  # draft id i is the target's id 4 i
        else:
            weight = rng.normal(0, value.shape[-1] ** -0.5, value.shape) + ("norm" in name)
        weights.append((name, mx.array(weight.astype(np.int32 if name == "d2t" else np.float32))))
    model.update(tree_unflatten(weights))
    return model


def network(kind: str, **changes: Any) -> OneLayerModel:
    """A random model for `toy.WideToy`."""
    more = {"num_queries": 3} if kind == "vispec" else {}
    return random_model(kind, DecoderConfig(**SMALL | more | changes))


def drafter_for(kind: str, loaded: LoadedTarget, **changes: int) -> StepwiseDrafter:
    """A drafter with random weights that fits a target."""
    target = loaded.target
    model = random_model(kind, replace(CONFIGS[kind], vocab_size=target.vocab_size, **changes))
    return StepwiseDrafter(model, target.embed, target.lm_head, target.vocab_size)
