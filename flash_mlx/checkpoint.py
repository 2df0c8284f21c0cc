"""Drafters on disk: a folder with `config.json` and `model.safetensors`.

Reading is strict, because a drafter with a tensor missing still drafts, only badly: whatever does
not fit is an error that names it. Writing is atomic: a reader sees the old files or the new ones.

`config.json` holds `draft_kind` (see `draft.kinds`), that kind's settings, and what was told about
the target (`target`), the training (`training`), where the weights come from (`source`) and how
they are quantised (`quantization`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from flash_mlx.decode import Target
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel
from flash_mlx.draft.decoder import DecoderConfig
from flash_mlx.draft.fit import TargetFacts, check_notes, check_sizes
from flash_mlx.draft.kinds import KINDS, DraftModel, kind_of
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.draft.vocabulary import check_ids
from flash_mlx.few_rows import lay_out_for_few_rows
from flash_mlx.files import Tensor, read_header, read_json, replacing
from flash_mlx.hub import resolve_path
from flash_mlx.targets.weights import dequantize

__all__ = [
    "TargetFacts",
    "drafter_of",
    "load_drafter",
    "load_model",
    "load_network",
    "read_config",
    "read_settings",
    "resolve_path",
    "save_drafter",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NOTES = ("target", "training", "source")  # entries of config.json that are no settings
CORRECTIONS = ("hydra_projs", "recurrence")  # small, and taken apart as plain matrices
FLOATS, WHOLE = ("F32", "F16", "BF16"), ("U32", "I32")

Config = FlashConfig | DecoderConfig


def load_drafter(
    path: Path,
    target: Target,
    block_size: int | None = None,
    facts: TargetFacts | None = None,
    *,
    keep_quantized: bool = False,
) -> FlashDrafter | StepwiseDrafter:
    """Load a drafter for a target, in the target's own dtype.

    Args:
        path: The drafter's folder.
        target: Lends its embedding and its LM head.
        block_size: Tokens to draft in a round, if not the drafter's own number.
        facts: What the drafter's notes about its target are held against.
        keep_quantized: Leave quantised weights quantised on a CPU too, where they are slow.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a file is damaged, or the drafter was made for another target.
    """
    facts = TargetFacts() if facts is None else facts
    kind, config, notes = _read(path)
    check_notes(path, notes.get("target"), facts)
    check_sizes(path, config, target)
    keep_quantized = keep_quantized or mx.default_device() != mx.Device(mx.cpu)
    dtype = target.embed(mx.array([0])).dtype
    model = _load(path, kind, config, notes, dtype, keep_quantized=keep_quantized)
    lay_out_for_few_rows(model)
    return drafter_of(model, target, block_size, trees=facts.trees)


def drafter_of(
    model: DraftModel,
    target: Target,
    block_size: int | None = None,
    *,
    trees: bool = True,
) -> FlashDrafter | StepwiseDrafter:
    """Return what drafts with a network; arguments as of `load_drafter` and `TargetFacts`."""
    lends = target.embed, target.lm_head
    if isinstance(model, FlashModel):
        return FlashDrafter(model, *lends, block_size)
    return StepwiseDrafter(model, *lends, target.vocab_size, block_size, trees=trees)


def load_model(path: Path, dtype: mx.Dtype = mx.float32) -> FlashModel:
    """Load a FLASH drafter's network.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If `config.json` or `model.safetensors` is damaged or does not fit the other.
    """
    read_config(path)
    return cast(FlashModel, load_network(path, dtype)[0])


def load_network(path: Path, dtype: mx.Dtype = mx.float32) -> tuple[DraftModel, dict[str, object]]:
    """Load any drafter's network, and its notes; what is quantised is made plain.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If `config.json` or `model.safetensors` is damaged or does not fit the other.
    """
    kind, config, notes = _read(path)
    model = _load(path, kind, config, notes, dtype, keep_quantized=False)
    return model, {name: note for name, note in notes.items() if name in NOTES}


def read_settings(path: Path) -> tuple[str, Config]:
    """Return the kind of a drafter and its settings, from its `config.json` alone.

    Raises:
        OSError: If the folder has none.
        ValueError: If it is no drafter's.
    """
    return _read(path)[:2]


def read_config(path: Path) -> FlashConfig:
    """Return the settings in a FLASH drafter's `config.json`.

    Raises:
        OSError: If the folder has none.
        ValueError: If it is not a FLASH drafter's.
    """
    kind, config = read_settings(path)
    if not isinstance(config, FlashConfig):
        raise ValueError(f"{path / CONFIG} must be a FLASH drafter's; it is that of {kind}.")
    return config


def _load(
    path: Path,
    kind: str,
    config: Config,
    notes: Mapping[str, object],
    dtype: mx.Dtype,
    *,
    keep_quantized: bool,
) -> DraftModel:
    model = KINDS[kind].model(config)  # type: ignore[arg-type]  # the kind's own settings
    file = _require(path, WEIGHTS)
    header = read_header(file)
    if (quantization := notes.get("quantization")) is not None:
        _quantize(model, path, quantization, header)
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    _check_shapes(file, header, dict(flat))
    stored = cast(dict[str, mx.array], mx.load(str(file)))
    weights = {
        name: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in stored.items()
    }
    finite = {name: mx.isfinite(value).all() for name, value in weights.items()}
    mx.eval(weights, finite)
    if broken := sorted(name for name, good in finite.items() if not good.item()):
        raise ValueError(
            f"A drafter's weights must be finite numbers; in {file}, {_some(broken)} "
            f"{'holds' if len(broken) == 1 else 'hold'} NaN or infinity in {dtype}."
        )
    model.update(tree_unflatten(list(weights.items())))
    if (ids := model.proposed_ids) is not None:
        try:
            check_ids(ids, config.vocab_size)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    if quantization is not None:
        dequantize(model, CORRECTIONS if keep_quantized else ("",))
        model.set_dtype(dtype)
    return model


def _quantize(
    model: nn.Module, path: Path, quantization: object, header: Mapping[str, Tensor]
) -> None:
    """Make the layers quantised that the file has quantised."""
    entry = quantization if isinstance(quantization, Mapping) else {}
    group_size, bits = entry.get("group_size"), entry.get("bits")
    if group_size not in (32, 64, 128) or bits not in (2, 3, 4, 5, 6, 8):
        raise ValueError(
            f"{path / CONFIG} must have a quantization with group_size 32, 64 or 128 and bits 2, "
            f"3, 4, 5, 6 or 8; it has {json.dumps(quantization)}."
        )
    nn.quantize(
        model,
        group_size,
        bits,
        class_predicate=lambda name, module: (
            isinstance(module, nn.Linear | nn.Embedding) and f"{name}.scales" in header
        ),
    )


def _read(path: Path) -> tuple[str, Config, dict[str, object]]:
    """Return kind, settings and notes, the quantisation among them."""
    file = _require(path, CONFIG)
    content = read_json(file)
    kind = content.pop("draft_kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f'{file} must say "draft_kind": {" or ".join(json.dumps(name) for name in KINDS)}; it '
            f"says {json.dumps(kind)}. Pass the folder of a drafter made with flash-mlx, not a "
            "target's, and convert published drafters first (flash-mlx convert)."
        )
    names = (*NOTES, "quantization")
    notes = {name: content.pop(name) for name in names if name in content}
    try:
        return kind, KINDS[kind].config.from_dict(content), notes
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def save_drafter(
    model: DraftModel,
    path: Path,
    metadata: Mapping[str, object],
    dtype: mx.Dtype = mx.float32,
) -> None:
    """Write a drafter's folder; an older drafter in it is replaced file by file.

    Args:
        model: The network, quantised or not.
        path: The folder; made if there is none.
        metadata: What to tell about the `target` (model type, hash or name), the `training` and
            the `source` of the weights.
        dtype: Of the stored weights.

    Raises:
        ValueError: If the metadata has other entries, or a weight is not finite.
        OSError: If the folder cannot be written; nothing is left behind.
    """
    if unknown := sorted(metadata.keys() - set(NOTES)):
        raise ValueError(f"Metadata must be among {NOTES}; got {_some(unknown)}.")
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    weights = {
        name: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in flat
    }
    for name, value in weights.items():
        if not mx.isfinite(value).all().item():
            raise ValueError(f"{name} must be finite to be saved as {dtype}, and is not.")
    config = {"draft_kind": kind_of(model), **model.config.to_dict(), **metadata}
    quantized = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    for layer in model.modules():
        if isinstance(layer, quantized):
            config["quantization"] = {"group_size": layer.group_size, "bits": layer.bits}
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / WEIGHTS) as file:
        mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    with replacing(path / CONFIG) as file:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_shapes(
    file: Path, header: Mapping[str, Tensor], expected: Mapping[str, mx.array]
) -> None:
    """Require exactly the expected tensors."""
    if missing := sorted(expected.keys() - header.keys()):
        raise ValueError(
            f"{file} must hold all weights of its config.json; {_some(missing)} missing."
        )
    if extra := sorted(header.keys() - expected.keys()):
        raise ValueError(
            f"{file} must hold only weights that its config.json asks for; it has {_some(extra)}."
        )
    for name, value in expected.items():
        found, shape = header[name], value.shape
        types = FLOATS if mx.issubdtype(value.dtype, mx.floating) else WHOLE
        if found.shape != shape or found.dtype not in types:
            raise ValueError(
                f"{name} must have the shape {shape} by config.json and one of the types "
                f"{', '.join(types)}; in {file} it is {found.dtype} of the shape {found.shape}."
            )


def _require(path: Path, name: str) -> Path:
    """Return a file of a drafter's folder."""
    if not (path / name).is_file():
        raise FileNotFoundError(
            f"A drafter must be a folder with {CONFIG} and {WEIGHTS}; {path} has no {name}."
        )
    return path / name


def _some(names: list[str]) -> str:
    """Return the first few names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
