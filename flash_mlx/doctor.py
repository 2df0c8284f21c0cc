"""What this machine is and what it does to speculative decoding.

Speculative decoding pays where a pass over several rows costs little more than a pass over one.
`examine` measures that for one float32 matrix product, and says which backend and BLAS do it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import mlx.core as mx

from flash_mlx import blas
from flash_mlx.blas import BlasInfo
from flash_mlx.kernels.dispatch import state
from flash_mlx.measure import ROWS, seconds_in_turns
from flash_mlx.targets.quantized import KERNELS

PACKAGES = ("flash-mlx", "mlx", "mlx-vlm", "mlx-lm", "transformers", "numpy")


@dataclass(frozen=True)
class Report:
    """A machine as flash-mlx sees it.

    Attributes:
        system: Operating system and processor architecture.
        processor: What MLX calls the device that computes.
        cores: Logical processor cores.
        memory_gb: Main memory [GB].
        python: Version of Python.
        versions: Version of each package; None where it is not installed.
        device: MLX's default device, `gpu` or `cpu`.
        backend: `Metal`, `CUDA` or `CPU`.
        blas: Which BLAS the CPU backend uses.
        row_cost: Rows to the time of a matrix product over them, over the time of one row.
        row_seconds: Time of the product over one row [s].
        kernels: Each Metal kernel's state, and why.
    """

    system: str
    processor: str
    cores: int
    memory_gb: float
    python: str
    versions: Mapping[str, str | None]
    device: str
    backend: str
    blas: BlasInfo
    row_cost: Mapping[int, float]
    row_seconds: float
    kernels: Mapping[str, str]


def examine() -> Report:
    """Look at this machine; takes about a second.

    Returns:
        The report, with the row costs measured now.
    """
    device = mx.default_device().type.name
    seconds = matmul_seconds(ROWS)
    return Report(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=str(mx.device_info().get("device_name", "unknown")),
        cores=os.cpu_count() or 1,
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        device=device,
        backend=_backend(device),
        blas=blas.bind(),
        row_cost={rows: seconds[rows] / seconds[1] for rows in ROWS},
        row_seconds=seconds[1],
        kernels={kernel.name: state(kernel) for kernel in KERNELS},
    )


def matmul_seconds(rows: Sequence[int], *, size: int = 2048, repeats: int = 15) -> dict[int, float]:
    """Time a float32 matrix product over several numbers of rows.

    Args:
        rows: Numbers of rows R.
        size: D of the [R, D] by [D, D] product, weights stored as a linear layer stores them.
        repeats: Measurements of each.

    Returns:
        Rows to the median time [s].
    """
    key = mx.random.key(0)
    weight = mx.random.normal((size, size), key=key)
    inputs = {count: mx.random.normal((count, size), key=key) for count in rows}
    mx.eval(weight, *inputs.values())

    def product(x: mx.array) -> mx.array:
        return x @ weight.T

    return seconds_in_turns({count: partial(product, x) for count, x in inputs.items()}, repeats)


def _backend(device: str) -> str:
    if device != "gpu":
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
