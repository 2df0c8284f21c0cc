"""A published drafter to our layout.

The map is strict: every tensor has its place or is dropped for a reason that is said, and every
place is filled. The result appears all at once or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from flash_mlx.checkpoint import load_network, save_drafter
from flash_mlx.convert.folder import appearing
from flash_mlx.convert.published import make_config, recognise, rename
from flash_mlx.convert.source import digest, read_settings, read_tensors, tensor_names
from flash_mlx.draft import FlashConfig
from flash_mlx.draft.decoder import DecoderConfig
from flash_mlx.draft.kinds import KINDS, DraftModel, kind_of
from flash_mlx.draft.vocabulary import check_ids
from flash_mlx.targets.checks import read_config

TABLE = "embed_tokens.weight"


@dataclass(frozen=True)
class Converted:
    """What a conversion made.

    Attributes:
        folder: Where it is.
        kind: Its `draft_kind`.
        parameters: Numbers stored, before quantisation.
        size: Bytes of the stored weights.
        remarks: What was dropped or kept and why, a sentence each.
    """

    folder: Path
    kind: str
    parameters: int
    size: int
    remarks: tuple[str, ...]


def is_drafter(folder: Path) -> bool:
    """Whether a folder holds a published drafter, by its tensors."""
    settings = read_settings(folder)
    if "vision_config" in settings and "text_config" in settings:
        return False  # a target; its torch file, if any, need not be opened
    return recognise(tensor_names(folder), settings) is not None


def convert_drafter(
    source: Path,
    mlx_path: Path,
    *,
    name: str,
    target: Path | None = None,
    bits: int | None = None,
    group_size: int = 64,
    dtype: mx.Dtype | None = None,
    kind: str | None = None,
) -> Converted:
    """Convert a published drafter.

    Args:
        source: Its folder.
        mlx_path: Folder to write; must not exist, or be empty.
        name: What the source is called, for the record.
        target: The folder of its target; the drafter's copies of the target's weights are then
            compared and dropped, and the target is noted down.
        bits: Bits of a quantised weight; None does not quantise.
        group_size: Quantised weights that share a scale.
        dtype: To store; None keeps the source's.
        kind: If its tensors do not say: plain EAGLE and MSD for LLaVA have the same.

    Raises:
        OSError: If the source is incomplete or the result cannot be written.
        ValueError: If the source is damaged, of no known kind, or does not fit `target`.
    """
    metadata: dict[str, object]
    if "draft_kind" in read_settings(source):
        model, metadata = load_network(source)
        remark = "It is in flash-mlx's layout already."
        stored: mx.Dtype = mx.float32
    else:
        model, stored, remark = _read_published(source, kind, target)
        metadata = {"source": {"name": name, "sha256": digest(source)}}
        if isinstance(family := read_settings(source).get("target_model_type"), str):
            metadata["target"] = {"model_type": family}
    if target is not None:
        metadata["target"] = _note(target)
    parameters = sum(value.size for value in _parameters(model).values())
    if bits is not None:
        nn.quantize(model, group_size, bits, class_predicate=lambda _, m: _fits(m, group_size))
    with appearing(mlx_path) as folder:
        save_drafter(model, folder, metadata, stored if dtype is None else dtype)
        size = (folder / "model.safetensors").stat().st_size
    return Converted(mlx_path, kind_of(model), parameters, size, (remark,))


def _read_published(
    source: Path, kind: str | None, target: Path | None
) -> tuple[DraftModel, mx.Dtype, str]:
    """Return a published drafter's network, the type it is stored in, and what was dropped."""
    settings, published = read_settings(source), read_tensors(source)
    kind = recognise(published.keys(), settings) if kind is None else kind
    if kind is None:
        raise ValueError(
            f"{source} must hold a drafter of a kind that flash-mlx knows: "
            f"{', '.join(KINDS)}. Its tensors are of none."
        )
    tensors = {ours: published[theirs] for theirs, ours in rename(published.keys()).items()}
    embedding = None if target is None else _target_embedding(target)
    keep, remark = _keep_embedding(kind, tensors.get(TABLE), embedding, str(target))
    config = make_config(kind, tensors, settings, own_embedding=keep)
    if embedding is not None:
        _check_against(config, embedding, source, str(target))
    if not keep:
        tensors.pop(TABLE, None)
    if "d2t" in tensors:
        tensors["d2t"] = tensors["d2t"].astype(mx.int32)
    model = KINDS[kind].model(config)
    _fill(model, tensors, source)
    stored: mx.Dtype = tensors["fc.weight" if "fc.weight" in tensors else "A"].dtype
    return model, stored, remark


