"""Choosing a block's tokens one after the other, each knowing those before it.

The slots themselves come from one pass; what is left for each is a small correction: its logits by
the token before it (Markov), or its output by the embeddings of all tokens before it (Hydra). All
that does not depend on these tokens is computed for all slots at once. Where the LM head is linear
and small, Hydra's last layer and the LM head become one matrix, so that a slot reads that instead
of the whole LM head.

Shapes:
    k: slots.    D: hidden size.    V: vocabulary.    W: width of Hydra's MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from flash_mlx.draft.model import FlashModel

FOLD_LIMIT = 2**24  # entries of the joined matrices of all slots: 64 MiB


class InTurn:
    """A model's corrections, made ready for one row at a time.

    Args:
        model: With `markov_rank` or `hydra_size`.
        embed: The target's embedding.
        lm_head: The target's LM head.
        block_size: k.
    """

    def __init__(
        self,
        model: FlashModel,
        embed: Callable[[mx.array], mx.array],
        lm_head: Callable[[mx.array], mx.array],
        block_size: int,
    ) -> None:
        """Take the weights apart by what they read."""
        self._model, self._embed, self._lm_head = model, embed, lm_head
        self._block_size, self._folded = block_size, False
        self._hydra = model.config.hydra_size > 0 and block_size > 1
        if not self._hydra:
            return
        size = model.config.hidden_size
        layers = model.hydra_projs[: block_size - 1]
        # Hydra's first layer reads the embeddings of earlier tokens, then the slot's output.
        self._of_said = [down.weight[:, :size].T for down, _, _ in layers]
        self._of_slot = mx.stack([down.weight[:, size:].T for down, _, _ in layers])
        self._up = [up.weight.T for _, _, up in layers]
        if self._of_slot.size // size * model.config.vocab_size <= FOLD_LIMIT:
            self._fold()
        mx.eval(self._of_said, self._of_slot, self._up)

    def __call__(
        self, slots: mx.array, choose: Callable[[int, mx.array], mx.array]
    ) -> tuple[mx.array, mx.array]:
        """Return the tokens, [k], and the logits, [k, V], they were chosen from.

        Args:
            slots: [k, D] the LM head's inputs, not corrected.
            choose: Takes a slot's number and its logits [1, V] to its token [1].
        """
        by_markov = self._model.config.markov_rank > 0
        apart = self._hydra and not self._folded  # each slot needs the LM head for itself
        plain = slots if apart else self._lm_head(slots)
        own = slots[1:, None] @ self._of_slot if self._hydra else None
        tokens: list[mx.array] = []
        rows: list[mx.array] = []
        said: mx.array | None = None
        for slot in range(self._block_size):
            row = plain[slot : slot + 1]
            if own is not None and slot:
                latest = self._embed(tokens[-1]).astype(slots.dtype)
                said = latest if said is None else said + latest
                inner = mx.addmm(own[slot - 1], said, self._of_said[slot - 1])
                row = mx.addmm(row, mx.maximum(inner, 0), self._up[slot - 1])
            if apart:
                row = self._lm_head(row)
            if by_markov and slot:
                row = row + self._model.markov(tokens[-1])
            tokens.append(choose(slot, row))
            rows.append(row)
        return mx.concatenate(tokens), mx.concatenate(rows)

    def _fold(self) -> None:
        """Put the LM head behind Hydra's last layers, if that is the same."""
        joined = [self._lm_head(up) for up in self._up]
        # A soft cap shows at large logits, whatever the weights.
        far = self._lm_head(1000 * self._up[0])
        error, scale = mx.abs(far - 1000 * joined[0]).max(), mx.abs(far).max()
        if joined[0].dtype == mx.float32 and (error < 1e-3 * scale).item():
            self._up, self._folded = joined, True
