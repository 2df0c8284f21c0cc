"""A folder that appears all at once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `folder` when all is done, and vanishes if anything fails.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    require_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folder is its owner's alone
        partial.replace(folder)
    except RuntimeError as error:  # MLX says so when a disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} could not be written: {error}") from error
    except BaseException:  # an interrupt too must leave nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_new(folder: Path) -> None:
    """Require a folder that does not exist, or is empty.

    Raises:
        FileExistsError: If it is anything else.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"The folder to write must be new or empty; {folder} exists. "
            "Remove it or choose another."
        )
