"""A target's Hugging Face checkpoint to an MLX checkpoint, through mlx-vlm.

The result appears all at once: it is written to a folder beside the wanted one and renamed when it
is complete, so an interrupted conversion leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

from flash_mlx import blas
from flash_mlx.convert.folder import appearing, require_new
from flash_mlx.hub import resolve_path
from flash_mlx.targets.checks import check_files, read_config
from flash_mlx.targets.families import family_of
from flash_mlx.targets.load import load_target
from flash_mlx.targets.quiet import complaining

TEMPLATES = "additional_chat_templates"  # the one subfolder that processors read


def convert_target(
    hf_path: str,
    mlx_path: Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    revision: str | None = None,
    upload_repo: str | None = None,
    force: bool = False,
) -> Path:
    """Convert a vision-language model to MLX's weight names and, if asked, quantise it.

    The vision tower keeps its precision. What mlx-vlm says meanwhile goes to stderr.

    Args:
        hf_path: A folder or a hub id.
        mlx_path: Folder to write; must not exist, or be empty.
        bits: Bits of a quantised weight; None does not quantise.
        group_size: Quantised weights that share a scale.
        dtype: `float16`, `bfloat16` or `float32`; None keeps what the checkpoint names.
        revision: Branch, tag or commit of a hub id.
        upload_repo: Hub id to upload the result to; None does not.
        force: Download even if disk or memory seem too small.

    Returns:
        The written folder.

    Raises:
        FileExistsError: `mlx_path` exists and is not an empty folder.
        FileNotFoundError: `hf_path` is no checkpoint's folder, one of its files is missing, or
            there is no such hub id.
        ValueError: The checkpoint is damaged or brings code of its own, or `mlx_path` lies in it.
    """
    blas.require()
    require_new(mlx_path)
    source = resolve_path(hf_path, revision, force=force)
    config = read_config(source)  # mlx-vlm would execute the code that `model_file` names
    family_of(config.get("model_type"))  # the result could not be loaded
    check_files(source)  # and do without shards that are missing
    if mlx_path.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"The folder to write must not lie in the one to convert; got {mlx_path}. "
            "Choose one elsewhere."
        )
    from mlx_vlm.convert import convert

    with appearing(mlx_path) as partial:
        with (
            contextlib.redirect_stdout(sys.stderr),
            complaining(f"mlx-vlm must be able to convert {source}"),
        ):
            convert(
                str(source),
                str(partial),
                quantize=bits is not None,
                q_bits=bits or 4,
                q_group_size=group_size,
                dtype=dtype,
                trust_remote_code=False,
            )
        _remove_extras(partial)
        load_target(partial)  # whose self-test reads a prompt, a chain and a tree
    if upload_repo is not None:
        from mlx_vlm.utils import upload_to_hub

        with contextlib.redirect_stdout(sys.stderr), complaining("The hub must take the upload"):
            upload_to_hub(str(mlx_path), upload_repo)
    return mlx_path


def _remove_extras(folder: Path) -> None:
    """Remove what mlx-vlm copies from the source besides a checkpoint: code and subfolders."""
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name != TEMPLATES:
                shutil.rmtree(path)
        elif path.suffix == ".py":
            path.unlink()
