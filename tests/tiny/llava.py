"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from tiny.common import (
    CLIP_MEAN,
    CLIP_STD,
    PIXELS,
    TEXT,
    VISION,
    random_model,
    random_weights,
    to_hub,
    tokenizer_config,
    train_tokenizer,
    write,
)

LLAVA_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% else %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_llava(
    folder: Path,
    *,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    image_size: int = 56,
    patch_size: int = 14,
    vision_feature_layer: int = -2,
    strategy: str = "default",
    tied: bool = False,
    max_position_embeddings: int = 2048,
) -> Path:
    """Write a LLaVA-1.5 checkpoint; an image takes (image_size // patch_size) ** 2 rows."""
    from mlx_vlm.models.llava import Model, ModelConfig, TextConfig, VisionConfig

    tokenizer = train_tokenizer(LLAVA_SPECIALS)
    vocab_size, id_of = tokenizer.get_vocab_size(), tokenizer.token_to_id
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "rope_theta": 10000.0,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tied,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        "projection_dim": 32,
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": id_of("<image>"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": strategy,
        "text_config": text,
        "vision_config": vision,
        "eos_token_id": id_of("</s>"),
        "vocab_size": vocab_size,
    }
    model_config = ModelConfig.from_dict(dict(config))
    model_config.text_config = TextConfig.from_dict(text)
    model_config.vision_config = VisionConfig.from_dict(vision)
    weights = random_weights(Model(model_config), seed)
    for name in weights:
        if name.endswith("patch_embedding.weight"):
            weights[name] = weights[name].transpose(0, 3, 1, 2)
    pixels = {"height": image_size, "width": image_size}
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": id_of("</s>"), "bos_token_id": id_of("<s>")},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "padding_side": "left",
            "model_max_length": 4096,
            "extra_special_tokens": {"image_token": "<image>"},
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "crop_size": pixels,
            "size": {"shortest_edge": image_size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": strategy,
        },
        "chat_template.json": {"chat_template": LLAVA_TEMPLATE},
    }
    return write(folder, files, weights, dtype, tokenizer)


CLIP = {**PIXELS, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_llava_next(folder: Path) -> Path:
    """Write a LLaVA-NeXT checkpoint; tiles of 56 x 56 pixels have 16 patches."""
    tokenizer = train_tokenizer(LLAVA_SPECIALS)
    config = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "image_grid_pinpoints": PINPOINTS,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            **TEXT,
            "model_type": "mistral",
            "vocab_size": tokenizer.get_vocab_size(),
        },
        "vision_config": {
            **VISION,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 3,
            "image_size": 56,
            "projection_dim": 32,
        },
        "eos_token_id": tokenizer.token_to_id("</s>"),
    }
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config(
            "</s>", bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
        ),
        "preprocessor_config.json": {
            **CLIP,
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "LlavaNextProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "do_center_crop": True,
            "do_pad": True,
            "image_grid_pinpoints": PINPOINTS,
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        },
        "chat_template.json": {"chat_template": LLAVA_TEMPLATE},
    }
    return write(folder, files, to_hub(random_model(config, 2), {}), mx.float32, tokenizer)


def build_llava_onevision(folder: Path) -> Path:
    """Write a LLaVA-OneVision checkpoint; what exceeds two tiles is shrunk."""
    tokenizer = train_tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    )
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "video_token_index": tokenizer.token_to_id("<video>"),
        "image_grid_pinpoints": [[56, 56], *PINPOINTS],
        "vision_aspect_ratio": "anyres_max_2",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {**TEXT, "model_type": "qwen2", "vocab_size": tokenizer.get_vocab_size()},
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "image_size": 56},
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config("<|im_end|>", pad_token="<|endoftext|>"),
        "preprocessor_config.json": {
            **PIXELS,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": {"height": 56, "width": 56},
            "do_pad": True,
            "image_grid_pinpoints": [[56, 56], *PINPOINTS],
        },
        "processor_config.json": {
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": 16,
            "processor_class": "LlavaOnevisionProcessor",
            "vision_feature_select_strategy": "full",
        },
        "chat_template.json": {"chat_template": CHATML_TEMPLATE},
    }
    return write(folder, files, to_hub(random_model(config, 3), {}), mx.float32, tokenizer)
