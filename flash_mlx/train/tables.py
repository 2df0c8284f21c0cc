"""Rows of Parquet files and of data sets on the Hugging Face hub. Needs the extra `train`.

`datasets` reads them: tables only, for since version 4 it runs no code that a data set brings
along. Pictures come inside of the rows; those of the rows that are used are written down once, in a
folder of the cache, under the SHA-256 of their content, and are files like any other from there on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flash_mlx.files import cache_folder, replacing
from flash_mlx.hub import HUB_ID

TABLES = (".parquet",)
KINDS = ("image", "images")


def is_table(data: str) -> bool:
    """Whether data are Parquet, a file or a folder of files, or else look like a hub id."""
    path = Path(data).expanduser()
    if path.is_dir():
        return any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))
    if path.exists():
        return path.suffix.lower() in TABLES
    return bool(HUB_ID.fullmatch(data)) and "/" in data and not data.startswith(".")


def read_table(
    data: str, split: str, draw: Callable[[list[int]], list[int]]
) -> list[tuple[str, Any]]:
    """Return rows with their places; pictures are full paths, text stays as it is.

    Args:
        data: For which `is_table` holds.
        split: Part of it.
        draw: Chooses among the rows' numbers.

    Raises:
        OSError: If the data set cannot be had, or `datasets` is not installed.
        ValueError: If there is no such split.
    """
    table = _load(data, split)
    rows: list[tuple[str, Any]] = []
    for number in draw(list(range(len(table)))):
        place = f"{data}[{number}]"
        try:
            rows.append((place, _with_files(table[number])))
        except (ValueError, OSError) as error:
            rows.append((place, ValueError(str(error))))
    return rows


def _load(data: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise OSError(
            "Parquet and hub data sets need the extra train: pip install 'flash-mlx[train]'."
        ) from error
    path = Path(data).expanduser()
    try:
        if path.is_file():
            table = datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)
        else:
            table = datasets.load_dataset(str(path) if path.is_dir() else data, split=split)
    except ValueError as error:
        raise ValueError(f"{data} must have a split {split!r}: {_line(error)}") from error
    except Exception as error:  # those of the hub, of the connection and of Arrow share no base
        raise OSError(
            f"There is no file or folder {data}, and no data set of that id could be had: "
            f"{_line(error)}. Check the name; if it is gated, run `hf auth login`."
        ) from error
    for name, feature in table.features.items():
        if name in KINDS:  # as files: what a picture is, is looked at later, as with all others
            table = table.cast_column(name, _undecoded(datasets, feature))
    return table


def _undecoded(datasets: Any, feature: Any) -> Any:
    """Return a column's type with its pictures left as bytes."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(datasets, feature.feature))
    return feature


def _with_files(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in which pictures are files.

    Raises:
        OSError: If one cannot be written.
        ValueError: If a picture or video is a name: no row may choose among this machine's files.
    """
    filled = {name: value for name, value in row.items() if value is not None}
    if filled.get("video") or filled.get("videos"):
        raise ValueError("a row of a table must hold its pictures itself; videos are not read")
    for name in KINDS:
        if name in filled:
            given = filled[name] if isinstance(filled[name], list) else [filled[name]]
            filled[name] = [_as_file(each) for each in given]
    return filled


def _as_file(picture: Any) -> str:
    """Return the path of a picture: of a name, of bytes, or of a struct of both."""
    content = picture.get("bytes") if isinstance(picture, Mapping) else picture
    if not isinstance(content, bytes):
        raise ValueError("a picture must be in the row itself; this one is elsewhere")
    file = cache_folder() / "pictures" / f"{hashlib.sha256(content).hexdigest()}.image"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:
            new.write_bytes(content)
    return str(file)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
