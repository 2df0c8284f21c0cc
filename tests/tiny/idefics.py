"""Idefics3 and SmolVLM."""

from pathlib import Path
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

IDEFICS_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}{% else %}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
NAMES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.": "model.text_model.",
    "vision_model.": "model.vision_model.",
    "connector.": "model.connector.",
}


def build_idefics3(folder: Path) -> Path:
    """Write an Idefics3 checkpoint; tiles of 56 x 56 pixels take 4 rows each."""
    return _build(folder, "idefics3", "Idefics3", {}, 7)


def build_smolvlm(folder: Path) -> Path:
    """Write a SmolVLM checkpoint; tiles of 56 x 56 pixels take 4 rows each."""
    video = {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 56}}
    return _build(folder, "smolvlm", "SmolVLM", {"video_sampling": video}, 8)


def _build(folder: Path, model_type: str, name: str, pixels: dict[str, Any], seed: int) -> Path:
    tokenizer = train_tokenizer(IDEFICS_SPECIALS)
    config = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": model_type,
        "image_token_id": tokenizer.token_to_id("<image>"),
        "eos_token_id": tokenizer.token_to_id("<end_of_utterance>"),
        "scale_factor": 2,
        "text_config": {**TEXT, "model_type": "llama", "vocab_size": tokenizer.get_vocab_size()},
        "vision_config": {**VISION, "model_type": f"{model_type}_vision", "image_size": 56},
    }
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config(
            "<end_of_utterance>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
        ),
        "preprocessor_config.json": {
            **PIXELS,
            **pixels,
            "image_processor_type": f"{name}ImageProcessor",
            "processor_class": f"{name}Processor",
            "do_image_splitting": True,
            "do_pad": True,
            "size": {"longest_edge": 112},
            "max_image_size": {"longest_edge": 56},
        },
        "processor_config.json": {"image_seq_len": 4, "processor_class": f"{name}Processor"},
        "chat_template.json": {"chat_template": IDEFICS_TEMPLATE},
    }
    return write(folder, files, to_hub(random_model(config, seed), NAMES), mx.float32, tokenizer)
