"""Drafting a block of tokens from one pass over the newest row, or two blocks from two passes.

The second pass reads the first block as if the target had accepted it: its tokens, and in place of
the target's hidden states what the slots took these to be (`reader`).

Shapes:
    n: tokens drafted ahead.    k: slots of a pass.    D: hidden size.    V: vocabulary.
    U: tokens that may be proposed, all V or some (`vocabulary`).    W: tokens a slot.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from flash_mlx.draft.choice import Candidates, score_of
from flash_mlx.draft.in_turn import InTurn
from flash_mlx.draft.model import FlashModel
from flash_mlx.draft.reader import FlashReader, FlashState
from flash_mlx.draft.vocabulary import RowsHead, head_of, named, spread
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology

PASSES = 2  # of the drafter for one draft, at most


class FlashDrafter(FlashReader):
    """Drafts with a FlashModel; implements `decode.Drafter[FlashState]`.

    Args:
        model: As for `FlashReader`.
        embed: Likewise.
        lm_head: The target's LM head, [R, D] -> [R, V]; of one that gives its rows apart
            (`vocabulary.RowsHead`) only those of the tokens that may be proposed are read.
        block_size: As for `FlashReader`.

    Raises:
        ValueError: If the model does not have that many slots.
    """

    def __init__(
        self,
        model: FlashModel,
        embed: Callable[[mx.array], mx.array],
        lm_head: Callable[[mx.array], mx.array],
        block_size: int | None = None,
    ) -> None:
        """Make the corrections ready."""
        super().__init__(model, embed, block_size)
        config = model.config
        self._ids = model.proposed_ids
        self._lm_head = head_of(lm_head, self._ids)
        self._topology = Topology.chain(self.block_size)
        corrected = config.markov_rank or config.hydra_size or config.recurrent_size
        self._in_turn = InTurn(model, embed, self._lm_head, self.block_size) if corrected else None

    @property
    def head_bytes(self) -> int:
        """What it keeps of the target's LM head for itself [bytes]."""
        head = self._lm_head
        return head.nbytes if self._ids is not None and isinstance(head, RowsHead) else 0

    @property
    def reach(self) -> int:
        """Most tokens that can be drafted ahead; a second pass has no taps to read."""
        return self.block_size if self.model.config.taps else PASSES * self.block_size

    @property
    def free(self) -> int:
        """Slots whose law holds whatever was drafted before; others need the eldest drafts."""
        return 1 if self._in_turn is not None else self.block_size

    def draft(
        self,
        root: int,
        state: FlashState,
        sampler: Sampler,
        key: mx.array,
        topology: Topology | None = None,
    ) -> DraftTree:
        """Return drafts; nothing is evaluated.

        Args:
            root: The token that the drafts follow.
            state: What `prefill` or `extend` returned when they read `root`.
            sampler: Greedy: drafts are the most likely tokens. Else each slot is drawn from its
                processed law, siblings without replacement, and the tree holds the laws.
            key: PRNG key; not used if greedy.
            topology: Shape of the tree, at most `reach` deep; None: a chain of `block_size`. What
                is deeper than `block_size` takes a second pass. All rows of a depth share a slot,
                which knows the eldest drafts before it.

        Raises:
            ValueError: If the tree is too deep.
        """
        topology = self._topology if topology is None else topology
        depth = max(topology.depth)
        if depth > self.reach:
            raise ValueError(
                f"A tree of this drafter must be at most {self.reach} tokens deep; got {depth}."
            )
        if depth == 0:
            return DraftTree(topology, mx.array([root], mx.int32))
        score = score_of(sampler, (depth, self.model.config.num_proposed), key)
        if sampler.greedy and topology.is_chain and self._in_turn is None:
            best = self.candidates(state, depth, 1)
            tokens = mx.where(mx.isnan(best.logprobs), -1, best.tokens.astype(mx.int32))[:, 0]
        else:
            tokens, logits = self._choose(state.slots[:depth], score)
            if (first := self.block_size) < depth:
                slots = self._ahead(tokens, state)[: depth - first]
                further = self._choose(slots, lambda slot, logits: score(first + slot, logits))
                tokens = mx.concatenate([tokens, further[0]])
                logits = mx.concatenate([logits, further[1]])
        if not topology.is_chain:
            ranked = _ranked(score(0, logits), max(map(len, topology.children)))
            level, rank = mx.array(topology.depth[1:]) - 1, mx.array(topology.ranks[1:])
            found = named(ranked[level, rank], self._ids).astype(mx.int32)
            tokens = mx.where(tokens[level] < 0, -1, found)  # -1: see `guard`
        tokens = mx.concatenate([mx.array([root], mx.int32), tokens.astype(mx.int32)])
        if sampler.greedy:
            return DraftTree(topology, tokens)
        vocab_size = self.model.config.vocab_size
        laws = spread(sampler.probs(logits), self._ids, vocab_size, 0)
        # The deepest drafts have no children: their row is not read
        laws = mx.concatenate([laws, mx.zeros_like(laws[:1])])
        if not topology.is_chain:
            laws = laws[mx.array(topology.depth)]
        return DraftTree(topology, tokens, laws)

    def candidates(self, state: FlashState, depth: int, width: int) -> Candidates:
        """Return the likeliest tokens of the first `depth` slots; nothing is evaluated.

        Args:
            state: What `prefill` or `extend` returned.
            depth: n, 1 to `reach`.
            width: W, tokens a slot.
        """
        found = self._likeliest(state.slots[:depth], width)
        if depth > self.block_size:
            best = mx.argmax(found[1], axis=-1, keepdims=True)
            eldest = mx.take_along_axis(found[0], best, axis=-1)[:, 0]
            slots = self._ahead(eldest, state)[: depth - self.block_size]
            further = self._likeliest(slots, width)
            found = (
                mx.concatenate([found[0], further[0]]),
                mx.concatenate([found[1], further[1]]),
            )
        return Candidates(*found, free=self.free)

    def _likeliest(self, slots: mx.array, width: int) -> tuple[mx.array, mx.array]:
        """Return the likeliest tokens of slots [n, D] and their log-probabilities, [n, W]."""
        if self._in_turn is None and isinstance(self._lm_head, RowsHead):
            places, logprobs = self._lm_head.best_tokens(slots, width)
            return named(places, self._ids), logprobs
        _, logits = self._choose(slots, lambda _, logits: logits)
        logits = logits.astype(mx.float32)
        places = mx.argpartition(-logits, width - 1, axis=-1)[:, :width]
        chosen = mx.take_along_axis(logits, places, axis=-1)
        logprobs = chosen - mx.logsumexp(logits, axis=-1, keepdims=True)
        return named(places, self._ids), logprobs

    def _ahead(self, tokens: mx.array, state: FlashState) -> mx.array:
        """Return the slots [k, D] of a second pass, after a first block's tokens [k]."""
        config, slots = self.model.config, state.slots
        if config.hydra_size or config.recurrent_size:
            said = self._embed(tokens[:-1]).astype(slots.dtype)
            slots = self.model.correct(slots[None], said[None])[0]
        return self._read(self._fuse(tokens, slots), slots[-1:], state).slots

    def _choose(
        self, slots: mx.array, score: Callable[[int, mx.array], mx.array]
    ) -> tuple[mx.array, mx.array]:
        """Return the tokens [n] of the best score, -1 where logits are not numbers; logits [n, U].

        Args:
            slots: [n, D] the LM head's inputs.
            score: See `score_of`.
        """
        if self._in_turn is None:
            logits = self._lm_head(slots)
            places = mx.argmax(score(0, logits), axis=-1)
        else:
            places, logits = self._in_turn(
                slots, lambda slot, logits: mx.argmax(score(slot, logits), axis=-1)
            )
        broken = mx.isnan(logits).any(axis=-1)
        return mx.where(broken, -1, named(places, self._ids).astype(mx.int32)), logits


def _ranked(scores: mx.array, width: int) -> mx.array:
    """Return the places [n, W] of the best scores [n, U], best first."""
    best = mx.argpartition(-scores, width - 1, axis=-1)[:, :width]
    order = mx.argsort(-mx.take_along_axis(scores, best, axis=-1), axis=-1)
    return mx.take_along_axis(best, order, axis=-1)
