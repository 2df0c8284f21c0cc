"""What every tiny checkpoint needs: a tokenizer, random weights, pictures, and how it is written.

Shapes: D = 64 hidden size, V = vocabulary of about 400 byte-level BPE tokens.
"""

import flash_mlx  # noqa: F401  binds the BLAS, which works only before mlx.core is imported

# isort: split
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = (
    "A large red circle stands to the left of two small blue squares.",
    "The picture shows three green triangles above a yellow ring on a grey background.",
    "What is in the picture? How many shapes are there? Describe this image in detail.",
    "system You are a helpful assistant. USER: user ASSISTANT: assistant 0123456789 .,;:!?()[]\n",
)

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


# Of the language models and of the vision towers.
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "patch_size": 14,
    "num_channels": 3,
}
# Of the image processors.
PIXELS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def tokenizer_config(eos: str, **more: Any) -> dict[str, Any]:
    """A `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        **more,
    }


def random_image(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    """An RGB image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def edit_json(folder: Path, name: str, **changes: object) -> None:
    """Change keys of one of a checkpoint's JSON files; None removes a key."""
    content = json.loads((folder / name).read_text())
    content.update(changes)
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(kept))


def train_tokenizer(
    specials: tuple[str, ...], vocab_size: int = 400, bos: str | None = None
) -> Tokenizer:
    """Return a byte-level BPE tokenizer; with `bos` it starts every text with that token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens(list(specials))
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def random_model(config: Mapping[str, Any], seed: int) -> dict[str, mx.array]:
    """Return the weights of the mlx-vlm model that a `config.json` describes, under its names."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    settings = json.loads(json.dumps(config))  # the classes change what they are given
    settings.setdefault("text_config", settings.pop("llm_config", {}))
    module, _ = get_model_and_args(settings)
    model_config = module.ModelConfig.from_dict(settings)
    model_config = update_module_configs(model_config, module, settings, ["text", "vision"])
    return random_weights(module.Model(model_config), seed)


def to_hub(weights: Mapping[str, mx.array], names: Mapping[str, str]) -> dict[str, mx.array]:
    """Return weights as on the hub.

    Args:
        weights: Those of an mlx-vlm model.
        names: Starts of names, as in mlx-vlm and as on the hub; the first that fits is replaced.
    """
    stored = {}
    for name, value in weights.items():
        if name.endswith(
            ("patch_embedding.weight", "patch_embed.proj.weight", "patch_conv.weight")
        ):
            value = mx.moveaxis(value, -1, 1)
        start = next((start for start in names if name.startswith(start)), "")
        stored[names.get(start, "") + name[len(start) :]] = value
    return stored


def random_weights(model: nn.Module, seed: int) -> dict[str, mx.array]:
    """Weights large enough that greedy text is not one repeated token."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        if value.ndim == 1 and name.endswith("weight"):  # the norms
            weight = np.ones(value.shape)
        elif value.ndim == 1:
            weight = rng.normal(0, 0.02, value.shape)
        elif "embed_tokens" in name or "position_embedding" in name:
            weight = rng.normal(0, 1.0, value.shape)
        else:
            weight = rng.normal(0, np.prod(value.shape[1:]) ** -0.5, value.shape)
        weights[name] = mx.array(weight.astype(np.float32))
    return weights


def write(
    folder: Path,
    files: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    dtype: mx.Dtype,
    tokenizer: Tokenizer,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))
    stored = {name: mx.contiguous(value.astype(dtype)) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), stored, metadata={"format": "pt"})
    return folder
