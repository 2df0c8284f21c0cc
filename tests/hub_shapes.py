"""Shapes of published checkpoints' tensors, by their names and `config.json` alone.

Written from the architectures' papers and configurations, not from any loader; the sum of all is
held against the number of bytes that each index states.

Shapes:
    D: hidden size.    F: inner size of the MLP.    E: head size.    V: vocabulary.
    W, G: the vision tower's D and F.
"""

import re
from collections.abc import Mapping
from typing import Any

LLAMA_7B = {  # what LLaVA's configuration leaves to Llama's defaults
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
BITS_OF_A_WORD = 32


def shape_of(name: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return a tensor's shape; `StopIteration` where no rule fits."""
    short = re.sub(r"(?<!merger\.mlp)\.\d+\.", ".N.", name)
    vision = short.startswith(("visual.", "model.visual.", "vision_tower."))
    rules = _vision(config) if vision else {**_projector(config), **_text(config)}
    return next(shape for end, shape in rules.items() if short.endswith(end))


def packed(
    shape: tuple[int, ...], part: str, settings: Mapping[str, Any]
) -> tuple[tuple[int, ...], int]:
    """Return the shape and the bytes of an item of a part of an MLX-quantised matrix."""
    if part == "weight":
        return (shape[0], shape[1] * settings["bits"] // BITS_OF_A_WORD), 4
    return (shape[0], shape[1] // settings["group_size"]), 2


def _text(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    text = {**LLAMA_7B, **config, **config.get("text_config", {})}
    hidden, inner, heads = (
        text[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    head = text.get("head_dim") or hidden // heads
    queries, keys = heads * head, text["num_key_value_heads"] * head
    gates = 2 if text.get("attn_output_gate") else 1
    rules: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (text["vocab_size"], hidden),
        "lm_head.weight": (text["vocab_size"], hidden),
        "q_proj.weight": (queries * gates, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "o_proj.weight": (hidden, queries),
        "q_proj.bias": (queries,),
        "k_proj.bias": (keys,),
        "v_proj.bias": (keys,),
        "q_norm.weight": (head,),
        "k_norm.weight": (head,),
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
        "layernorm.weight": (hidden,),
    }
    if "linear_num_key_heads" in text:
        value_heads, size = text["linear_num_value_heads"], text["linear_value_head_dim"]
        values = value_heads * size
        mixed = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + values
        rules |= {
            "linear_attn.A_log": (value_heads,),
            "linear_attn.dt_bias": (value_heads,),
            "linear_attn.conv1d.weight": (mixed, text["linear_conv_kernel_dim"], 1),
            "linear_attn.in_proj_a.weight": (value_heads, hidden),
            "linear_attn.in_proj_b.weight": (value_heads, hidden),
            "linear_attn.in_proj_qkv.weight": (mixed, hidden),
            "linear_attn.in_proj_z.weight": (values, hidden),
            "linear_attn.norm.weight": (size,),
            "linear_attn.out_proj.weight": (hidden, values),
        }
    return {**rules, "norm.weight": (hidden,)}


def _projector(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = {**LLAMA_7B, **config, **config.get("text_config", {})}["hidden_size"]
    width = config["vision_config"]["hidden_size"]
    return {
        "multi_modal_projector.linear_1.weight": (hidden, width),
        "multi_modal_projector.linear_1.bias": (hidden,),
        "multi_modal_projector.linear_2.weight": (hidden, hidden),
        "multi_modal_projector.linear_2.bias": (hidden,),
        "multi_modal_projector.mm_input_projection_weight": (width, hidden),
        "multi_modal_projector.mm_soft_emb_norm.weight": (width,),
    }


def _vision(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    vision = config["vision_config"]
    return _vit(vision) if "image_size" in vision else _qwen_vision(vision, config["model_type"])


def _vit(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """CLIP's and SigLIP's towers; CLIP has a row more, and no bias of the patches."""
    width, inner, patch = (
        vision[key] for key in ("hidden_size", "intermediate_size", "patch_size")
    )
    rows = (vision["image_size"] // patch) ** 2 + (vision["model_type"] == "clip_vision_model")
    rules: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "patch_embedding.weight": (width, 3, patch, patch),
        "patch_embedding.bias": (width,),
        "position_embedding.weight": (rows, width),
        "fc1.weight": (inner, width),
        "fc1.bias": (inner,),
        "fc2.weight": (width, inner),
        "fc2.bias": (width,),
        "_proj.weight": (width, width),
        "_proj.bias": (width,),
    }
    norms = ("layer_norm1", "layer_norm2", "post_layernorm", "pre_layrnorm")
    return rules | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def _qwen_vision(vision: Mapping[str, Any], model_type: str) -> dict[str, tuple[int, ...]]:
    width = vision.get("embed_dim", vision["hidden_size"])
    inner = vision.get("intermediate_size", width * vision.get("mlp_ratio", 4))
    merged = width * vision["spatial_merge_size"] ** 2
    out = vision.get("out_hidden_size", vision["hidden_size"])
    patch, frames = vision["patch_size"], vision["temporal_patch_size"]
    converted = model_type == "qwen3_5"  # its checkpoint has MLX's layout
    pixels = (frames, patch, patch, 3) if converted else (3, frames, patch, patch)
    rules: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, *pixels),
        "pos_embed.weight": (vision.get("num_position_embeddings", 0), width),
        "merger.ln_q.weight": (width,),
        "merger.mlp.0.weight": (merged, merged),
        "merger.mlp.2.weight": (out, merged),
        "merger.linear_fc1.weight": (merged, merged),
        "merger.linear_fc2.weight": (out, merged),
        "merger.norm.weight": (width,),
        "deepstack_merger_list.N.linear_fc1.weight": (merged, merged),
        "deepstack_merger_list.N.linear_fc2.weight": (out, merged),
        "deepstack_merger_list.N.norm.weight": (merged,),
        "qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "gate_proj.weight": (inner, width),
        "up_proj.weight": (inner, width),
        "down_proj.weight": (width, inner),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc2.weight": (width, inner),
        "mlp.linear_fc1.weight": (inner, width),
        "mlp.linear_fc2.weight": (width, inner),
        "norm1.weight": (width,),
        "norm2.weight": (width,),
    }
    biases = {end.replace("weight", "bias"): shape[:1] for end, shape in rules.items()}
    return rules | biases
