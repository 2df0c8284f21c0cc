"""Models by name: a local folder, or a download from Hugging Face."""

from __future__ import annotations

import re
from pathlib import Path

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
