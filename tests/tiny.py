"""Tiny checkpoints with random weights in the layout of the Hugging Face hub.

Built in about a second each, without torch and without network: the configuration, the weights
under their hub names (convolutions as [out, in, ...]), tokenizer, processor and chat template.

Use the session fixtures `tiny_llava` and `tiny_qwen` of `conftest.py` (folders); call the builders
here for a checkpoint that differs from them.

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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = (
    "A large red circle stands to the left of two small blue squares.",
    "The picture shows three green triangles above a yellow ring on a grey background.",
    "What is in the picture? How many shapes are there? Describe this image in detail.",
    "system You are a helpful assistant. USER: user ASSISTANT: assistant 0123456789 .,;:!?()[]\n",
)

LLAVA_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
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

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% else %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def random_image(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    """An RGB image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


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

    tokenizer = _train_tokenizer(LLAVA_SPECIALS)
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
    weights = _random_weights(Model(model_config), seed)
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
    return _write(folder, files, weights, dtype, tokenizer)


def build_qwen(
    folder: Path, *, seed: int = 1, dtype: mx.Dtype = mx.float32, tied: bool = False
) -> Path:
    """Write a Qwen2.5-VL checkpoint; 28 x 28 pixels of an image take one row."""
    from mlx_vlm.models.qwen2_5_vl import Model, ModelConfig, TextConfig, VisionConfig

    tokenizer = _train_tokenizer(QWEN_SPECIALS)
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
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": tied,
        "eos_token_id": id_of("<|im_end|>"),
        "vision_config": vision,
    }
    model_config = ModelConfig.from_dict(dict(config))
    model_config.text_config = TextConfig.from_dict(model_config.text_config)
    model_config.vision_config = VisionConfig.from_dict(vision)
    weights = {}
    for name, value in _random_weights(Model(model_config), seed).items():
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
    return _write(folder, files, weights, dtype, tokenizer)


def edit_json(folder: Path, name: str, **changes: object) -> None:
    """Change keys of one of a checkpoint's JSON files; None removes a key."""
    content = json.loads((folder / name).read_text())
    content.update(changes)
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(kept))


def _train_tokenizer(specials: tuple[str, ...], vocab_size: int = 400) -> Tokenizer:
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
    return tokenizer


def _random_weights(model: nn.Module, seed: int) -> dict[str, mx.array]:
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


def _write(
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