def _target_embedding(folder: Path) -> mx.array:
    """Return the target's embedding, [V, D]; lazy."""
    read_config(folder)
    tensors = read_tensors(folder)
    names = [name for name in tensors if name.endswith(TABLE)]
    if len(names) != 1:
        raise ValueError(f"The target {folder} must have one {TABLE}; it has {len(names)}.")
    weight: mx.array = tensors[names[0]]
    stem = names[0].removesuffix("weight")
    if f"{stem}scales" not in tensors:
        return weight
    entry = read_settings(folder).get("quantization")
    entry = entry if isinstance(entry, dict) else {}
    scales, biases = tensors[f"{stem}scales"], tensors.get(f"{stem}biases")
    size, bits = int(entry.get("group_size", 64)), int(entry.get("bits", 4))
    plain: mx.array = mx.dequantize(weight, scales, biases, size, bits)
    return plain


def _keep_embedding(
    kind: str, own: mx.array | None, theirs: mx.array | None, target: str
) -> tuple[bool, str]:
    """Return whether the drafter keeps its embedding, and why."""
    if own is None:
        return False, "It brings no embedding: the target's is read."
    if kind == "flash":
        return False, "Its copy of the embedding was dropped: the target's is read."
    if theirs is None:
        return True, "Its embedding was kept; with --target, a copy of the target's is dropped."
    rows = min(own.shape[0], theirs.shape[0])
    same = own.shape[1] == theirs.shape[1] and bool(
        mx.array_equal(own[:rows].astype(mx.bfloat16), theirs[:rows].astype(mx.bfloat16)).item()
    )
    if same:
        return False, "Its embedding was dropped: it is a copy of the target's."
    return True, f"Its embedding was kept: it is not that of {target}."


def _check_against(
    config: FlashConfig | DecoderConfig, embedding: mx.array, source: Path, target: str
) -> None:
    """Require the sizes that a drafter shares with its target to be the same."""
    size = config.hidden_size
    if isinstance(config, DecoderConfig):
        size = config.feature_size or size
    rows, width = embedding.shape
    if size != width or config.vocab_size > rows:
        raise ValueError(
            f"A drafter must be made for its target: {source} has a hidden size of {size} and a "
            f"vocabulary of {config.vocab_size}, {target} has {width} and {rows}. Name its own "
            "target."
        )


def _fill(model: DraftModel, tensors: dict[str, mx.array], source: Path) -> None:
    """Put every tensor in its place, and fill every place."""
    places = {name: value.shape for name, value in _parameters(model).items()}
    floats = {n for n, v in _parameters(model).items() if mx.issubdtype(v.dtype, mx.floating)}
    if missing := sorted(places.keys() - tensors.keys()):
        raise ValueError(f"{source} must hold {', '.join(missing[:4])}; it does not.")
    if extra := sorted(tensors.keys() - places.keys()):
        raise ValueError(
            f"{source} must hold only tensors that flash-mlx has a use for; it has "
            f"{', '.join(extra[:4])} as well."
        )
    for name, shape in places.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} must have the shape {shape}; in {source} it has {tensors[name].shape}."
            )
        if name in floats and not mx.issubdtype(tensors[name].dtype, mx.floating):
            raise ValueError(
                f"{name} must hold floating-point numbers; in {source} it is {tensors[name].dtype}."
            )
    model.update(tree_unflatten(list(tensors.items())))
    if (ids := model.proposed_ids) is not None:
        check_ids(ids, model.config.vocab_size)


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def _note(target: Path) -> dict[str, object]:
    """Return what a drafter's notes say of its target."""
    config = read_config(target)
    entry = config.get("text_config")
    text = entry if isinstance(entry, dict) else config
    base = text.get("rope_theta")
    note = {
        "model_type": config.get("model_type"),
        "rope_base": float(base) if isinstance(base, int | float) else None,
        "num_layers": text.get("num_hidden_layers"),
        "sha256": digest(target),
    }
    return {name: value for name, value in note.items() if value is not None}


def _fits(module: nn.Module, group_size: int) -> bool:
    """Whether a layer can be quantised in groups of this size."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return False
    return bool(module.weight.shape[-1] % group_size == 0)
