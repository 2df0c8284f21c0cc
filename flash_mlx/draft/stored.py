"""Costs on the disk: a small file each, whole or not at all, and believed only if sound."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_mlx import __version__, blas
from flash_mlx.cost import Costs
from flash_mlx.files import cache_folder, read_json
from flash_mlx.kernels.dispatch import mode


def machine() -> dict[str, str]:
    """Return what of this machine costs depend on."""
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    return {
        "version": __version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{mx.default_device()} {mx.device_info().get('device_name', '')}",
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "blas": blas.bind().name,
        "kernels": mode(),
        "mlx": metadata.version("mlx"),
    }


def _file(key: Mapping[str, str]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "costs" / f"{name}.json"


def store_costs(costs: Costs, key: Mapping[str, str]) -> Costs | None:
    """Write the costs whole and at once, unless there are sound ones already.

    Returns:
        Those that are stored now; None if nothing can be.
    """
    entry = {"key": dict(key), **asdict(costs)}
    with suppress(OSError):
        file = _file(key)
        new = file.with_name(f".{file.name}.{os.getpid()}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
            os.link(new, file)  # fails if another process was faster
        except OSError:
            if read_costs(key) is None:
                new.replace(file)
        finally:
            new.unlink(missing_ok=True)
    return read_costs(key)


def read_costs(key: Mapping[str, str]) -> Costs | None:
    """Return the costs stored under a key; None if there are none, or they are damaged."""
    try:
        file = _file(key)
        entry: dict[str, Any] = read_json(file)
        if entry["key"] != key:
            return None
        rounds, drafts = (
            tuple((int(count), float(seconds)) for count, seconds in entry[name])
            for name in ("rounds", "drafts")
        )
        return Costs(float(entry["plain"]), rounds, drafts)
    except (OSError, ValueError, TypeError, KeyError):
        return None
