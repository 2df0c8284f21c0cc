"""A sum over rows, and its gradient, with the arrays of a few rows in memory at a time.

Shapes:
    n: base rows.    k: slots.    D: hidden size.    V: vocabulary.    r: rank of a correction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

Sums = tuple[mx.array, mx.array, mx.array]


def one_after_another(part: Callable[..., Sums], size: int) -> Callable[..., Sums]:
    """Return what sums a function over pieces of its rows, with one piece's arrays at a time.

    The gradient of a piece is computed with it, and the next piece waits for both. Recomputing
    (mx.checkpoint) would not do: nothing keeps MLX from having all pieces under way at once.

    Args:
        part: Of rows [n, k, D], teacher [n, k], mask [n, k] and either nothing more or what the
            tokens before say [n, k - 1, r] and who listens [V, r] -> three sums. Gradients flow
            from the first to all but teacher and mask.
        size: Rows of a piece.

    Returns:
        The same function of all rows.
    """

    def pieces(rows: mx.array, teacher: mx.array, mask: mx.array, *markov: mx.array) -> list[Any]:
        """Return the three sums, and the first one's gradient to rows and markov."""
        with_change = mx.value_and_grad(part, argnums=(0, 3, 4)[: 1 + len(markov)])
        sums: list[mx.array] = []
        changes: list[list[mx.array]] = []
        for cut in (slice(i, i + size) for i in range(0, rows.shape[0], size)):
            first = rows[cut]
            if changes:
                first = mx.depends([first], [*sums, *changes[-1]])[0]
            more = [markov[0][cut], *markov[1:]] if markov else []
            new, change = with_change(first, teacher[cut], mask[cut], *more)
            sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else list(new)
            changes.append(list(change) if markov else [change])
        to_rows, *to_markov = zip(*changes, strict=True)
        joined = [mx.concatenate(list(each)) for each in (to_rows, *to_markov[:1])]
        return [*sums, *joined, *(mx.stack(list(each)).sum(axis=0) for each in to_markov[1:])]

    summed: Any = mx.custom_function(pieces)

    def back(primals: list[mx.array], changes: list[mx.array], outputs: list[mx.array]) -> Any:
        to_rows, *to_markov = (changes[0] * each for each in outputs[3:])
        return to_rows, mx.zeros_like(primals[1]), mx.zeros_like(primals[2]), *to_markov

    summed.vjp(back)

    def whole(*given: mx.array) -> Sums:
        loss, share, agreed = summed(*given)[:3]
        return loss, mx.stop_gradient(share), mx.stop_gradient(agreed)

    return whole
