"""The FLASH drafter's network: several tokens from one pass over what the target has computed.

At base row t the drafter knows h_t, the target's hidden there, and token t + 1, which the target
has emitted. It fuses the two into z_t, repeats z_t in k slots, adds a learned embedding to each
slot and passes them through one transformer block. Slot i's output, with a share of h_t added, is
put through the target's own LM head and predicts token t + i + 2. Images enter as M latents,
pooled from the target's hidden states at the image's rows by learned queries.

Slot (t, i) attends to slot 0 of all earlier rows and to slots j <= i of its own row, at rotary
positions t and t + i. So what later rows need of row t is one key and one value, those of slot 0.

Shapes:
    B: sequences.    S: rows of the compressed sequence (see `layout`).    Q: base rows.
    k: slots.    D: the target's hidden size.    V: vocabulary.    M: latents an image.
    U: tokens that it may propose.    N: rows of an image.    H: heads.    Dh: width of a head.
    F: width of the MLP.    ...: any leading axes.

Source: Wang et al., FLASH / SpecFLASH, arXiv 2505.12728, and the weight names of its published
code; text before the image is fused as well (`fuse_pre_image`), slots are read as predictions of
token t + i + 2, and no dropout is used.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.draft.activations import trained_bounded, trained_softmax, trained_swiglu
from flash_mlx.draft.compression import fixed_weights
from flash_mlx.draft.config import FlashConfig
from flash_mlx.draft.corrections import Markov, Recurrence, hydra_layers

NUM_TAPS = 3


def pool(queries: mx.array, rows: mx.array, mask: mx.array | None = None) -> mx.array:
    """Compress an image: softmax(queries @ rows^T) @ rows, in float32.

    There is no 1/sqrt(D), so the scores spread widely and need float32.

    Args:
        queries: [M, D] learned.
        rows: [..., N, D] the target's hidden at the image's rows.
        mask: [..., 1, N] float32 added to the scores, -inf at padding; None if there is none.

    Returns:
        [..., M, D] in the rows' dtype.
    """
    weights = pool_weights(queries, rows, mask)
    return (weights @ rows.astype(mx.float32)).astype(rows.dtype)


def pool_weights(queries: mx.array, rows: mx.array, mask: mx.array | None = None) -> mx.array:
    """Return how much each latent takes of each row, [..., M, N] float32; as for `pool`."""
    scores = queries.astype(mx.float32) @ rows.astype(mx.float32).swapaxes(-1, -2)
    return mx.softmax(scores if mask is None else scores + mask, axis=-1)


class SlotBlock(nn.Module):
    """The transformer block over slots.

    Weights:
        slot_embeddings [k, D]; input_layernorm, post_attn_layernorm [D];
        q_proj, k_proj, v_proj [H * Dh, D]; o_proj [D, H * Dh];
        gate_proj, up_proj [F, D]; down_proj [D, F].
    """

    def __init__(self, config: FlashConfig) -> None:
        """Draw initial weights; slot 0 starts without an embedding of its own."""
        super().__init__()
        size, width = config.hidden_size, config.num_heads * config.head_dim
        bias = config.attention_bias
        later = mx.random.normal((config.block_size - 1, size), scale=0.02)
        self.slot_embeddings = mx.concatenate([mx.zeros((1, size)), later])
        self.input_layernorm = nn.RMSNorm(size, config.rms_norm_eps)
        self.post_attn_layernorm = nn.RMSNorm(size, config.rms_norm_eps)
        self.q_proj = nn.Linear(size, width, bias=bias)
        self.k_proj = nn.Linear(size, width, bias=bias)
        self.v_proj = nn.Linear(size, width, bias=bias)
        self.o_proj = nn.Linear(width, size, bias=bias)
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)

    def mlp(self, rows: mx.array) -> mx.array:
        """Return the MLP's share, [..., D] from [..., D]."""
        rows = self.post_attn_layernorm(rows)
        return self.down_proj(trained_swiglu(self.gate_proj(rows), self.up_proj(rows)))


