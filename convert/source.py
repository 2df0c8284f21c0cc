"""Reading the weights of a checkpoint as they were published: safetensors, or a torch file.

A torch file is a pickle, and a pickle can run anything. Only torch's own reader of tensors alone
(`weights_only=True`) ever opens one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_mlx.files import read_header, read_json
from flash_mlx.hub import TORCH_FILE
from flash_mlx.targets.checks import INDEX, weight_files
from flash_mlx.targets.quiet import quiet

LEAST_TORCH = (2, 6)  # earlier ones could be made to run code even so


def read_settings(folder: Path) -> dict[str, object]:
    """Return `config.json`; empty without one, which some drafters lack."""
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def weights_of(folder: Path) -> list[Path]:
    """Return the files with the weights; safetensors if there are any.

    Raises:
        OSError: If there are none, or some are missing.
        ValueError: If an index or a header is damaged.
    """
    whole = (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))
    if not whole and (folder / TORCH_FILE).is_file():
        return [folder / TORCH_FILE]
    return weight_files(folder)


def tensor_names(folder: Path) -> set[str]:
    """Return the names of a checkpoint's tensors; none is read from safetensors.

    Raises:
        OSError: If weights are missing.
        ValueError: If they are damaged, or torch is needed and missing.
    """
    names: set[str] = set()
    for file in weights_of(folder):
        names |= _read_torch(file).keys() if file.name == TORCH_FILE else read_header(file).keys()
    return names


def read_tensors(folder: Path) -> dict[str, mx.array]:
    """Return a checkpoint's tensors under their own names; those of safetensors are lazy.

    Raises:
        OSError: If weights are missing.
        ValueError: If they are damaged, or torch is needed and missing.
    """
    tensors: dict[str, mx.array] = {}
    for file in weights_of(folder):
        if file.name == TORCH_FILE:
            tensors |= _read_torch(file)
        else:
            read_header(file)
            found = mx.load(str(file))
            assert isinstance(found, dict)  # noqa: S101  what a safetensors file holds
            tensors |= found
    return tensors


def digest(folder: Path) -> str:
    """Return the SHA-256 of the digests of a checkpoint's weight files, in order of their names."""
    whole = hashlib.sha256()
    for file in weights_of(folder):
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def _read_torch(file: Path) -> dict[str, mx.array]:
    """Return the tensors of a torch file without running anything of it."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{file} is a torch file, and reading it needs torch: "
            "pip install 'flash-mlx[torch]'. Or use a checkpoint in safetensors."
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < LEAST_TORCH:
        raise ValueError(
            f"{file} needs torch {'.'.join(map(str, LEAST_TORCH))} or newer to be read safely; "
            f"this is {torch.__version__}. Run pip install -U 'flash-mlx[torch]'."
        )
    must = f"{file} must be a whole torch file that holds tensors by name and nothing else"
    try:
        with quiet():
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip files and torch raise classes of their own
        # Not in torch's words: they advise to read it unsafely.
        raise ValueError(f"{must}; nothing in it was run ({type(error).__name__}).") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{must}; it holds something else.")
    return {name: _to_mlx(value.detach().contiguous(), torch) for name, value in state.items()}


def _to_mlx(tensor: Any, torch: Any) -> mx.array:
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())
