"""Drafters as their authors would publish them, with random weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from flash_reference import SMALL
from flash_reference import random_model as random_flash
from peers_reference import CONFIGS, random_model

EXTRA = {"layers.0.self_attn.rotary_emb.inv_freq": mx.ones(8)}


def publish(folder: Path, kind: str, table: mx.array | None = None, **settings: Any) -> Path:
    """Write a drafter as its authors would."""
    folder.mkdir()
    if kind == "flash":
        config = replace(SMALL, hidden_size=64, vocab_size=400, hydra_size=8, fuse_pre_image=False)
        model = random_flash(config)
        told = {"k": 3, "sar_num_heads": 2, "sar_head_dim": 6, "vocab_size": 400}
        extra = {"layers.rotary_emb.inv_freq": mx.ones(3)}
    else:
        config, model, extra = CONFIGS[kind], random_model(kind), dict(EXTRA)
        told = {
            "num_attention_heads": config.num_heads,
            "vocab_size": config.vocab_size,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_base,
        }
    tensors = dict(tree_flatten(model.parameters())) | extra
    if kind == "eagle3":
        tensors["d2t"] = tensors["d2t"].astype(mx.int64)
        tensors["t2d"] = mx.ones(400, dtype=mx.bool_)
    if table is not None:
        tensors["embed_tokens.weight"] = table
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps(told | settings))
    return folder


def table_of(target: Path) -> mx.array:
    tensors = mx.load(str(target / "model.safetensors"))
    return next(value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
