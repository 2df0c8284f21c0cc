"""Drafting token by token with a one-layer model: a chain, or a tree that grows where it is sure.

Committed rows are read with the target's own features as soon as the target has verified them
(`extend`), all in one pass, and stay in the cache. What drafting reads besides, with the drafter's
own outputs as features, is appended to a copy that is dropped: so nothing is ever taken back.

A prompt is read with the target, chunk by chunk (`read`). A row needs the one after it, and an
image is read as a whole, so rows wait until these have come.

The target's `hidden` must hold what the model reads: the inputs of its tapped layers, and its
hidden states unless the model does without (`flash_mlx.targets.taps`).

Shapes:
    T: rows of the prompt.    A: rows accepted in a round.    W: width of what the target gives.
    D: the drafter's hidden size.    V: the target's vocabulary.    k: block size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from flash_mlx.draft.decoder import Past
from flash_mlx.draft.growth import grow_tree
from flash_mlx.draft.one_layer import OneLayerModel, shifted, with_images
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology

Function = Callable[[mx.array], mx.array]


@dataclass(frozen=True, eq=False)
class StepwiseState:
    """What the drafter remembers of a text; a value, never changed.

    Attributes:
        past: The rows read, compressed images as fewer rows.
        position: Rows in it, each image's rows counted one by one.
        output: [1, D] at the newest row: the feature of the root; [0, D] within a prompt.
        context: From `OneLayerModel.read_prompt`.
        waiting: [R, W] of the target, of the prompt's next rows.
    """

    past: Past
    position: int
    output: mx.array
    context: mx.array | None
    waiting: mx.array


class StepwiseDrafter:
    """Drafts with a one-layer model; implements `decode.Drafter[StepwiseState]`.

    Args:
        model: The drafter's weights.
        embed: The target's embedding, [R] ids -> [R, D]. Not used if the model brings its own.
        lm_head: The target's LM head, [R, D] -> [R, V]. Not used if the model brings its own.
        vocab_size: V.
        block_size: k, passes of the drafter a round; the model's own number if None.
        trees: Whether the target takes trees; if not, chains are drafted.

    Raises:
        ValueError: If the block size is below 1.
    """

    def __init__(
        self,
        model: OneLayerModel,
        embed: Function,
        lm_head: Function,
        vocab_size: int,
        block_size: int | None = None,
        *,
        trees: bool = True,
    ) -> None:
        """Keep what is needed."""
        config = model.config
        self.model = model
        self.block_size = config.block_size if block_size is None else block_size
        if self.block_size < 1:
            raise ValueError(f"A drafter drafts 1 token or more; got {self.block_size}.")
        self._embed_target, self._lm_head, self._vocab_size = embed, lm_head, vocab_size
        self._num_nodes = config.num_nodes if trees else 0
        self._topology = Topology.chain(self.block_size)

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> StepwiseState:
        """Read the prompt and the first token after it.

        Args:
            prompt: T rows.
            hidden: [T, W] the target's, row t at prompt row t.
            root: The token that follows the prompt.

        Raises:
            ValueError: If `hidden` is not one row for each row of the prompt.
        """
        _check_rows(hidden, len(prompt))
        return self.extend(hidden[-1:], (root,), self.read(prompt, 0, hidden, None))

    def read(
        self, prompt: Prompt, start: int, hidden: mx.array, state: StepwiseState | None
    ) -> StepwiseState:
        """Read rows of a prompt, as far as what they need has come.

        Args:
            prompt: T rows.
            start: The first row to read.
            hidden: [R, W] the target's.
            state: After the rows before; None if there are none.

        Raises:
            ValueError: If `hidden` is not one row or more, or these are not the next rows.
        """
        _check_rows(hidden, hidden.shape[0])
        if state is None:
            features = self.model.split(hidden[:1])[1]
            empty = Past.empty(self.model.config, features.dtype)
            state = StepwiseState(empty, 0, features[:0], None, hidden[:0])
        if start != state.position + state.waiting.shape[0]:
            raise ValueError(f"A prompt must be read in order; row {start} is not the next one.")
        hidden = mx.concatenate([state.waiting, hidden])
        first, stop = state.position, state.position + hidden.shape[0]
        images = shifted(prompt.image_spans)
        end = min([stop - 1, *(image[0] for image in images if image[1] >= stop)])
        if end <= first:
            return replace(state, waiting=hidden)
        images = [(a - first, b - first) for a, b in images if first <= a and b <= end]
        received, features = self.model.split(hidden)
        embeddings = self._embed(prompt.tokens[first + 1 : end + 1]).astype(features.dtype)
        embeddings = with_images(embeddings, received, images)
        features = features[: end - first]
        reading = self.model.read_prompt(embeddings, features, images, state.context)
        positions = mx.array(reading.positions) + first
        _, past = self.model.read(reading.rows, positions, state.past)
        waiting = hidden[end - first :]
        mx.async_eval(past.keys, past.values, waiting)  # so that `hidden` need not be kept
        return StepwiseState(past, end, features[:0], reading.context, waiting)

    def rewind(self, state: StepwiseState, rows: int) -> StepwiseState:
        """Return the state `rows` rows of text earlier, for `read` to go on from."""
        left = state.waiting.shape[0] - rows
        past = replace(state.past, length=state.past.length + min(left, 0))
        return replace(
            state,
            past=past,
            position=state.position + min(left, 0),
            output=state.output[:0],
            waiting=state.waiting[: max(left, 0)],
        )

    def extend(
        self, hidden: mx.array, tokens: tuple[int, ...], state: StepwiseState
    ) -> StepwiseState:
        """Read the rows that the target accepted.

        Args:
            hidden: [A, W] the target's, root first.
            tokens: [A] the token that follows each of these rows; the last is the new root.
            state: The state that the round began with; it stays valid.

        Raises:
            ValueError: If `hidden` is not one row for each token.
        """
        _check_rows(hidden, len(tokens))
        _, features = self.model.split(hidden)
        embeddings = self._embed(tokens).astype(features.dtype)
        rows = self.model.fuse(embeddings, features, state.context)
        end = state.position + len(tokens)
        outputs, past = self.model.read(rows, mx.arange(state.position, end), state.past)
        return StepwiseState(past, end, outputs[-1:], state.context, state.waiting[:0])

    def draft(self, root: int, state: StepwiseState, sampler: Sampler, key: mx.array) -> DraftTree:
        """Return a chain of k drafts, or the tree that `growth` describes.

        A chain is lazy. A tree's shape depends on the scores, so growing one waits for the device.

        Args:
            root: The token that the drafts follow.
            state: What `prefill` or `extend` returned when they read `root`.
            sampler: Greedy: a chain's drafts are the likeliest tokens. Else each is drawn from its
                processed law, which the tree then holds. Nodes of a tree are never drawn.
            key: PRNG key; used for chains that are drawn.
        """
        if self._num_nodes:
            return grow_tree(
                root,
                state.output,
                state.past,
                step=lambda tokens, features, level, past, mask: self._step(
                    tokens, features, level, past, state, mask
                ),
                logits=self._logits,
                levels=self.block_size,
                top_k=self.model.config.top_k,
                num_nodes=self._num_nodes,
            )
        tokens = [mx.array([root], mx.int32)]
        laws: list[mx.array] = []
        output, past = state.output, state.past
        for slot, slot_key in enumerate(mx.random.split(key, self.block_size)):
            if slot:
                output, past = self._step(tokens[-1], output, slot, past, state)
            logits = self._logits(output)
            token = sampler.sample(logits, slot_key)
            # Logits that are not numbers would pass for tokens, if greedy; see `guard`.
            tokens.append(mx.where(mx.isnan(logits).any(axis=-1), -1, token))
            if not sampler.greedy:
                laws.append(sampler.probs(logits))
        if sampler.greedy:
            return DraftTree(self._topology, mx.concatenate(tokens))
        laws.append(mx.zeros_like(laws[0]))  # the last draft has no children: not read
        return DraftTree(self._topology, mx.concatenate(tokens), mx.concatenate(laws))

    def _step(
        self,
        tokens: mx.array,
        features: mx.array,
        level: int,
        past: Past,
        state: StepwiseState,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, Past]:
        """Read drafts of one level, the root's children being level 1."""
        embeddings = self._look_up(tokens).astype(features.dtype)
        rows = self.model.fuse(embeddings, features, state.context)
        positions = mx.full(tokens.shape, state.position + level - 1, dtype=mx.int32)
        return self.model.read(rows, positions, past, mask)

    def _logits(self, outputs: mx.array) -> mx.array:
        return self.model.logits(outputs, self._lm_head, self._vocab_size)

    def _embed(self, tokens: tuple[int, ...]) -> mx.array:
        return self._look_up(mx.array(tokens, dtype=mx.int32))

    def _look_up(self, tokens: mx.array) -> mx.array:
        return self.model.look_up(tokens, self._embed_target)


def _check_rows(hidden: mx.array, num_rows: int) -> None:
    """Require one row of what the target gives for each row read."""
    if hidden.ndim != 2 or hidden.shape[0] != num_rows or num_rows == 0:
        raise ValueError(
            f"The drafter needs one row of the target's hidden states for each of the {num_rows} "
            f"rows read, and at least one; got {hidden.shape}."
        )
