"""A target that stands before another one and changes some of what it does.

Shapes:
    R: rows of any number.    D: hidden size.    V: vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from flash_mlx.decode import Cache, Output, Take, Target
from flash_mlx.prompt import Prompt
from flash_mlx.tree import DraftTree


class TargetAround:
    """Does what another target does; subclasses say where it differs.

    Attributes:
        target: The other one.
    """

    def __init__(self, target: Target) -> None:
        """Stand before a target."""
        self.target = target

    @property
    def vocab_size(self) -> int:
        """See `Target`."""
        return self.target.vocab_size

    @property
    def hidden_size(self) -> int:
        """See `Target`."""
        return self.target.hidden_size

    @property
    def max_context(self) -> int | None:
        """See `Target`."""
        return self.target.max_context

    def make_cache(self) -> Cache:
        """See `Target`."""
        return self.target.make_cache()

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        """See `Target`."""
        return self.target.prefill(prompt, cache, take)

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """See `Target`."""
        return self.target.verify(tree, cache)

    def embed(self, tokens: mx.array) -> mx.array:
        """See `Target`."""
        return self.target.embed(tokens)

    def lm_head(self, hidden: mx.array) -> mx.array:
        """See `Target`."""
        return self.target.lm_head(hidden)
