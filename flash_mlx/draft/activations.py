"""Functions with an exponential in them, and gradients of those that training uses.

On a CPU without vector instructions for it, MLX's exponential costs about 12 ns an element, as much
as 600 multiply-adds of a matrix product, so a small drafter's training would be softmax and SiLU
for the most part. There a polynomial with a relative error of 1.4e-5 stands in for it, compiled
into one pass over memory with what surrounds it; on a GPU MLX's own is used. Gradients are written
by hand, so that no exponential is computed more often than need be. Only training reads these; what
a drafter drafts from is computed by `swiglu`, `bounded` and MLX's softmax.

Shapes:
    ...: any leading axes.    X: the axis that is summed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx

Pair = tuple[mx.array, mx.array]
Function = Callable[..., Any]

_HALVINGS = 5
_FACTORS = tuple(1 / math.factorial(i) for i in range(12))  # Taylor's


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return SiLU(gate) * up, elementwise."""
    return gate * mx.sigmoid(gate) * up


@partial(mx.compile, shapeless=True)
def bounded(gate: mx.array, value: mx.array) -> mx.array:
    """Return sigmoid(gate) * tanh(value), elementwise."""
    return mx.sigmoid(gate) * mx.tanh(value)


def _on_cpu(x: mx.array) -> bool:
    return x.dtype == mx.float32 and mx.default_device() == mx.Device(mx.cpu)


def _exp(x: mx.array) -> mx.array:
    """Return e^x as the 32nd power of e^(x / 32); x is held within -40 and 40."""
    part = mx.clip(x, -40.0, 40.0) / 2**_HALVINGS
    power = mx.array(0.0)
    for factor in reversed(_FACTORS):
        power = factor + part * power
    for _ in range(_HALVINGS):
        power = power * power
    return power


def _sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + _exp(-x))


def _tanh(x: mx.array) -> mx.array:
    return 2 * _sigmoid(2 * x) - 1


# Not shapeless: the compiled code would be three times slower (measured).
_compiled_exp = mx.compile(lambda x, top: _exp(x - top))
_compiled_swiglu = mx.compile(lambda gate, up: gate * _sigmoid(gate) * up)
_compiled_bounded = mx.compile(lambda gate, value: _sigmoid(gate) * _tanh(value))


@mx.compile
def _swiglu_changes(gate: mx.array, up: mx.array, d: mx.array) -> tuple[mx.array, mx.array]:
    share = _sigmoid(gate)
    return d * up * share * (1 + gate * (1 - share)), d * gate * share


@mx.compile
def _bounded_changes(gate: mx.array, value: mx.array, d: mx.array) -> tuple[mx.array, mx.array]:
    share, bound = _sigmoid(gate), _tanh(value)
    return d * bound * share * (1 - share), d * share * (1 - bound * bound)


@mx.custom_function
def _cheap_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    result: mx.array = _compiled_swiglu(gate, up)
    return result


@_cheap_swiglu.vjp
def _(primals: Pair, d: mx.array, _: mx.array) -> Pair:
    return _swiglu_changes(*primals, d)


@mx.custom_function
def _cheap_bounded(gate: mx.array, value: mx.array) -> mx.array:
    return _compiled_bounded(gate, value)


@_cheap_bounded.vjp
def _(primals: Pair, d: mx.array, _: mx.array) -> Pair:
    return _bounded_changes(*primals, d)


@mx.custom_function
def _cheap_softmax(x: mx.array) -> mx.array:
    power = _compiled_exp(x, x.max(axis=-1, keepdims=True))
    return power / power.sum(axis=-1, keepdims=True)


@_cheap_softmax.vjp
def _(_: mx.array, d: mx.array, output: mx.array) -> mx.array:
    return output * (d - (d * output).sum(axis=-1, keepdims=True))


@mx.custom_function
def _cheap_cross_entropy(logits: mx.array, p: mx.array) -> Pair:
    top = logits.max(axis=-1, keepdims=True)
    power = _compiled_exp(logits, top)
    total = power.sum(axis=-1, keepdims=True)
    loss = (mx.log(total) + top)[..., 0] - (p * logits).sum(axis=-1)
    return loss, power / total


@_cheap_cross_entropy.vjp
def _(primals: Pair, changes: Pair, outputs: Pair) -> Pair:
    p = primals[1]
    return (outputs[1] - p) * changes[0][..., None], mx.zeros_like(p)


def trained_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return SiLU(gate) * up, elementwise."""
    cheap: Function = _cheap_swiglu
    return cheap(gate, up) if _on_cpu(gate) else swiglu(gate, up)


def trained_bounded(gate: mx.array, value: mx.array) -> mx.array:
    """Return sigmoid(gate) * tanh(value), elementwise."""
    cheap: Function = _cheap_bounded
    return cheap(gate, value) if _on_cpu(gate) else bounded(gate, value)


def trained_softmax(x: mx.array) -> mx.array:
    """Return the softmax of [..., X], computed in float32, in the input's dtype."""
    cheap: Function = _cheap_softmax
    result: mx.array = cheap(x) if _on_cpu(x) else mx.softmax(x, axis=-1, precise=True)
    return result


def trained_cross_entropy(logits: mx.array, p: mx.array) -> mx.array:
    """Return log sum_x e^logits(x) - sum_x p(x) logits(x), [...]; no gradient goes to p.

    Args:
        logits: [..., X] float32.
        p: [..., X] float32, each row adding up to 1.
    """
    if _on_cpu(logits):
        loss, _ = cast(Pair, _cheap_cross_entropy(logits, mx.stop_gradient(p)))
        return loss
    return mx.logsumexp(logits, axis=-1) - (mx.stop_gradient(p) * logits).sum(axis=-1)
