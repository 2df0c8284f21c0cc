"""Reading a text with a FLASH drafter: what it remembers, and the slots of the newest row.

The drafter reads the compressed sequence as an ordinary causal transformer reads text: rows are
appended to a key/value cache, and the k slots of the newest row are k more rows behind it, at
consecutive rotary positions. Slots 1 to k - 1 are provisional, because later rows may see slot 0
only: the next pass writes over them. So nothing is ever taken back.

The pass belongs to `extend`, which knows the new rows; as MLX is lazy, it runs only if a draft is
asked for.

Shapes:
    T: rows of the prompt.    A: rows accepted in a round.    R: rows of a pass, A - 1 + k.
    S: entries of the cache.    k: slots drafted.    D: hidden size.    H: heads.
    Dh: width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from flash_mlx.draft.activations import swiglu
from flash_mlx.draft.model import FlashModel
from flash_mlx.draft.reading import Part, compress_piece, pieces
from flash_mlx.few_rows import join_layers
from flash_mlx.kernels.slot_attention import slot_attention, turn_and_write
from flash_mlx.prompt import Prompt


@dataclass(frozen=True, eq=False)
class FlashState:
    """What the drafter remembers of a text; a value, never changed.

    Attributes:
        keys: [1, H, capacity, Dh] rotated keys of slot 0; entries from `length` on are scratch.
        values: [1, H, capacity, Dh] likewise.
        length: S, rows of the compressed sequence read so far.
        slots: [k, D] the LM head's inputs; row i is for the token i + 1 places after the root.
        part: Of an image that the prompt has not been read to the end of.
    """

    keys: mx.array
    values: mx.array
    length: int
    slots: mx.array
    part: Part | None = None


class FlashReader:
    """Reads with a FlashModel; the half of `FlashDrafter` that needs no LM head.

    The model's weights are read once, here: train first, then make a drafter.

    Args:
        model: The drafter's weights.
        embed: The target's embedding, [R] ids -> [R, D].
        block_size: k, slots of a row; the model's own if None, and at most that.

    Raises:
        ValueError: If the model does not have that many slots.
    """

    def __init__(
        self,
        model: FlashModel,
        embed: Callable[[mx.array], mx.array],
        block_size: int | None = None,
    ) -> None:
        """Join the weights that read the same rows."""
        config, block = model.config, model.layers
        block_size = config.block_size if block_size is None else block_size
        if not 1 <= block_size <= config.block_size:
            raise ValueError(
                f"This drafter drafts 1 to {config.block_size} tokens in a pass; "
                f"got a block size of {block_size}."
            )
        self.model = model
        self.block_size = block_size
        self._embed = embed
        self._slots = block.slot_embeddings[:block_size]
        self._gate = model.residual_gate[:block_size, None]
        gate = [model.fc_gate] if config.fusion == "gated" else []
        self._fusion = join_layers(*gate, model.fc_up)
        self._qkv = join_layers(block.q_proj, block.k_proj, block.v_proj)
        self._gate_up = join_layers(block.gate_proj, block.up_proj)
        joined = (self._fusion, self._qkv, self._gate_up)
        mx.eval(self._slots, self._gate, [layer.parameters() for layer in joined])

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> FlashState:
        """Read the prompt and the first token after it.

        Args:
            prompt: T rows.
            hidden: [T, D] the target's, row t at prompt row t.
            root: The token that follows the prompt.

        Raises:
            ValueError: If `hidden` is not one row of D for each row of the prompt.
        """
        self._check(hidden, len(prompt))
        return self.extend(hidden[-1:], (root,), self.read(prompt, 0, hidden, None))

    def read(
        self, prompt: Prompt, start: int, hidden: mx.array, state: FlashState | None
    ) -> FlashState:
        """Read rows of a prompt: text as it is, an image as latents once its last row is there.

        The prompt's own last row is not read as text before its follower, the root, is known.

        Args:
            prompt: T rows.
            start: The first row to read.
            hidden: [R, D] the target's; with `taps` here and below rows are `model.width` wide.
            state: After the rows before; None if there are none.

        Raises:
            ValueError: If `hidden` is not one row or more of D.
        """
        self._check(hidden, hidden.shape[0])
        config = self.model.config
        spans = prompt.merged_spans(config.video_groups)
        hidden = self.model.features(hidden.astype(self._slots.dtype))
        if state is None:
            empty = mx.zeros((1, config.num_heads, 0, config.head_dim), dtype=hidden.dtype)
            state = FlashState(empty, empty, 0, hidden[:0])
        num_raw = spans[0][0] if spans and not config.fuse_pre_image else 0
        entries, part = [hidden[:0]], state.part
        for piece in pieces(spans, start, start + hidden.shape[0]):
            rows = hidden[piece.start - start : piece.stop - start]
            if piece.image is None:
                followers = prompt.tokens[piece.start + 1 : piece.stop + 1]
                rows = rows[: len(followers)]
                entries.append(rows if piece.stop <= num_raw else self._fuse(followers, rows))
            else:
                latents, part = compress_piece(self.model, rows, piece, part)
                entries.append(latents)
        return self._append(mx.concatenate(entries), part, state)

    def rewind(self, state: FlashState, rows: int) -> FlashState:
        """Return the state `rows` rows of text earlier, for `read` to go on from."""
        return replace(state, length=state.length - rows, slots=state.slots[:0])

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: FlashState) -> FlashState:
        """Read the rows that the target accepted.

        Args:
            hidden: [A, D] the target's, root first.
            tokens: [A] the token that follows each of these rows; the last is the new root.
            state: The state that the round began with; it stays valid.

        Raises:
            ValueError: If `hidden` is not one row of D for each token.
        """
        self._check(hidden, len(tokens))
        hidden = hidden.astype(self._slots.dtype)
        entries = self._fuse(tokens, self.model.features(hidden))
        return self._read(entries, hidden[-1:, -self.model.config.hidden_size :], state)

    def _fuse(self, followers: tuple[int, ...] | mx.array, hidden: mx.array) -> mx.array:
        """Return z, [A, D], of rows with these states and followers."""
        if not isinstance(followers, mx.array):
            followers = mx.array(followers, dtype=mx.int32)
        embedding = self._embed(followers).astype(hidden.dtype)
        fused: mx.array = self._fusion(self.model.pair(embedding, hidden))
        gated = self.model.config.fusion == "gated"
        return swiglu(*mx.split(fused, 2, axis=-1)) if gated else fused

    def _append(self, entries: mx.array, part: Part | None, state: FlashState) -> FlashState:
        """Write entries [A, D], which others follow, at once: their rows need not be kept."""
        num_new = entries.shape[0]
        keys, values = state.keys, state.values
        if num_new:
            joined = self._project(entries + self._slots[:1])
            base = self.model.config.rope_base
            _, keys, values = turn_and_write(joined, keys, values, state.length, base)
        mx.async_eval(keys, values, [] if part is None else list(vars(part).values()))
        return FlashState(keys, values, state.length + num_new, state.slots[:0], part)

    def _project(self, rows: mx.array) -> mx.array:
        """Return queries, keys and values of rows [R, D], not rotated: [R, 3, H, Dh]."""
        config = self.model.config
        joined = self._qkv(self.model.layers.input_layernorm(rows))
        return joined.reshape(rows.shape[0], 3, config.num_heads, config.head_dim)

    def _read(self, entries: mx.array, hidden: mx.array, state: FlashState) -> FlashState:
        """Append entries to the cache and compute the slots of the last one.

        Args:
            entries: [A, D] of the compressed sequence, not yet with a slot's embedding.
            hidden: [1, D] the target's at the last entry.
            state: Its `length` entries are read, its slots are not.
        """
        config, block = self.model.config, self.model.layers
        num_new, num_slots = entries.shape[0], self.block_size
        rows = entries[-1:] + self._slots
        latest = rows
        if num_new > 1:
            rows = mx.concatenate([entries[:-1] + self._slots[:1], rows])

        attended, keys, values = slot_attention(
            self._project(rows),
            state.keys,
            state.values,
            state.length,
            num_slots,
            config.rope_base,
        )
        latest = latest + block.o_proj(attended.reshape(num_slots, -1))
        gate, up = mx.split(self._gate_up(block.post_attn_layernorm(latest)), 2, axis=-1)
        latest = latest + block.down_proj(swiglu(gate, up))
        return FlashState(keys, values, state.length + num_new, latest + self._gate * hidden)

    def _check(self, hidden: mx.array, num_rows: int) -> None:
        """Require one hidden row of the right width for each row read."""
        expected = (num_rows, self.model.width)
        if hidden.shape != expected or num_rows == 0:
            raise ValueError(
                f"The drafter needs the target's hidden states of shape {expected}, one row for "
                f"each row read and at least one; got {hidden.shape}."
            )
