"""Keys or values of a drafter, in a buffer that grows in steps.

Shapes:
    H: key-value heads.    R: rows written.    Dh: width of a head.
"""

from __future__ import annotations

import mlx.core as mx

GROWTH = 256  # entries by which a buffer grows: rarely, and not by much more than is needed


def write_rows(buffer: mx.array, rows: mx.array, start: int) -> mx.array:
    """Return the buffer with rows [1, H, R, Dh] at `start`, larger if need be.

    The given buffer is not changed. When nobody else holds it, MLX reuses its memory.
    """
    missing = start + rows.shape[2] - buffer.shape[2]
    if missing > 0:
        grown = -(-missing // GROWTH) * GROWTH
        shape = (*buffer.shape[:2], grown, buffer.shape[3])
        buffer = mx.concatenate([buffer, mx.zeros(shape, dtype=buffer.dtype)], axis=2)
    return mx.slice_update(buffer, rows, mx.array([start]), axes=[2])
