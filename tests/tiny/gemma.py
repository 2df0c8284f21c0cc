"""Gemma 3 and PaliGemma."""

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

GEMMA_SPECIALS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] if messages[0]['content'] is string "
    "else messages[0]['content'][0]['text'] %}"
    "{% set rest = messages[1:] %}{% else %}"
    "{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}"
    "{{ '\n' }}{% if loop.first and first %}{{ first + '\n\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

GEMMA2 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}


def build_gemma3(folder: Path, *, sliding_window: int = 24) -> Path:
    """Write a Gemma 3 checkpoint; an image takes 4 rows, and every third layer sees all rows."""
    tokenizer = train_tokenizer(GEMMA_SPECIALS, bos="<bos>")
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": tokenizer.token_to_id("<start_of_image>"),
        "eoi_token_index": tokenizer.token_to_id("<end_of_image>"),
        "image_token_index": tokenizer.token_to_id("<image_soft_token>"),
        "mm_tokens_per_image": 4,
        "eos_token_id": [tokenizer.token_to_id("<end_of_turn>")],
        "hidden_size": 64,
        "text_config": {
            **TEXT,
            "model_type": "gemma3_text",
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": sliding_window,
            "sliding_window_pattern": 3,
            "rope_global_base_freq": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "mm_tokens_per_image": 4,
            "vocab_size": tokenizer.get_vocab_size(),
        },
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "image_size": 56},
    }
    weights = random_model(config, 6)
    del weights["language_model.lm_head.weight"]  # it is the embedding
    for name in weights:
        if name.startswith("language_model") and name.endswith("norm.weight"):
            weights[name] = mx.zeros_like(weights[name])  # Gemma's norms add one
    # Scaled by the decoder, and the LM head too: larger, each token would follow itself.
    weights["language_model.model.embed_tokens.weight"] *= 0.03
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config(
            "<eos>",
            bos_token="<bos>",
            pad_token="<pad>",
            add_bos_token=True,
            extra_special_tokens={
                "image_token": "<image_soft_token>",
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
            },
        ),
        "preprocessor_config.json": {
            **PIXELS,
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "size": {"height": 56, "width": 56},
            "image_seq_length": 4,
        },
        "processor_config.json": {"image_seq_length": 4, "processor_class": "Gemma3Processor"},
        "chat_template.json": {"chat_template": GEMMA_TEMPLATE},
    }
    return write(folder, files, to_hub(weights, {}), mx.float32, tokenizer)


def build_paligemma(folder: Path, *, text: str = "gemma") -> Path:
    """Write a PaliGemma checkpoint; an image takes 16 rows. PaliGemma 2 has `text` gemma2."""
    tokenizer = train_tokenizer(("<pad>", "<eos>", "<bos>", "<image>"))
    config = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "eos_token_id": tokenizer.token_to_id("<eos>"),
        "hidden_size": 64,
        "projection_dim": 64,
        "text_config": {
            **TEXT,
            "model_type": text,
            "num_image_tokens": 16,
            "vocab_size": tokenizer.get_vocab_size(),
            **({"num_hidden_layers": 3} if text == "gemma" else GEMMA2),
        },
        "vision_config": {
            **VISION,
            "model_type": "siglip_vision_model",
            "image_size": 56,
            "projection_dim": 64,
        },
    }
    weights = random_model(config, 13)
    for name in weights:
        if name.startswith("language_model") and name.endswith("norm.weight"):
            weights[name] = mx.zeros_like(weights[name])
    weights["language_model.model.embed_tokens.weight"] *= 0.03
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config("<eos>", bos_token="<bos>", pad_token="<pad>"),
        "preprocessor_config.json": {
            **PIXELS,
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "PaliGemmaProcessor",
            "size": {"height": 56, "width": 56},
            "image_seq_length": 16,
        },
        "processor_config.json": {"image_seq_length": 16, "processor_class": "PaliGemmaProcessor"},
    }
    return write(folder, files, to_hub(weights, {}), mx.float32, tokenizer)
