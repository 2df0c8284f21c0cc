"""What stands in for MLX's functions in training: values and gradients."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.draft import activations
from flash_mlx.draft.activations import (
    bounded,
    swiglu,
    trained_bounded,
    trained_cross_entropy,
    trained_softmax,
    trained_swiglu,
)


def cross_entropy(logits: mx.array, p: mx.array) -> mx.array:
    return mx.logsumexp(logits, axis=-1) - (p * logits).sum(axis=-1)


@pytest.mark.parametrize(
    ("cheap", "exact"),
    [(trained_swiglu, swiglu), (trained_bounded, bounded), (trained_cross_entropy, cross_entropy)],
)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
def test_functions_of_two_and_their_gradients(
    cheap: Callable[..., mx.array], exact: Callable[..., mx.array], scale: float
) -> None:
    rng = np.random.default_rng(1)
    x = mx.array(rng.normal(0, scale, (7, 40)), mx.float32)
    y = mx.softmax(mx.array(rng.normal(0, 1, (7, 40)), mx.float32), axis=-1)
    if cheap is not trained_cross_entropy:
        y = y * scale * 40
    changes = mx.array(rng.normal(0, 1, exact(x, y).shape), mx.float32)
    np.testing.assert_allclose(cheap(x, y), exact(x, y), rtol=5e-5, atol=1e-6 + 1e-5 * scale)
    arguments = [0] if cheap is trained_cross_entropy else [0, 1]
    for function in arguments:
        ours, theirs = (
            mx.grad(lambda *a, f=f: (f(*a) * changes).sum(), argnums=function)(x, y)
            for f in (cheap, exact)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=3e-5 * max(scale, 1))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_softmax_and_its_gradient(scale: float) -> None:
    rng = np.random.default_rng(2)
    x = mx.array(rng.normal(0, scale, (3, 2, 50)), mx.float32)
    x = mx.where(mx.arange(50) < 44, x, -np.inf)
    changes = mx.array(rng.normal(0, 1, x.shape), mx.float32)
    np.testing.assert_allclose(
        trained_softmax(x), mx.softmax(x, axis=-1, precise=True), rtol=5e-5, atol=1e-7
    )
    ours, theirs = (
        mx.grad(lambda a, f=f: (f(a) * changes).sum())(x)
        for f in (trained_softmax, lambda a: mx.softmax(a, axis=-1))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_only_what_a_cpu_is_slow_at_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_on_cpu", lambda _: False)
    x = mx.random.normal((4, 9), key=mx.random.key(0))
    p = mx.softmax(x + 1, axis=-1)
    for got, wanted in (
        (trained_swiglu(x, p), swiglu(x, p)),
        (trained_bounded(x, p), bounded(x, p)),
        (trained_softmax(x), mx.softmax(x, axis=-1)),
        (trained_cross_entropy(x, p), cross_entropy(x, p)),
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
