"""Models by name: a local folder, or a download from Hugging Face.

Before a download, its size is held against the free disk and this machine's memory. Downloads are
kept in Hugging Face's cache, go on where they were cut, and are not asked for again offline.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
TORCH_FILE = "pytorch_model.bin"
FORCE = "FLASH_MLX_FORCE"  # environment variable: download whatever the size


def resolve_path(
    id_or_dir: str | Path,
    revision: str | None = None,
    *,
    torch_files: bool = False,
    force: bool = False,
    only: Sequence[str] = HUB_FILES,
) -> Path:
    """Return the local folder of a model: a folder itself, or a download from Hugging Face.

    Args:
        id_or_dir: A folder, or an id such as `org/name`.
        revision: Branch, tag or commit on the hub; a folder has none.
        torch_files: Whether a torch file is wanted where there are no safetensors.
        force: Download even if disk or memory seem too small.
        only: Patterns of the files to download.

    Raises:
        OSError: If there is no such folder and the hub gives none either, or the download would
            not fit.
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
    from huggingface_hub import constants, snapshot_download

    patterns = list(only)
    try:
        files = _list(text, revision)
        whole = any(name.endswith(".safetensors") for name in files)
        if torch_files and files and not whole:
            patterns.append(TORCH_FILE)
        elif torch_files and constants.HF_HUB_OFFLINE:
            patterns.append(TORCH_FILE)  # what the cache has
        wanted = {n: s for n, s in files.items() if any(fnmatch(n, each) for each in patterns)}
        if not (force or os.environ.get(FORCE, "0") not in ("", "0")):
            _require_room(text, wanted, Path(constants.HF_HUB_CACHE))
        found = snapshot_download(text, revision=revision, allow_patterns=patterns)
    except NoRoomError:
        raise
    except Exception as error:  # the hub's errors and those of the connection share no base
        raise OSError(
            f"There is no folder {text}, and Hugging Face did not give a model of that id"
            f"{f' at revision {revision}' if revision else ''}: {_reason(error)} "
            "If it is on this machine, pass its folder; if access is gated, run `hf auth login`."
        ) from error
    return Path(found)


class NoRoomError(OSError):
    """A download would not fit on the disk or in memory."""


def _list(repo: str, revision: str | None) -> dict[str, int]:
    """Return name and size [bytes] of the files still to be downloaded; none if nobody can say."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return {}
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code >= 500:
            return {}  # the hub is ill; the cache may do
        raise
    except Exception:  # noqa: BLE001  no connection, of whatever class: the cache may do
        return {}
    return {
        file.rfilename: file.size or 0
        for file in info.siblings or []
        if not isinstance(try_to_load_from_cache(repo, file.rfilename, revision=info.sha), str)
    }


def _require_room(repo: str, files: dict[str, int], cache: Path) -> None:
    """Require files to fit on the disk, and weights in memory."""
    needed = sum(files.values())
    weights = sum(size for name, size in files.items() if name.endswith((".safetensors", ".bin")))
    folder = next(each for each in (cache, *cache.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for what, size, room, place in (
        ("disk space", needed, free, f"{folder} has"),
        ("memory", weights, memory, "this machine has"),
    ):
        if size > room:
            raise NoRoomError(
                f"The download of {repo} must find enough {what}: it takes {size / 1e9:.1f} GB, "
                f"{place} {room / 1e9:.1f} GB. Choose a smaller or quantised model, or pass "
                f"--force (or set {FORCE}=1) to download it all the same."
            )


def _reason(error: Exception) -> str:
    """Return why the hub gave nothing, in a sentence."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access to it is gated, and this machine has none."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it has no such model, or a private one."
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision."
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return "it is not in the cache, and the hub is out of reach (offline?)."
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
