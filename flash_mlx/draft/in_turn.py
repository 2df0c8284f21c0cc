"""Choosing a block's tokens one after the other, each knowing those before it.

The slots themselves come from one pass; what is left for each is a small correction (see
`corrections`). All of it that does not depend on the tokens is computed for all slots at once.
Where the vocabulary is small, the rest shrinks as well: what the recurrence hears of a token is
looked up in a table, and a correction's last layer and the LM head become one matrix, so that a
slot reads that instead of the whole LM head.

Shapes:
    k: slots.    D: hidden size.    V: vocabulary.    U: tokens that may be proposed.
    W: width of the correction.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from flash_mlx.draft.model import FlashModel
from flash_mlx.draft.vocabulary import named

TABLE_LIMIT = 2**24  # entries of a table: 64 MiB


class InTurn:
    """A model's corrections, made ready for one row at a time.

    Args:
        model: With `markov_rank`, `hydra_size` or `recurrent_size`.
        embed: The target's embedding.
        lm_head: The target's LM head, over the U tokens that the model may propose.
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
        config = model.config
        self._model, self._lm_head, self._ids = model, lm_head, model.proposed_ids
        self._by_hydra = config.hydra_size > 0 and block_size > 1
        self._by_recurrence = config.recurrent_size > 0 and block_size > 1
        self._up: list[mx.array] = []
        if self._by_hydra:
            # The first layer reads the embeddings of earlier tokens, then the slot's output.
            size, layers = config.hidden_size, model.hydra_projs[: block_size - 1]
            self._of_said = [down.weight[:, :size].T for down, _, _ in layers]
            self._of_slot = mx.stack([down.weight[:, size:].T for down, _, _ in layers])
            self._up = [up.weight.T for _, _, up in layers]
        if self._by_recurrence:
            self._up = [model.recurrence.up.weight.T]
        entries = sum(up.shape[0] for up in self._up) * config.num_proposed
        self._folded = 0 < entries <= TABLE_LIMIT and self._fold()
        self._hear = self._listener(embed)
        mx.eval(self._up)

    def __call__(
        self, slots: mx.array, choose: Callable[[int, mx.array], mx.array]
    ) -> tuple[mx.array, mx.array]:
        """Return places of the tokens, [n], and the logits, [n, U], they were chosen from.

        Args:
            slots: [n, D] the LM head's inputs of slots 0 to n - 1, not corrected; n is at most k.
            choose: Takes a slot's number and its logits [1, U] to its token's place
                among these [1].
        """
        by_markov, corrected = self._model.config.markov_rank > 0, len(self._up) > 0
        apart = corrected and not self._folded  # each slot needs the LM head for itself
        plain = slots if apart else self._lm_head(slots)
        own = self._own(slots[1:]) if corrected and len(slots) > 1 else None
        tokens: list[mx.array] = []
        rows: list[mx.array] = []
        state: mx.array | None = None
        for slot in range(len(slots)):
            row = plain[slot : slot + 1]
            if own is not None and slot:
                heard = self._hear(tokens[-1]).astype(slots.dtype)
                inner, state = self._step(slot, own[slot - 1], heard, state)
                row = mx.addmm(row, inner, self._up[min(slot, len(self._up)) - 1])
            if apart:
                row = self._lm_head(row)
            if by_markov and slot:
                row = row + self._model.markov(named(tokens[-1], self._ids))
            tokens.append(choose(slot, row))
            rows.append(row)
        return mx.concatenate(tokens), mx.concatenate(rows)

    def _own(self, slots: mx.array) -> mx.array:
        """Return the share of slots 1 to n - 1, [n - 1, D], in their corrections: [n - 1, 1, .]."""
        if self._by_hydra:
            return slots[:, None] @ self._of_slot[: len(slots)]
        return self._model.recurrence.own(slots)[:, None]

    def _step(
        self, slot: int, own: mx.array, heard: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Return what a correction's last layer reads, [1, W], and the next slot's state.

        Args:
            slot: At least 1.
            own: [1, .] the slot's share.
            heard: [1, .] the share of the token before it.
            state: None at slot 1.
        """
        if self._by_hydra:
            said = heard if state is None else state + heard
            return mx.maximum(mx.addmm(own, said, self._of_said[slot - 1]), 0), said
        state = self._model.recurrence.step(own + heard, state)
        return state, state

    def _listener(self, embed: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        """Return how the share of tokens is had: [1] places -> [1, .]."""
        config, ids = self._model.config, self._ids
        if not self._by_recurrence:
            return lambda places: embed(named(places, ids))
        heard, count = self._model.recurrence.heard, config.num_proposed
        if count * 2 * config.recurrent_size > TABLE_LIMIT:
            return lambda places: heard(embed(named(places, ids)))
        table = heard(embed(named(mx.arange(count), ids)))
        mx.eval(table)
        return lambda places: table[places]

    def _fold(self) -> bool:
        """Put the LM head behind the corrections' last layers, if that is the same."""
        joined = [self._lm_head(up) for up in self._up]
        # A soft cap shows at large logits, whatever the weights.
        far = self._lm_head(1000 * self._up[0])
        error, scale = mx.abs(far - 1000 * joined[0]).max(), mx.abs(far).max()
        if joined[0].dtype != mx.float32 or not (error < 1e-3 * scale).item():
            return False
        self._up = joined
        return True
