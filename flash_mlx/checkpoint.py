"""Drafters on disk: a folder with `config.json` and `model.safetensors`. And where folders are.

Reading is strict, because a drafter with a tensor missing still drafts, only badly: whatever does
not fit is an error that names it. Writing is atomic: a reader sees the old files or the new ones.

`config.json` holds `"draft_kind": "flash"`, the settings of `FlashConfig`, and what was told about
the target (`target`) and the training (`training`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from flash_mlx.decode import Target
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel
from flash_mlx.few_rows import lay_out_for_few_rows
from flash_mlx.files import Tensor, read_header, read_json, replacing

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KIND = "flash"
NOTES = ("target", "training")  # entries of config.json that are not settings of the model
FLOATS = ("F32", "F16", "BF16")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt"]


def resolve_path(id_or_dir: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a model: a folder itself, or a download from Hugging Face.

    Args:
        id_or_dir: A folder, or an id such as `org/name`.
        revision: Branch, tag or commit on the hub; a folder has none.

    Raises:
        OSError: If there is no such folder and the hub gives none either.
    """
    text = str(id_or_dir)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if text and path.exists():
        raise NotADirectoryError(
            f"A model must be a folder or a Hugging Face id; {text} is a file."
        )
    if isinstance(id_or_dir, Path) or not HUB_ID.fullmatch(text) or text.startswith("."):
        raise FileNotFoundError(
            f"There is no folder {text!r}, and it is not a Hugging Face id of the form org/name."
        )
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(text, revision=revision, allow_patterns=HUB_FILES)
    except Exception as error:  # the hub's errors and those of the connection share no base
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"There is no folder {text}, and Hugging Face did not give a model of that id"
            f"{f' at revision {revision}' if revision else ''}: {reason[0]} "
            "If it is on this machine, pass its folder; if access is gated, run `hf auth login`."
        ) from error
    return Path(found)


def load_drafter(
    path: Path, target: Target, block_size: int | None = None, *, model_type: str | None = None
) -> FlashDrafter:
    """Load a drafter for a target, in the target's own dtype.

    Args:
        path: The drafter's folder.
        target: Lends its embedding and its LM head.
        block_size: Tokens to draft in a pass, if not the drafter's own number.
        model_type: The target's family, held against the one that the drafter names, if any.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a file is damaged, or the drafter was made for another target.
    """
    config, notes = _read(path)
    _check_model_type(path, notes.get("target"), model_type)
    for name, ours, theirs in (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("vocabulary", config.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"A drafter must be made for its target: the drafter in {path} expects a {name} "
                f"of {ours}, this target's is {theirs}. Use the drafter of this target."
            )
    model = _load(path, config, target.embed(mx.array([0])).dtype)
    lay_out_for_few_rows(model)
    return FlashDrafter(model, target.embed, target.lm_head, block_size)


def load_model(path: Path, dtype: mx.Dtype = mx.float32) -> FlashModel:
    """Load a drafter's network, to go on training it or to draft with it.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If `config.json` or `model.safetensors` is damaged or does not fit the other.
    """
    return _load(path, read_config(path), dtype)


def _load(path: Path, config: FlashConfig, dtype: mx.Dtype) -> FlashModel:
    model = FlashModel(config)
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    expected = {name: value.shape for name, value in flat}
    file = _require(path, WEIGHTS)
    _check_shapes(file, read_header(file), expected)
    stored = cast(dict[str, mx.array], mx.load(str(file)))
    weights = {name: value.astype(dtype) for name, value in stored.items()}
    finite = {name: mx.isfinite(value).all() for name, value in weights.items()}
    mx.eval(weights, finite)
    if broken := sorted(name for name, good in finite.items() if not good.item()):
        raise ValueError(
            f"A drafter's weights must be finite numbers; in {file}, {_some(broken)} "
            f"{'holds' if len(broken) == 1 else 'hold'} NaN or infinity in {dtype}."
        )
    model.update(tree_unflatten(list(weights.items())))
    return model


def read_config(path: Path) -> FlashConfig:
    """Return the settings in a drafter's `config.json`.

    Raises:
        OSError: If the folder has none.
        ValueError: If it is not a FLASH drafter's.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[FlashConfig, dict[str, object]]:
    """Return settings and notes."""
    file = _require(path, CONFIG)
    content = read_json(file)
    if (kind := content.pop("draft_kind", None)) != KIND:
        raise ValueError(
            f'{file} must say "draft_kind": "{KIND}"; it says {json.dumps(kind)}. '
            "Pass the folder of a drafter made with flash-mlx, not a target's."
        )
    notes = {name: content.pop(name) for name in NOTES if name in content}
    try:
        return FlashConfig.from_dict(content), notes
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_model_type(path: Path, note: object, theirs: str | None) -> None:
    """Require the target's family to be the one that the drafter names, if both are known."""
    ours = note.get("model_type") if isinstance(note, Mapping) else None
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f"A drafter must be made for its target: the drafter in {path} is for the model type "
            f"{ours!r}, this target's is {theirs!r}. Use the drafter of this target."
        )


def save_drafter(
    model: FlashModel,
    path: Path,
    metadata: Mapping[str, object],
    dtype: mx.Dtype = mx.float32,
) -> None:
    """Write a drafter's folder; an older drafter in it is replaced file by file.

    Args:
        model: The network.
        path: The folder; made if there is none.
        metadata: What to tell about the `target` (model type, hash or name) and the `training`.
        dtype: Of the stored weights.

    Raises:
        ValueError: If the metadata has other entries, or a weight is not finite.
        OSError: If the folder cannot be written; nothing is left behind.
    """
    if unknown := sorted(metadata.keys() - set(NOTES)):
        raise ValueError(f"Metadata must be among {NOTES}; got {_some(unknown)}.")
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    weights = {name: value.astype(dtype) for name, value in flat}
    for name, value in weights.items():
        if not mx.isfinite(value).all().item():
            raise ValueError(f"{name} must be finite to be saved as {dtype}, and is not.")
    config = {"draft_kind": KIND, **model.config.to_dict(), **metadata}
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / WEIGHTS) as file:
        mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    with replacing(path / CONFIG) as file:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_shapes(
    file: Path,
    header: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
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
    for name, shape in expected.items():
        found = header[name]
        if found.shape != shape or found.dtype not in FLOATS:
            raise ValueError(
                f"{name} must have the shape {shape} by config.json and one of the types "
                f"{', '.join(FLOATS)}; in {file} it is {found.dtype} of the shape {found.shape}."
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
