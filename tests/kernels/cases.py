"""One small call of each kernel for each type and template, for all tests that go through them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flash_mlx.kernels.dispatch import Kernel
from flash_mlx.kernels.latent_pool import LATENT_POOL

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        name: Of the case.
        kernel: What is called.
        make: Returns the arguments.
    """

    name: str
    kernel: Kernel
    make: Callable[[], tuple[Any, ...]]


def normal(
    *shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0, scale: float = 1.0
) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(dtype)


def pool_arguments(
    num_latents: int, num_rows: int, size: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    # Scores of about 1: else one row of the image takes all.
    queries = normal(num_latents, size, dtype=dtype, seed=1, scale=size**-0.5)
    return queries, normal(num_rows, size, dtype=dtype, seed=2)


def short(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


CASES = [
    Case(
        f"latent_pool-{m}x{n}x{d}-{short(dtype)}",
        LATENT_POOL,
        lambda m=m, n=n, d=d, dtype=dtype: pool_arguments(m, n, d, dtype),
    )
    for m, n, d in ((8, 40, 64), (5, 33, 72))
    for dtype in FLOATS
]
