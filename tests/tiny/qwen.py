"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer

from tiny.common import (
    CLIP_MEAN,
    CLIP_STD,
    TEXT,
    random_model,
    random_weights,
    to_hub,
    tokenizer_config,
    train_tokenizer,
    write,
)

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_qwen(
    folder: Path,
    *,
    seed: int = 1,
    dtype: mx.Dtype = mx.float32,
    tied: bool = False,
    num_heads: int = 4,
) -> Path:
    """Write a Qwen2.5-VL checkpoint; 28 x 28 pixels of an image take one row."""
    from mlx_vlm.models.qwen2_5_vl import Model, ModelConfig, TextConfig, VisionConfig

    size = 64 // num_heads
    sections = [size // 8, 3 * size // 16, 3 * size // 16]

    tokenizer = train_tokenizer(QWEN_SPECIALS)
    id_of = tokenizer.token_to_id
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 3,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [2],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": id_of("<|image_pad|>"),
        "video_token_id": id_of("<|video_pad|>"),
        "vision_start_token_id": id_of("<|vision_start|>"),
        "vision_end_token_id": id_of("<|vision_end|>"),
        "vision_token_id": id_of("<|vision_pad|>"),
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads // 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "tie_word_embeddings": tied,
        "eos_token_id": id_of("<|im_end|>"),
        "vision_config": vision,
    }
    model_config = ModelConfig.from_dict(dict(config))
    model_config.text_config = TextConfig.from_dict(model_config.text_config)
    model_config.vision_config = VisionConfig.from_dict(vision)
    weights = {}
    for name, value in random_weights(Model(model_config), seed).items():
        name = name.replace("language_model.lm_head", "lm_head").replace("vision_tower", "visual")
        if name.endswith("patch_embed.proj.weight"):
            value = value.transpose(0, 4, 1, 2, 3)
        weights[name.replace("language_model.model", "model")] = value
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {
            "do_sample": True,
            "eos_token_id": [id_of("<|im_end|>"), id_of("<|endoftext|>")],
            "repetition_penalty": 1.05,
            "temperature": 0.000001,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "model_max_length": 4096,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": {
            "min_pixels": 3136,
            "max_pixels": 100352,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        "chat_template.json": {"chat_template": QWEN_TEMPLATE},
    }
    return write(folder, files, weights, dtype, tokenizer)


NAMES_OF_QWEN2 = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "visual.",
}
NAMES_OF_QWEN3 = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.visual.",
}


def build_qwen2(folder: Path) -> Path:
    """Write a Qwen2-VL checkpoint; 28 x 28 pixels of an image take one row."""
    tokenizer = train_tokenizer(QWEN_SPECIALS)
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **_ids(tokenizer),
        **TEXT,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": tokenizer.get_vocab_size(),
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }
    weights = to_hub(random_model(config, 4), NAMES_OF_QWEN2)
    files = _files(config, "Qwen2VL", 14, {"min_pixels": 3136, "max_pixels": 100352})
    return write(folder, files, weights, mx.float32, tokenizer)


def build_qwen3(folder: Path) -> Path:
    """Write a Qwen3-VL checkpoint with deepstack; 32 x 32 pixels of an image take one row."""
    tokenizer = train_tokenizer(QWEN_SPECIALS)
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **_ids(tokenizer),
        "text_config": {
            **TEXT,
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": 3,
            "head_dim": 16,
            "attention_bias": False,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "vocab_size": tokenizer.get_vocab_size(),
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 3,
            "deepstack_visual_indexes": [0, 1],
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "intermediate_size": 48,
            "in_channels": 3,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "tie_word_embeddings": False,
    }
    weights = to_hub(random_model(config, 5), NAMES_OF_QWEN3)
    size = {"size": {"shortest_edge": 4096, "longest_edge": 102400}}
    return write(folder, _files(config, "Qwen3VL", 16, size), weights, mx.float32, tokenizer)


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    id_of = tokenizer.token_to_id
    return {
        "image_token_id": id_of("<|image_pad|>"),
        "video_token_id": id_of("<|video_pad|>"),
        "vision_start_token_id": id_of("<|vision_start|>"),
        "vision_end_token_id": id_of("<|vision_end|>"),
        "eos_token_id": id_of("<|im_end|>"),
    }


def _files(
    config: dict[str, Any], name: str, patch_size: int, size: dict[str, Any]
) -> dict[str, Any]:
    return {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config("<|im_end|>", pad_token="<|endoftext|>"),
        "preprocessor_config.json": {
            **size,
            "patch_size": patch_size,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": f"{name}Processor",
        },
        "chat_template.json": {"chat_template": QWEN_TEMPLATE},
    }
