"""Is this folder a checkpoint that can be loaded? Asked before mlx-vlm sees it.

mlx-vlm executes the file that `model_file` in `config.json` names, and skips shards that are
missing. Both end here, and damaged files end with a sentence instead of a traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flash_mlx.files import read_header, read_json

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's `config.json`.

    Raises:
        FileNotFoundError: If there is no such folder or no `config.json` in it.
        NotADirectoryError: If it is a file.
        ValueError: If `config.json` is damaged or names code to execute.
    """
    wanted = "The model must be a folder with a Hugging Face checkpoint"
    if not folder.exists():
        raise FileNotFoundError(f"{wanted}; {folder} does not exist. Check the path.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{wanted}; {folder} is a file. Give the folder it is in.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{wanted}; {folder} has no config.json.")
    config = read_json(folder / "config.json")
    if "model_file" in config:
        raise ValueError(
            f"A checkpoint must not bring its own code; {folder / 'config.json'} names "
            f"{config['model_file']!r} as model_file. flash-mlx never executes it."
        )
    return config


def check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """See that the weights are not packed in a way that only PyTorch unpacks.

    Raises:
        ValueError: If bitsandbytes packed them.
    """
    settings = config.get("quantization_config")
    settings = settings if isinstance(settings, dict) else {}
    names = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).is_file() else {}
    marked = isinstance(names, dict) and any("bitsandbytes" in name for name in names)
    if marked or settings.get("quant_method") == "bitsandbytes":
        kind = settings.get("bnb_4bit_quant_type", "4 or 8 bits")
        raise ValueError(
            f"Weights must be plain or quantised by MLX; those in {folder} are packed by "
            f"bitsandbytes ({kind}). Take the original checkpoint; `flash-mlx convert -q` "
            "quantises it."
        )


def check_files(folder: Path) -> None:
    """See that weights, tokenizer and processor are there and whole.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is damaged.
    """
    for names, what in ((TOKENIZER_FILES, "tokenizer"), (PROCESSOR_FILES, "image processor")):
        if not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(
                f"The checkpoint must bring its {what}; {folder} has none of {', '.join(names)}."
            )
    for file in weight_files(folder):
        read_header(file)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the weights.

    Raises:
        FileNotFoundError: If there are none, or the index names one that is missing.
        ValueError: If the index is damaged or names a file outside the folder.
    """
    if not (folder / INDEX).is_file():
        files = sorted(folder.glob("*.safetensors"))
        files = [file for file in files if file.name != "consolidated.safetensors"]
        if not files:
            raise FileNotFoundError(
                f"The checkpoint must have its weights in .safetensors files; {folder} has none. "
                "Convert it first."
            )
        return files
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} must map weights to files; its weight_map is empty.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} must name .safetensors files beside it; it names {name!r}."
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / INDEX} names {name}, which is missing. Download the checkpoint again."
            )
    return [folder / name for name in names]
