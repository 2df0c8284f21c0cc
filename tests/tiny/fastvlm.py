"""FastVLM.

mlx-vlm has the sizes of its vision tower in a class, 125 million weights. `small_tower` makes them
small while a checkpoint is built and loaded; the layers are of the same kinds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import mlx.core as mx

from tiny.common import (
    PIXELS,
    TEXT,
    random_model,
    tokenizer_config,
    train_tokenizer,
    write,
)
from tiny.internvl import INTERN_TEMPLATE


@contextmanager
def small_tower() -> Iterator[None]:
    """Let FastVLM's vision tower be small inside."""
    from mlx_vlm.models.fastvlm.config import VisionConfig

    sizes = {"layers": [1, 1, 1, 1, 1], "embed_dims": [8, 8, 16, 32, 32]}
    with mock.patch.multiple(VisionConfig, **sizes):
        yield


def build_fastvlm(folder: Path) -> Path:
    """Write a FastVLM checkpoint (inside `small_tower`); an image takes 4 rows."""
    tokenizer = train_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    config = {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        **TEXT,
        "vocab_size": tokenizer.get_vocab_size() + 8,  # rows that are of no token
        "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu",
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    weights = {}
    for name, value in random_model(config, 12).items():
        if name.startswith("language_model."):
            name = name.removeprefix("language_model.")
        elif name.startswith("vision_tower."):
            name = name.replace(
                "vision_tower.vision_model.", "model.vision_tower.vision_tower.model."
            )
            name = name.replace("patch_embed.blocks.", "patch_embed.")
            if name.endswith("running_var"):
                value = mx.ones_like(value)
            if value.ndim == 4:
                value = mx.moveaxis(value, -1, 1)
            elif "layer_scale" in name:
                value = value.transpose(2, 0, 1)
        else:
            name = f"model.{name}"
        weights[name] = value
    weights["lm_head.weight"][-8:] = 0  # never said
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config(
            "<|im_end|>", pad_token="<|endoftext|>", chat_template=INTERN_TEMPLATE
        ),
        "preprocessor_config.json": {
            **PIXELS,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 128},
            "crop_size": {"height": 128, "width": 128},
            "do_center_crop": True,
        },
    }
    return write(folder, files, weights, mx.float32, tokenizer)
