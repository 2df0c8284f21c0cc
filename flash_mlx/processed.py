"""A target whose logits are processed: by penalties and biases, and by processors of the user's.

`ProcessedTarget` stands between the loop and any target. It knows the text of each row that it
verifies, and returns the logits that plain decoding would have had there. So acceptance compares
drafts with the processed law at every position, and the loop need not know. The text stays on the
device; nothing waits for it.

Shapes:
    T: prompt rows.    N: rows of the tree.    S: tokens committed.    H: tokens of a row's text.
    R: rows of any number.    D: hidden size.    V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from flash_mlx.around import TargetAround
from flash_mlx.decode import ROOT_ALONE, Cache, Output, Take, Target
from flash_mlx.penalties import Penalties
from flash_mlx.prompt import Prompt
from flash_mlx.tree import DraftTree

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""As mlx-lm's: from a text [H] int32, prompt included, and the logits [1, V] about its next token
to the logits [1, V] to use instead. It is also called for drafts that are then dropped, so what it
returns must depend on its arguments alone."""


@dataclass(eq=False)
class ProcessedCache:
    """A target's cache, and the text that it holds.

    Attributes:
        cache: The target's own.
        text: [S] int32 tokens committed.
        start: Place of the first token that penalties count: the prompt's last one.
        tree: What was verified last.
    """

    cache: Cache
    text: mx.array
    start: int = 0
    tree: DraftTree | None = None

    @property
    def length(self) -> int:
        """See `Cache`."""
        return self.cache.length

    def commit(self, rows: Sequence[int]) -> None:
        """See `Cache`.

        Raises:
            ValueError: If nothing was verified.
        """
        if self.tree is None:
            raise ValueError("Rows can be committed after a tree was verified; there was none.")
        self.cache.commit(rows)
        self.text = mx.concatenate([self.text, self.tree.tokens[mx.array(tuple(rows))]])
        mx.async_eval(self.text)  # biases alone do not read it, and it would grow a graph


class ProcessedTarget(TargetAround):
    """A target that says what penalties, biases and processors make of another's words.

    Penalties count the prompt's last token and what follows it, as mlx-vlm does; processors get
    the whole text. What `lm_head` returns is not processed, for it does not know the text.

    Args:
        target: Whose logits are processed.
        penalties: Come first.
        processors: Come after, in their order.

    Raises:
        ValueError: If a token outside of the vocabulary has a bias, or a processor is no function.
    """

    def __init__(
        self, target: Target, penalties: Penalties, processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        """Check that the biases fit the target and that processors can be called."""
        stray = [token for token in penalties.logit_bias if token >= target.vocab_size]
        if stray:
            raise ValueError(
                f"Logit biases must be for one of the model's {target.vocab_size} tokens, 0 to "
                f"{target.vocab_size - 1}; got one for token {stray[0]}."
            )
        for processor in processors:
            if not callable(processor):
                raise ValueError(
                    "A logits processor must be a function from tokens and logits to logits; "
                    f"got {processor!r}."
                )
        super().__init__(target)
        self._penalties, self._processors = penalties, tuple(processors)

    def make_cache(self) -> ProcessedCache:
        """See `Target`."""
        return ProcessedCache(self.target.make_cache(), mx.zeros((0,), dtype=mx.int32))

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        """See `Target`."""
        cache = _own(cache)
        out = self.target.prefill(prompt, cache.cache, take)
        tokens = mx.array(prompt.tokens, dtype=mx.int32)
        # The row with logits is the last one: a root alone after the others.
        cache.text, cache.start = tokens[:-1], len(prompt) - 1
        logits = self._process(out.logits, DraftTree(ROOT_ALONE, tokens[-1:]), cache)
        cache.text = tokens
        return replace(out, logits=logits)

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """See `Target`."""
        cache = _own(cache)
        out = self.target.verify(tree, cache.cache)
        cache.tree = tree
        return replace(out, logits=self._process(out.logits, tree, cache))

    def _process(self, logits: mx.array, tree: DraftTree, cache: ProcessedCache) -> mx.array:
        """Return the processed logits [N, V] of a tree that follows the committed text."""
        logits = self._penalties.apply(logits, cache.text[cache.start :], tree)
        if not self._processors:
            return logits
        rows = []
        for row, path in enumerate(tree.topology.mask):
            own = tree.tokens[mx.array(np.flatnonzero(path))]
            text = mx.concatenate([cache.text, own])
            rows.append(self._process_row(logits[row : row + 1], text))
        return mx.concatenate(rows)

    def _process_row(self, logits: mx.array, text: mx.array) -> mx.array:
        """Pass the logits [1, V] that follow a text [H] through the user's processors."""
        shape = logits.shape
        for processor in self._processors:
            logits = processor(text, logits)
            if logits.shape != shape:
                raise ValueError(
                    f"A logits processor must return logits of the shape it got, {shape}; got "
                    f"{logits.shape}."
                )
        return logits


def processed(
    target: Target, penalties: Penalties, processors: Sequence[LogitsProcessor] = ()
) -> Target:
    """Return the target with processed logits: itself, if nothing is to be done to them.

    Args, errors: see `ProcessedTarget`.
    """
    if penalties.active or processors:
        return ProcessedTarget(target, penalties, processors)
    return target


def _own(cache: Cache) -> ProcessedCache:
    if not isinstance(cache, ProcessedCache):
        raise TypeError(
            f"A target takes the caches that its make_cache returns; got {type(cache).__name__}."
        )
    return cache
