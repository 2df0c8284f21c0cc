"""A target's Hugging Face checkpoint to an MLX checkpoint, through mlx-vlm.

The result appears all at once: it is written to a folder beside the wanted one and renamed when it
is complete, so an interrupted conversion leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from flash_mlx import blas
from flash_mlx.checkpoint import resolve_path


def convert_target(
    hf_path: str,
    mlx_path: Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    revision: str | None = None,
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

    Returns:
        The written folder.

    Raises:
        FileExistsError: `mlx_path` exists and is not an empty folder.
        FileNotFoundError: `hf_path` is neither a checkpoint's folder nor a hub id that is found.
        ValueError: The checkpoint cannot be read.
    """
    from mlx_vlm.convert import convert

    blas.require()
    if mlx_path.exists() and (not mlx_path.is_dir() or any(mlx_path.iterdir())):
        raise FileExistsError(
            f"The folder to write must be new or empty; {mlx_path} exists. "
            "Remove it or choose another."
        )
    source = resolve_path(hf_path, revision)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"A checkpoint's folder must hold config.json; {str(source)!r} does not."
        )
    mlx_path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{mlx_path.name}-", dir=mlx_path.parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            convert(
                str(source),
                str(partial),
                quantize=bits is not None,
                q_bits=bits or 4,
                q_group_size=group_size,
                dtype=dtype,
                trust_remote_code=False,
            )
        partial.chmod(0o755)  # mkdtemp's folder is its owner's alone
        partial.replace(mlx_path)
    except BaseException:  # an interrupt too must leave nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return mlx_path