class FlashModel(nn.Module):
    """The drafter's weights, and its pass over whole sequences for training.

    The target's embedding and LM head are not part of it.

    Weights:
        A [M, D] with learned queries; residual_gate [k]; fc_gate (if gated), fc_up [D, 2D], whose
        columns read the embedding first, then the hidden; layers (see SlotBlock); norm_embedding,
        norm_hidden [D] with `norm_inputs`; tap_norms.{0, 1, 2} [D] and fc_taps [D, 3D] with
        `taps`; markov, recurrence and hydra_projs.i.{0, 2} (see `corrections`) with
        `markov_rank`, `recurrent_size` and `hydra_size`; draft_ids [U] with `draft_vocab_size`.
    """

    def __init__(self, config: FlashConfig) -> None:
        """Draw initial weights from MLX's global random state (`mx.random.seed`)."""
        super().__init__()
        size = config.hidden_size
        self.config = config
        if config.learns_queries:
            self.A = mx.random.normal((config.num_latents, size), scale=0.02)
        self.residual_gate = mx.ones(config.block_size)
        if config.fusion == "gated":
            self.fc_gate = nn.Linear(2 * size, size, bias=config.fusion_bias)
        self.fc_up = nn.Linear(2 * size, size, bias=config.fusion_bias)
        self.layers = SlotBlock(config)
        if config.norm_inputs:
            self.norm_embedding = nn.RMSNorm(size, config.rms_norm_eps)
            self.norm_hidden = nn.RMSNorm(size, config.rms_norm_eps)
        if config.taps:
            self.tap_norms = [nn.RMSNorm(size, config.rms_norm_eps) for _ in range(NUM_TAPS)]
            self.fc_taps = nn.Linear(NUM_TAPS * size, size, bias=False)
            self.fc_taps.weight = mx.zeros_like(self.fc_taps.weight)
        if config.markov_rank:
            self.markov = Markov(config.vocab_size, config.num_proposed, config.markov_rank)
        if config.hydra_size:
            self.hydra_projs = hydra_layers(config)
        if config.recurrent_size:
            self.recurrence = Recurrence(config)
        if config.draft_vocab_size:
            self.draft_ids = mx.arange(config.draft_vocab_size, dtype=mx.int32)
            self.freeze(recurse=False, keys=["draft_ids"])  # they are chosen, not learned

    needs_hidden = True  # besides the inputs of tapped layers

    @property
    def proposed_ids(self) -> mx.array | None:
        """Tokens that it may propose, [U] int32 ascending; None: all."""
        return self.get("draft_ids")

    @property
    def width(self) -> int:
        """Width of the rows that the target has to hand out."""
        return self.config.hidden_size * (1 + NUM_TAPS * self.config.taps)

    def taps(self, num_layers: int) -> tuple[int, ...]:
        """Return the target's layers whose inputs are read, low to high; none without `taps`.

        Source: EAGLE-3, arXiv 2503.01840, features of low, middle and high layers.
        """
        if not self.config.taps:
            return ()
        return min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)

    def features(self, rows: mx.array) -> mx.array:
        """Return what is fused and pooled, [..., D]: hidden + fc_taps(the normed taps).

        Training begins with the hidden states alone, as without taps.

        Args:
            rows: [..., width] the target's: the inputs of the tapped layers, then its hidden.
        """
        if not self.config.taps:
            return rows
        *taps, hidden = mx.split(rows, NUM_TAPS + 1, axis=-1)
        normed = [norm(tap) for norm, tap in zip(self.tap_norms, taps, strict=True)]
        out: mx.array = hidden + self.fc_taps(mx.concatenate(normed, axis=-1))
        return out

    def pair(self, embedding: mx.array, hidden: mx.array) -> mx.array:
        """Return [..., 2D], the fusion's input: embedding of the next token, then hidden."""
        if self.config.norm_inputs:
            embedding, hidden = self.norm_embedding(embedding), self.norm_hidden(hidden)
        return mx.concatenate([embedding, hidden], axis=-1)

    def fuse(self, embedding: mx.array, hidden: mx.array) -> mx.array:
        """Return z, [..., D], from the embedding of token t + 1 and the hidden of row t."""
        pair = self.pair(embedding, hidden)
        up: mx.array = self.fc_up(pair)
        if self.config.fusion == "linear":
            return up
        return trained_swiglu(self.fc_gate(pair), up)

    def latents(self, rows: mx.array, mask: mx.array | None = None) -> mx.array:
        """Return what is read of images, [..., M, D] of [..., N, D]; arguments as of `pool`."""
        config = self.config
        if config.learns_queries:
            return pool(self.A, rows, mask)
        if config.reads_whole_images:
            return rows
        if config.num_latents == 0:
            return rows[..., :0, :]
        return (self.latent_weights(rows, mask) @ rows.astype(mx.float32)).astype(rows.dtype)

    def latent_weights(self, rows: mx.array, mask: mx.array | None = None) -> mx.array:
        """Return how much each latent takes of each row, [..., M, N] float32; as for `pool`.

        Not for drafters that read no image, or whole ones.
        """
        config = self.config
        if config.learns_queries:
            return pool_weights(self.A, rows, mask)
        return fixed_weights(config.compression, config.num_latents, rows, mask)

    def correct(self, outputs: mx.array, embeddings: mx.array) -> mx.array:
        """Return the slots' outputs once the tokens before them are known.

        Args:
            outputs: [n, k, D] of the slots.
            embeddings: [n, k - 1, D] of the tokens of slots 0 to k - 2.

        Returns:
            [n, k, D]; slot 0 as it was.
        """
        later, num_later = outputs[..., 1:, :], outputs.shape[-2] - 1
        if num_later == 0:
            return outputs
        deltas: list[mx.array] = []
        if self.config.recurrent_size:
            shares = self.recurrence.own(later) + self.recurrence.heard(embeddings)
            state: mx.array | None = None
            for share in mx.split(shares, num_later, axis=-2):
                state = self.recurrence.step(share.squeeze(-2), state, trained_bounded)
                deltas.append(state)
            delta = self.recurrence.up(mx.stack(deltas, axis=-2))
        else:
            pairs = mx.concatenate([mx.cumsum(embeddings, axis=-2), later], axis=-1)
            for layers, pair in zip(self.hydra_projs, mx.split(pairs, num_later, -2), strict=True):
                down, relu, up = layers
                deltas.append(up(relu(down(pair))))
            delta = mx.concatenate(deltas, axis=-2)
        return mx.concatenate([outputs[..., :1, :], later + delta], axis=-2)

    def __call__(self, sequence: mx.array, base: mx.array, hidden: mx.array) -> mx.array:
        """Return the slots of many base rows at once.

        The scores of a slot are taken against slot 0 of all earlier rows and against its own
        row's slots, and pass one softmax: the [S * k, S * k] mask of the definition is never made.

        Args:
            sequence: [B, S, D] compressed sequences, padded at the end.
            base: [B, Q] int32 positions of the base rows in `sequence`.
            hidden: [B, Q, D] the target's hidden at the base rows.

        Returns:
            [B, Q, k, D]; row (b, q, i) is the LM head's input for the token at slot i.
        """
        block, slots = self.layers, self.layers.slot_embeddings
        num_seqs, num_rows, size = sequence.shape
        num_base, num_slots = base.shape[1], slots.shape[0]
        past = block.input_layernorm(sequence + slots[0])
        past_keys = self._rotate(self._heads(block.k_proj(past)), 0)
        past_values = self._heads(block.v_proj(past))

        # Base rows fold into the batch, because each has its own position.
        fused = mx.take_along_axis(sequence, base[..., None], axis=1)
        rows = (fused[:, :, None] + slots).reshape(num_seqs * num_base, num_slots, size)
        normed, start = block.input_layernorm(rows), base.flatten()
        queries = self._rotate(self._heads(block.q_proj(normed)), start)
        keys = self._rotate(self._heads(block.k_proj(normed)), start)
        values = self._heads(block.v_proj(normed))

        queries = queries * self.config.head_dim**-0.5
        own = queries @ keys.swapaxes(-1, -2)  # [B * Q, H, k, k]
        own = mx.where(mx.tril(mx.ones((num_slots, num_slots), mx.bool_)), own, -math.inf)
        queries = self._by_sequence(queries, num_seqs)
        history = queries @ past_keys.swapaxes(-1, -2)  # [B, H, Q * k, S]
        seen = mx.arange(num_rows) < mx.repeat(base, num_slots, axis=1)[:, None, :, None]
        history = mx.where(seen, history, -math.inf)
        scores = mx.concatenate([history, self._by_sequence(own, num_seqs)], axis=-1)
        weights = trained_softmax(scores)
        attended = self._by_row(weights[..., num_rows:], num_base) @ values
        attended = attended + self._by_row(weights[..., :num_rows] @ past_values, num_base)
        attended = attended.swapaxes(1, 2).reshape(num_seqs * num_base, num_slots, -1)

        rows = rows + block.o_proj(attended)
        rows = (rows + block.mlp(rows)).reshape(num_seqs, num_base, num_slots, size)
        return rows + self.residual_gate[:, None] * hidden[:, :, None]

    def _heads(self, rows: mx.array) -> mx.array:
        """[B, R, H * Dh] -> [B, H, R, Dh]."""
        return rows.reshape(*rows.shape[:2], -1, self.config.head_dim).swapaxes(1, 2)

    def _by_sequence(self, rows: mx.array, num_seqs: int) -> mx.array:
        """[B * Q, H, k, X] -> [B, H, Q * k, X]."""
        _, num_heads, _, width = rows.shape
        rows = rows.reshape(num_seqs, -1, *rows.shape[1:]).swapaxes(1, 2)
        return rows.reshape(num_seqs, num_heads, -1, width)

    def _by_row(self, rows: mx.array, num_base: int) -> mx.array:
        """[B, H, Q * k, X] -> [B * Q, H, k, X]."""
        num_seqs, num_heads, _, width = rows.shape
        rows = rows.reshape(num_seqs, num_heads, num_base, -1, width).swapaxes(1, 2)
        return rows.reshape(num_seqs * num_base, num_heads, -1, width)

    def _rotate(self, rows: mx.array, offset: int | mx.array) -> mx.array:
        """Rotate [B, H, R, Dh] to positions offset, offset + 1, ... (one offset a batch row)."""
        config = self.config
        return mx.fast.rope(
            rows, config.head_dim, traditional=False, base=config.rope_base, scale=1, offset=offset
        )
