"""Every kernel against its definition, on the machine at hand.

On Metal each kernel is tested and timed as on its first use, at the sizes of a 7B model. Without
Metal only the definitions can run: small ones, so that what the kernels are held to is known to
work. The verification curve is measured either way.

Shapes:
    m: rows of a pass.    D: head size, or the hidden size where there are no heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flash_mlx.kernels import metal
from flash_mlx.kernels.accept_tree import ACCEPT_TREE
from flash_mlx.kernels.decisions import Decision
from flash_mlx.kernels.dispatch import Kernel, forms
from flash_mlx.kernels.latent_pool import LATENT_POOL
from flash_mlx.kernels.lmhead_topk import LMHEAD_TOPK
from flash_mlx.kernels.slot_attention import SLOT_ATTENTION
from flash_mlx.kernels.tree_attention import TREE_ATTENTION, ancestor_bits
from flash_mlx.kernels.trial import definition, try_out
from flash_mlx.loading import load
from flash_mlx.measure import verify_cost
from flash_mlx.prompt import Prompt
from flash_mlx.targets.quantized import FEW_ROWS
from flash_mlx.tree import Topology

TYPES = (mx.float16, mx.bfloat16, mx.float32)
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
PROMPT_ROWS = 64


@dataclass(frozen=True)
class Trial:
    """One kernel at one size.

    Attributes:
        kernel: Its name; a rival's own.
        size: What it was called with, in words.
        dtype: Of the floats.
        decision: What came of it; None where only the definition could run.
        own: Whether it is this project's.
    """

    kernel: str
    size: str
    dtype: str
    decision: Decision | None
    own: bool = True

    @property
    def failed(self) -> bool:
        """Whether the kernel is wrong or does not run; slower is no failure."""
        return self.decision is not None and self.decision.ops_seconds is None


@dataclass(frozen=True)
class SelfTest:
    """What was found.

    Attributes:
        device: What the default device calls itself.
        metal: Whether kernels ran.
        trials: Each kernel, size and type.
        verify_cost: Rows to the time of a pass of the demo over them, over that of one row.
    """

    device: str
    metal: bool
    trials: tuple[Trial, ...]
    verify_cost: Mapping[int, float]

    @property
    def passed(self) -> bool:
        """Whether none of this project's kernels failed."""
        return not any(trial.failed for trial in self.trials if trial.own)


def run() -> SelfTest:
    """Test every kernel, or without Metal every definition; takes up to a minute or two."""
    on_metal = metal.available()
    trials = []
    for dtype in TYPES:
        for kernel, size, arguments in _calls(dtype, full=on_metal):
            kind = str(dtype).removeprefix("mlx.core.")
            if not on_metal:
                definition(kernel.ops, arguments)
                trials.append(Trial(kernel.name, size, kind, None))
                continue
            for name, form in forms(kernel, arguments).items():
                decision = try_out(kernel.ops, {name: form}, arguments)
                trials.append(Trial(name, size, kind, decision, name == kernel.name))
    loaded = load(draft="none").loaded
    seconds = verify_cost(loaded, Prompt(tuple(range(1, PROMPT_ROWS + 1))), ROWS)
    curve = {rows: seconds[rows] / seconds[1] for rows in ROWS}
    return SelfTest(metal.device_name(), on_metal, tuple(trials), curve)


def _calls(dtype: mx.Dtype, *, full: bool) -> Iterator[tuple[Kernel, str, tuple[Any, ...]]]:
    """Yield kernels with what they are called with: the sizes of a 7B model, or small ones."""
    hidden, inner, vocab = (3584, 18944, 151936) if full else (256, 384, 1000)
    heads, shared, size, context = (28, 4, 128, 8192) if full else (4, 2, 64, 100)
    for rows in (4, 8, 16):
        for group, bits in ((64, 4), (64, 8)):
            weights = _packed(inner, hidden, group, bits, dtype)
            x = _random((rows, hidden), dtype)
            words = f"{rows} x {hidden} -> {inner}, {bits} bits"
            yield FEW_ROWS, words, (x, *weights, group, bits)
    head = _packed(vocab, hidden, 64, 4, dtype)
    yield LMHEAD_TOPK, f"5 rows, {vocab} tokens", (_random((5, hidden), dtype), *head, 64, 4, 10)
    for rows in (8, 26, 64):
        tree = Topology((-1, *(row // 2 for row in range(rows - 1))))
        cache = _random((shared, context + rows, size), dtype)
        queries = _random((heads, rows, size), dtype)
        bits_of = ancestor_bits(tree.mask)
        words = f"{rows} rows, {context} keys, {heads}/{shared} heads of {size}"
        yield TREE_ATTENTION, words, (queries, cache, cache, bits_of, size**-0.5)
        tokens = mx.arange(rows, dtype=mx.int32)
        yield ACCEPT_TREE, f"{rows} rows", (mx.array(tree.parents), tokens, tokens + 1, None)
    cache = _random((1, heads, 512, size), dtype)
    joined = _random((9, 3, heads, size), dtype)
    yield SLOT_ATTENTION, f"5 slots, 500 rows, {heads} heads", (joined, cache, cache, 500, 5, 1e4)
    image = 1024 if full else 64
    queries, rows_of = _random((64, hidden), dtype), _random((image, hidden), dtype)
    yield LATENT_POOL, f"{image} rows, 64 latents", (queries, rows_of)


def _random(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(sum(shape))) * 0.1).astype(dtype)


def _packed(
    outputs: int, inputs: int, group: int, bits: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    weight, scales, *biases = mx.quantize(_random((outputs, inputs), dtype), group, bits)
    return weight, scales, biases[0]
