"""InternVL."""

from pathlib import Path

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

INTERN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
)
INTERN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_internvl(folder: Path) -> Path:
    """Write an InternVL checkpoint; tiles of 56 x 56 pixels take 4 rows each."""
    tokenizer = train_tokenizer(INTERN_SPECIALS)
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "use_thumbnail": True,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "llm_config": {**TEXT, "model_type": "qwen2", "vocab_size": tokenizer.get_vocab_size()},
        "vision_config": {
            **VISION,
            "model_type": "intern_vit_6b",
            "image_size": 56,
            "norm_type": "layer_norm",
            "qkv_bias": True,
        },
    }
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config("<|im_end|>", pad_token="<|endoftext|>"),
        "preprocessor_config.json": {**PIXELS, "image_processor_type": "CLIPFeatureExtractor"},
        "chat_template.json": {"chat_template": INTERN_TEMPLATE},
    }
    return write(folder, files, to_hub(random_model(config, 11), {}), mx.float32, tokenizer)
