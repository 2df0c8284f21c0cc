"""A target that also hands out what its layers read.

Some drafters read more of the target than its last hidden states: its embeddings with the image in
them, which are the input of layer 0, or the inputs of layers in between. A tapped target is the
same target with wider `hidden` rows: the inputs of these layers side by side, then the hidden
states, unless they are not wanted.

Layers are tapped by the class of their *instances*, while a pass is being built and no longer.

Shapes:
    T: prompt rows.    N: rows of the tree.    R: rows of any number.
    D: hidden size.    V: vocabulary.    W: width of a row handed out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.decode import Cache, Output, Take
from flash_mlx.prompt import Prompt
from flash_mlx.targets.adapter import MlxVlmTarget
from flash_mlx.tree import DraftTree

Taken = list[list[mx.array]]  # of each tapped layer, its input [1, R, D] in each pass


class TappedTarget(MlxVlmTarget):
    """A target whose hidden rows are W wide; all else is the target's own.

    Attributes:
        plain: The target itself.
    """

    def __init__(self, target: MlxVlmTarget, layers: Sequence[int], *, hidden: bool = True) -> None:
        """Share everything with a target.

        Args:
            target: It stays as it is.
            layers: Which decoder layers' inputs to hand out, in this order.
            hidden: Whether the hidden states follow them.
        """
        self.__dict__.update(vars(target))
        self.plain = target
        self._with_hidden = hidden
        # A shallow target may have the same layer twice in the list.
        distinct = sorted(set(layers))
        self._tapped: list[nn.Module] = [self._decoder.stack.layers[layer] for layer in distinct]
        self._order = [distinct.index(layer) for layer in layers]

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        """Read a prompt; see MlxVlmTarget. Hidden rows, those that `take` gets too, are W wide."""
        with _taps(self._tapped) as taken:
            if take is None:
                return self._widen(super().prefill(prompt, cache), taken)
            wide: list[mx.array] = []

            def widen(start: int, hidden: mx.array) -> None:
                wide[:] = [self._join(taken, hidden)]
                take(start, wide[0])
                for inputs in taken:
                    inputs.clear()

            out = super().prefill(prompt, cache, widen)
            return Output(out.logits, wide[0][-1:])

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """Read a tree; see MlxVlmTarget. Hidden is [N, W]."""
        with _taps(self._tapped) as taken:
            return self._widen(super().verify(tree, cache), taken)

    def verify_together(self, trees: Sequence[DraftTree], caches: Sequence[Cache]) -> list[Output]:
        """Read trees of several texts; see MlxVlmTarget. Hidden is [N, W] of each."""
        with _taps(self._tapped) as taken:
            outs = super().verify_together(trees, caches)
            wide = self._join(taken, mx.concatenate([out.hidden for out in outs]))
        stops = list(accumulate(map(len, trees)))
        parts = zip(outs, mx.split(wide, stops[:-1]), strict=True)
        return [Output(out.logits, part) for out, part in parts]

    def _widen(self, out: Output, taken: Taken) -> Output:
        return Output(out.logits, self._join(taken, out.hidden))

    def _join(self, taken: Taken, hidden: mx.array) -> mx.array:
        """Return [R, W] of what was taken and hidden states [R, D]."""
        rows = [mx.concatenate(taken[place], axis=1)[0] for place in self._order]
        return mx.concatenate([*rows, hidden] if self._with_hidden else rows, axis=-1)


@contextmanager
def _taps(layers: Sequence[nn.Module]) -> Iterator[Taken]:
    """Yield what the layers read of passes inside; prompts are read in several."""
    taken: Taken = [[] for _ in layers]
    plain = [(layer, layer.__class__) for layer in layers]
    try:
        for (layer, base), inputs in zip(plain, taken, strict=True):
            layer.__class__ = _tapped(base, inputs)
        yield taken
    finally:
        for layer, base in plain:
            layer.__class__ = base


def _tapped(base: type[nn.Module], inputs: list[mx.array]) -> type[nn.Module]:
    """Derive a layer's class that notes what it reads."""

    def call(self: nn.Module, x: mx.array, *args: object, **kwargs: object) -> object:
        inputs.append(x)
        return base.__call__(self, x, *args, **kwargs)

    return type(f"Tapped{base.__name__}", (base,), {"__call__": call, "__module__": __name__})
