"""Making and launching Metal kernels; the only place that knows `mx.fast.metal_kernel`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

SMALLEST_INPUT = 8  # elements; MLX puts smaller ones in another address space, as another type

TEMPLATES = (
    "#include <metal_simdgroup>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
)

# Where a lane's two elements of an 8 x 8 simdgroup matrix stand: (row, column), (row, column + 1).
# Apple does not document it; MLX's own kernels rely on it, and the first-use test notices a change.
PLACES = r"""
inline int flash_row(uint lane) {
  return int((lane / 4) & 4) + int((lane / 2) % 4);
}
inline int flash_column(uint lane) {
  return int((lane / 4) & 2) * 2 + int(lane % 2) * 2;
}
"""


Constant = int | bool | mx.Dtype  # a template's value


@dataclass(frozen=True)
class Source:
    """A kernel's text.

    Attributes:
        name: Of the kernel.
        inputs: Names of its inputs in the text.
        outputs: Names of its outputs.
        body: The function's body, in Metal's language.
        header: What stands before the function.
        contiguous: Whether MLX copies inputs that do not lie row after row; else the text has to
            use their strides.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    header: str = TEMPLATES
    contiguous: bool = True


def available() -> bool:
    """Whether kernels run where arrays are computed by default."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def generation() -> int:
    """Return the generation of an Apple GPU: 13 of M1, 17 of M5; 0 of anything else."""
    found = re.fullmatch(r"applegpu_g(\d+)\w*", str(mx.device_info().get("architecture", "")))
    return int(found[1]) if found else 0


def device_name() -> str:
    """Return what the default device calls itself."""
    return str(mx.device_info().get("device_name", "unknown"))


def launch(
    source: Source,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    *,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Sequence[tuple[str, Constant]] = (),
) -> list[mx.array]:
    """Queue a kernel; nothing is evaluated.

    Args:
        source: The kernel.
        inputs: In the order of its names, each with 8 elements or more, or none axis.
        outputs: Shape and type of each.
        grid: Threads in all.
        threadgroup: Threads of a threadgroup.
        template: The text's compile-time constants.

    Returns:
        The outputs.
    """
    made: list[mx.array] = build(source)(
        inputs=list(inputs),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        grid=grid,
        threadgroup=threadgroup,
        template=list(template),
    )
    return made


def padded(array: mx.array) -> mx.array:
    """Return a small array, flat and with zeros behind it, so that it is a `device` input."""
    flat = array.flatten()
    return flat if flat.size >= SMALLEST_INPUT else mx.pad(flat, (0, SMALLEST_INPUT - flat.size))


@lru_cache(maxsize=1024)
def scalar(value: float, dtype: mx.Dtype = mx.int32) -> mx.array:
    """Return a number as an array without axes, the same each time."""
    return mx.array(value, dtype)


def fingerprint(sources: Sequence[Source]) -> str:
    """Return a name for what these kernels are made of."""
    return hashlib.sha256(repr(sources).encode()).hexdigest()[:16]


@cache
def build(source: Source) -> Callable[..., Any]:
    """Return the kernel of a text, made once."""
    kernel: Any = mx.fast.metal_kernel(
        name=source.name,
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=source.body,
        header=source.header,
        ensure_row_contiguous=source.contiguous,
    )
    made: Callable[..., Any] = kernel
    return made
