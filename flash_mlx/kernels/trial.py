"""Trying kernels out: which are right on this machine, and is the fastest of them faster?

Shapes:
    Those of the operation that is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from flash_mlx.kernels.decisions import Decision
from flash_mlx.timing import seconds_in_turns

# Largest difference from the float32 definition over its largest value, by type.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.5e-2}
REPEATS = 9  # of each form in the timing
OPS = 0  # place of MLX's operations in a timing; those of the forms follow

Arrays = Sequence[mx.array]


def try_out(
    ops: Callable[..., Arrays],
    forms: Mapping[str, Callable[..., Arrays]],
    arguments: Sequence[Any],
) -> Decision:
    """Test and time kernels on arguments like these; never raises what a kernel raises.

    Args:
        ops: The definition.
        forms: The kernels, one or more, by name.
        arguments: Shapes and types that count; float and packed arrays are replaced by random
            ones.
    """
    arguments = [_stand_in(x, mx.random.key(i)) for i, x in enumerate(arguments)]
    tested = {name: _test(ops, launch, arguments) for name, launch in forms.items()}
    right = [name for name, outcome in tested.items() if outcome.use]
    if not right:
        return next(iter(tested.values()))
    runs = {place: _seconds(forms[name], arguments) for place, name in enumerate(right, OPS + 1)}
    times = seconds_in_turns({OPS: _seconds(ops, arguments), **runs}, REPEATS)
    best = min(runs, key=lambda place: times[place])
    name = right[best - OPS - 1]
    reason = f"{times[OPS] / times[best]:.2f} times the speed of MLX's operations"
    faster = times[best] < times[OPS]
    return Decision(faster, reason, tested[name].error, times[best], times[OPS], name)


def _test(
    ops: Callable[..., Arrays], launch: Callable[..., Arrays], arguments: Sequence[Any]
) -> Decision:
    """Return whether a kernel is right, and if not, why."""
    try:
        first, second = list(launch(*arguments)), list(launch(*arguments))
        mx.eval(first, second)
    except Exception as problem:  # noqa: BLE001  whatever Metal says, MLX's operations still work
        return Decision(False, f"it does not run: {' '.join(str(problem).split())[:200]}")
    if not all(_same_bits(a, b) for a, b in zip(first, second, strict=True)):
        return Decision(False, "it does not give the same bits twice")
    error, allowed = worst_error(first, definition(ops, arguments))
    if not error <= allowed:
        return Decision(False, f"it is wrong by {error:.1e}, {allowed:.1e} allowed", error)
    return Decision(True, "it is right", error)


def definition(ops: Callable[..., Arrays], arguments: Sequence[Any]) -> list[mx.array]:
    """Return what the definition says in float32, computed on the CPU.

    In 16 bits MLX's CPU operations are less exact than the kernels, and a GPU may shorten float32
    inside a matrix product.
    """
    with mx.stream(mx.cpu):
        expected = list(ops(*(_widen(x) for x in arguments)))
        mx.eval(expected)
    return expected


def worst_error(found: Arrays, expected: Arrays) -> tuple[float, float]:
    """Return the error that exceeds its tolerance most, and that tolerance.

    Floats: largest difference over the largest value expected. Integers: share that differs, which
    has to be 0. NaN and infinities have to be where they are expected.
    """
    pairs = [
        (_error(a, b), TOLERANCE.get(a.dtype, 0.0)) for a, b in zip(found, expected, strict=True)
    ]
    return max(pairs, key=lambda pair: pair[0] - pair[1])


def _error(found: mx.array, expected: mx.array) -> float:
    if not mx.issubdtype(found.dtype, mx.floating):
        return float(np.mean(np.asarray(found) != np.asarray(expected)))
    a, b = np.asarray(found.astype(mx.float32)), np.asarray(expected.astype(mx.float32))
    finite = np.isfinite(b)
    if (
        not np.array_equal(a[~finite], b[~finite], equal_nan=True)
        or not np.isfinite(a[finite]).all()
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = a[finite], b[finite]
    return float(np.abs(a - b).max() / max(1e-30, np.abs(b).max()))


def _seconds(form: Callable[..., Arrays], arguments: Sequence[Any]) -> Callable[[], list[mx.array]]:
    return partial(lambda: list(form(*arguments)))


def _stand_in(argument: Any, key: mx.array) -> Any:
    """Return random numbers of the same shape and type; anything else as it is.

    Small values, so that sums over quantised weights do not leave the range of float16.
    """
    if not isinstance(argument, mx.array):
        return argument
    if mx.issubdtype(argument.dtype, mx.floating):
        return mx.random.normal(argument.shape, key=key).astype(argument.dtype) * 0.1
    if argument.dtype == mx.uint32 and argument.ndim == 2:  # packed weights
        low, high = mx.random.randint(0, 1 << 16, (2, *argument.shape), key=key).astype(mx.uint32)
        return low + (high << 16)
    return argument


def _widen(argument: Any) -> Any:
    is_float = isinstance(argument, mx.array) and mx.issubdtype(argument.dtype, mx.floating)
    return argument.astype(mx.float32) if is_float else argument


def _same_bits(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)).item())
