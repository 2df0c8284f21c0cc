"""Pixtral and Mistral 3."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from tiny.common import (
    PIXELS,
    TEXT,
    VISION,
    random_model,
    to_hub,
    tokenizer_config,
    train_tokenizer,
    write,
)

MISTRAL_SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %}{{ '[/SYSTEM_PROMPT]' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST]' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '[IMG]' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '[/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def build_pixtral(folder: Path) -> Path:
    """Write a Pixtral checkpoint; 14 x 14 pixels of an image take one row."""
    return _build(folder, "pixtral", "Pixtral", {}, {}, 9)


def build_mistral3(folder: Path, *, text: str = "mistral") -> Path:
    """Write a Mistral 3 checkpoint; 28 x 28 pixels of an image take one row.

    Ministral 3 has `text` ministral3; here it scales attention from the 16th row on.
    """
    more = {"spatial_merge_size": 2, "multimodal_projector_bias": False}
    names = {"vision_tower.vision_model.": "vision_tower."}
    rope = {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": 16,
    }
    return _build(
        folder,
        "mistral3",
        "Mistral3",
        more,
        names,
        10,
        {"model_type": text, "rope_parameters": rope},
    )


def _build(
    folder: Path,
    model_type: str,
    name: str,
    more: dict[str, Any],
    names: dict[str, str],
    seed: int,
    text: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    tokenizer = train_tokenizer(MISTRAL_SPECIALS, bos="<s>")
    config = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": model_type,
        "image_token_index": tokenizer.token_to_id("[IMG]"),
        "vision_feature_layer": -1,
        "eos_token_id": tokenizer.token_to_id("</s>"),
        "text_config": {
            **TEXT,
            "model_type": "mistral",
            "head_dim": 16,
            "vocab_size": tokenizer.get_vocab_size(),
            **text,
        },
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16, "image_size": 112},
        **more,
    }
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config("</s>", bos_token="<s>", unk_token="<unk>"),
        "preprocessor_config.json": {
            **PIXELS,
            "image_processor_type": "PixtralImageProcessor",
            "processor_class": "PixtralProcessor",
            "patch_size": {"height": 14, "width": 14},
            "size": {"longest_edge": 112},
        },
        "processor_config.json": {
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "patch_size": 14,
            "spatial_merge_size": more.get("spatial_merge_size", 1),
            "processor_class": "PixtralProcessor",
        },
        "chat_template.json": {"chat_template": MISTRAL_TEMPLATE},
    }
    return write(folder, files, to_hub(random_model(config, seed), names), mx.float32, tokenizer)
