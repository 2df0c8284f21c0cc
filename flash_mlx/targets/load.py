"""From a folder to a target that has proved itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.few_rows import lay_out_for_few_rows
from flash_mlx.files import read_json
from flash_mlx.targets.adapter import CHUNK_SIZE, MlxVlmTarget
from flash_mlx.targets.checks import check_files, check_quantization, read_config
from flash_mlx.targets.families import Family, family_of
from flash_mlx.targets.quantized import use_few_rows
from flash_mlx.targets.quiet import complaining, quiet
from flash_mlx.targets.selftest import check_target
from flash_mlx.targets.weights import check_numbers, dequantize


@dataclass(frozen=True, eq=False)
class LoadedTarget:
    """A target and what came with its checkpoint.

    Attributes:
        path: The checkpoint's folder.
        target: The model.
        processor: The Hugging Face processor, with `tokenizer` and `image_processor`.
        config: `config.json`.
        family: What is particular to the model's family.
        eos_ids: Ids that end a text, as mlx-vlm takes them: those of the generation settings or
            `config.json`, and the tokenizer's.
        image_token_id: Id that stands for one visual row.
        generation_defaults: `generation_config.json`; empty without one.
        keep_quantized: Whether quantised weights stay so on a CPU too; those of drafters follow.
        max_pixels: Most pixels of a picture after the processor has resized it; None: its own.
    """

    path: Path
    target: MlxVlmTarget
    processor: Any
    config: Mapping[str, Any]
    family: Family
    eos_ids: tuple[int, ...]
    image_token_id: int
    generation_defaults: Mapping[str, Any]
    keep_quantized: bool = False
    max_pixels: int | None = None

    @property
    def model_type(self) -> str:
        """The family's name."""
        return self.family.model_type

    @property
    def visual_ids(self) -> frozenset[int]:
        """Ids that stand for one visual row, of a picture or of a video."""
        video = self.family.video_token_id(self.config, self.processor.tokenizer)
        return frozenset({self.image_token_id, *([] if video is None else [video])})


def load_target(
    path: Path | str,
    *,
    dtype: mx.Dtype | None = None,
    keep_quantized: bool = False,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    max_pixels: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> LoadedTarget:
    """Load a checkpoint in a local folder. The network is never used, nor code of the checkpoint.

    Args:
        path: Folder in the layout of the Hugging Face hub, MLX-converted or not.
        dtype: What to compute in. None: as stored, except on a CPU, where 16-bit and quantised
            weights are slow and become float32. Weights stay quantised if a dtype is given.
        keep_quantized: Leave quantised weights quantised on a CPU too.
        kv_bits: Bits of a number in the cache; None keeps the type that is computed in.
        kv_group_size: Numbers of the cache that share a scale.
        max_pixels: Most pixels of a picture after the processor has resized it.
        chunk_size: Prompt rows per pass.

    Returns:
        The target, its trees switched off if they fail the self-test or cannot be trusted.

    Raises:
        OSError: If the folder or one of its files is missing.
        ValueError: If the checkpoint is damaged, unsupported, wants to run code, or fails the
            self-test.
    """
    folder = Path(path)
    config = read_config(folder)
    check_quantization(folder, config)
    family = family_of(config.get("model_type"))
    check_files(folder)
    settings = folder / "generation_config.json"
    defaults = read_json(settings) if settings.is_file() else {}
    if max_pixels is not None and not family.takes_max_pixels:
        raise ValueError(
            f"Pictures must be resized by the model's processor; that of a {family.model_type} "
            "model takes no largest number of pixels. Leave --max-pixels out."
        )
    model, processor = _load(folder)
    _convert(model, dtype, keep_quantized=keep_quantized)
    _complete(processor, config)
    target = MlxVlmTarget(
        model, family, chunk_size=chunk_size, kv_bits=kv_bits, kv_group_size=kv_group_size
    )
    text_type = model.config.text_config.model_type
    packed = f"This model's cache must fit {kv_bits} bits in groups of {kv_group_size}"
    with nullcontext() if kv_bits is None else complaining(packed):
        target.supports_tree = check_target(target) and text_type not in family.chains_only
    return LoadedTarget(
        path=folder,
        target=target,
        processor=processor,
        config=config,
        family=family,
        eos_ids=tuple(processor.tokenizer.stopping_criteria.eos_token_ids),
        image_token_id=family.image_token_id(config, processor.tokenizer),
        generation_defaults=defaults,
        keep_quantized=keep_quantized,
        max_pixels=max_pixels,
    )


def _load(folder: Path) -> tuple[nn.Module, Any]:
    """Load model and processor through mlx-vlm, its weights still unread.

    Raises:
        ValueError: With the first line of what mlx-vlm or transformers say.
    """
    from mlx_vlm import load

    must = f"{folder} must be a checkpoint that mlx-vlm can load"
    with quiet(), complaining(must):
        # mlx-vlm's processors trust code in the checkpoint unless told otherwise.
        model, processor = load(str(folder), lazy=True, trust_remote_code=False)
    if all(model.get(name) is None for name in ("vision_tower", "vision_model")):
        raise ValueError(f"{must}; its weights have no vision tower under a name it knows.")
    return model, processor


def _convert(model: nn.Module, dtype: mx.Dtype | None, *, keep_quantized: bool) -> None:
    """Bring the weights into the wanted type and read them.

    Raises:
        ValueError: If some are no numbers to compute with.
    """
    if dtype is not None:
        model.set_dtype(dtype)
    elif mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
        if not keep_quantized:
            dequantize(model)
    lay_out_for_few_rows(model)
    use_few_rows(model.language_model)
    mx.eval(model.parameters())
    check_numbers(model)


def _complete(processor: Any, config: Mapping[str, Any]) -> None:
    """Fill what processors lack, from the checkpoint's other files.

    Raises:
        ValueError: If it is nowhere.
    """
    if config["model_type"] == "internvl_chat":
        # mlx-vlm's processor has a template of its own, which is not the model's.
        if processor.tokenizer.chat_template is None:
            raise ValueError("The checkpoint must bring its chat template; there is none.")
        processor.chat_template = processor.tokenizer.chat_template
    if config["model_type"] == "llava" and processor.patch_size is None:
        vision = config.get("vision_config", {})
        processor.patch_size = vision.get("patch_size", 14)
        processor.num_additional_image_tokens = int(vision.get("model_type") == "clip_vision_model")
        processor.vision_feature_select_strategy = config.get(
            "vision_feature_select_strategy", "default"
        )
