"""Write a trained stage as a checkpoint in Hugging Face's LLaVA layout.

    python export.py --run runs/joint --tokenizer runs/tokenizer.json --output runs/target

Weights are stored as float16. Nothing here is special to flash-mlx: `mlx_vlm.load` reads the
folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
from tokenizers import Tokenizer

from model import TextShape, VisionShape
from tokenizer import CHAT_TEMPLATE

CONTEXT = 2048


def configs(
    tokenizer: Tokenizer, text: TextShape, vision: VisionShape
) -> dict[str, dict[str, Any]]:
    """The JSON files of the checkpoint, by name."""
    ids = {name: tokenizer.token_to_id(f"<{name}>") for name in ("s", "/s", "pad", "image")}
    marks = {"bos_token_id": ids["s"], "eos_token_id": ids["/s"], "pad_token_id": ids["pad"]}
    heads = text.num_attention_heads
    side = {"height": vision.image_size, "width": vision.image_size}
    return {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": ids["image"],
            "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vocab_size": text.vocab_size,
            **marks,
            "text_config": {
                "model_type": "llama",
                "hidden_act": "silu",
                "num_key_value_heads": heads,
                "max_position_embeddings": CONTEXT,
                "tie_word_embeddings": False,
                **text.as_config(),
                **marks,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_act": "quick_gelu",
                "hidden_size": vision.hidden_size,
                "num_hidden_layers": vision.num_hidden_layers,
                "intermediate_size": vision.intermediate_size,
                "num_attention_heads": vision.num_attention_heads,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "projection_dim": vision.hidden_size,
                "layer_norm_eps": vision.layer_norm_eps,
            },
        },
        "generation_config.json": marks,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "model_max_length": CONTEXT,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {"image_token": "<image>"},
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": side,
            "resample": 3,
            "do_center_crop": False,
            "crop_size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    mark = "model.target."
    arrays = mx.load(str(args.run / "checkpoint.safetensors"))
    weights = {k.removeprefix(mark): v for k, v in arrays.items() if k.startswith(mark)}
    layers = {
        k.split("layers.")[1].split(".")[0]
        for k in weights
        if k.startswith("language_model.model.layers.")
    }
    patch = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    weights[patch] = weights[patch].transpose(0, 3, 1, 2)  # PyTorch's order, as on the hub
    args.output.mkdir(parents=True, exist_ok=True)
    halves = {k: mx.contiguous(v.astype(mx.float16)) for k, v in weights.items()}
    mx.save_safetensors(str(args.output / "model.safetensors"), halves, {"format": "pt"})
    shutil.copy(args.tokenizer, args.output / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    for name, content in configs(
        tokenizer, TextShape(num_hidden_layers=len(layers)), VisionShape()
    ).items():
        (args.output / name).write_text(json.dumps(content, indent=2) + "\n")
    (args.output / "chat_template.jinja").write_text(CHAT_TEMPLATE)


if __name__ == "__main__":
    main()
