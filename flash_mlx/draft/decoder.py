"""The decoder layer that EAGLE and its descendants share, its cache and its settings.

    y   = residual + Attention(x)
    out = y + MLP(RMSNorm(y))

What x and the residual are differs: EAGLE reads its fused row as it is, MSD's Qwen variant norms it
first, EAGLE-3 reads an embedding and a feature side by side. Rows carry their own positions,
because rows of a tree share one and a compressed image leaves a gap.

Shapes:
    R: rows of a pass.    S: rows in the cache.    D: hidden size.    W: width of x.
    H: query heads.    K: key-value heads.    Dh: width of a head.    F: width of the MLP.
    V: vocabulary.

Source: Li et al., EAGLE, arXiv 2401.15077, and the weight names of its published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.buffer import write_rows
from flash_mlx.draft.activations import swiglu
from flash_mlx.draft.settings import Settings, require_even


@dataclass(frozen=True)
class DecoderConfig(Settings):
    """Sizes and switches of a drafter with one decoder layer.

    Attributes:
        hidden_size: D, the drafter's; the target's too, unless `feature_size` says otherwise.
        vocab_size: V, ids that the drafter can read; at most the target's.
        intermediate_size: F.
        num_heads: H.
        num_kv_heads: K.
        head_dim: Dh.
        rms_norm_eps: Added to the mean square in each RMSNorm.
        rope_base: Base of the rotary frequencies.
        attention_bias: Whether queries, keys and values have biases.
        fusion_bias: Whether the fusion of embedding and hidden has a bias.
        input_norm: Whether the layer norms its input (MSD for Qwen).
        own_embedding: Whether the drafter brings an embedding table; else it reads the target's.
        num_queries: ViSpec: rows that an image is compressed to, its global vector included.
        draft_vocab_size: EAGLE-3: tokens that it can propose; 0 stands for all V.
        feature_size: EAGLE-3: D of the target.
        feature_low: EAGLE-3: target layer whose input is the first of three features; 0, here and
            in the next two, goes by the target's depth n: layers 2, n // 2 and n - 3.
        feature_mid: The second one.
        feature_high: The third one.
        block_size: Tokens of a chain, or levels of a tree, drafted by as many passes.
        num_nodes: Drafts of a tree, the likeliest of those grown; 0 drafts a chain.
        top_k: Branches of a tree: drafts that a level keeps, and that each of them tries.

    Raises:
        ValueError: If a value is out of its range.
    """

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset(
        {
            "num_queries",
            "draft_vocab_size",
            "feature_size",
            "feature_low",
            "feature_mid",
            "feature_high",
            "num_nodes",
        }
    )
    MATRICES: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("num_heads", "head_dim", "hidden_size"),
        ("num_kv_heads", "head_dim", "hidden_size"),
        ("intermediate_size", "hidden_size"),
        ("vocab_size", "hidden_size"),
        ("draft_vocab_size", "hidden_size"),
        ("feature_size", "hidden_size"),
        ("top_k", "top_k", "block_size"),
    )

    intermediate_size: int = 1
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 2
    rms_norm_eps: float = 1e-6
    rope_base: float = 10000.0
    attention_bias: bool = False
    fusion_bias: bool = True
    input_norm: bool = False
    own_embedding: bool = False
    num_queries: int = 0
    draft_vocab_size: int = 0
    feature_size: int = 0
    feature_low: int = 0
    feature_mid: int = 0
    feature_high: int = 0
    block_size: int = 4
    num_nodes: int = 0
    top_k: int = 8

    def __post_init__(self) -> None:
        """Check types, ranges, and what must fit together."""
        super().__post_init__()
        require_even(self.head_dim)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads of a drafter must be a multiple of num_kv_heads; got {self.num_heads} "
                f"and {self.num_kv_heads}."
            )


@dataclass(frozen=True, eq=False)
class Past:
    """Keys and values of the rows read so far; a value, never changed.

    Attributes:
        keys: [1, K, capacity, Dh] rotated; entries from `length` on are scratch.
        values: [1, K, capacity, Dh] likewise.
        length: S.
    """

    keys: mx.array
    values: mx.array
    length: int

    @classmethod
    def empty(cls, config: DecoderConfig, dtype: mx.Dtype) -> Past:
        """Return the cache of a new text."""
        shape = (1, config.num_kv_heads, 0, config.head_dim)
        return cls(mx.zeros(shape, dtype=dtype), mx.zeros(shape, dtype=dtype), 0)

    def append(self, keys: mx.array, values: mx.array) -> Past:
        """Return the cache with R more rows, [1, K, R, Dh] each."""
        return Past(
            write_rows(self.keys, keys, self.length),
            write_rows(self.values, values, self.length),
            self.length + keys.shape[2],
        )


class Attention(nn.Module):
    """Causal attention with grouped queries.

    Weights:
        q_proj [H * Dh, W]; k_proj, v_proj [K * Dh, W]; o_proj [D, H * Dh].
    """

    def __init__(self, config: DecoderConfig, width: int) -> None:
        """Draw initial weights for inputs of a width W."""
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def __call__(
        self, x: mx.array, positions: mx.array, past: Past, mask: mx.array | None
    ) -> tuple[mx.array, Past]:
        """Read R rows after the cache; arguments and result as of `DecoderLayer`."""
        size = self.config.head_dim
        queries = self._rotate(self._heads(self.q_proj(x)), positions)
        keys = self._rotate(self._heads(self.k_proj(x)), positions)
        past = past.append(keys, self._heads(self.v_proj(x)))
        attended = mx.fast.scaled_dot_product_attention(
            queries,
            past.keys[:, :, : past.length],
            past.values[:, :, : past.length],
            scale=size**-0.5,
            mask="causal" if mask is None else mask,
        )
        out: mx.array = self.o_proj(attended.swapaxes(1, 2).reshape(x.shape[0], -1))
        return out, past

    def _heads(self, rows: mx.array) -> mx.array:
        """[R, heads * Dh] -> [1, heads, R, Dh]."""
        return rows.reshape(1, rows.shape[0], -1, self.config.head_dim).swapaxes(1, 2)

    def _rotate(self, rows: mx.array, positions: mx.array) -> mx.array:
        """Rotate [1, heads, R, Dh] to positions [R]; rows become a batch, with an offset each."""
        turned = mx.fast.rope(
            rows.transpose(2, 1, 0, 3),
            self.config.head_dim,
            traditional=False,
            base=self.config.rope_base,
            scale=1,
            offset=positions,
        )
        return turned.transpose(2, 1, 0, 3)


class Mlp(nn.Module):
    """SwiGLU. Weights: gate_proj, up_proj [F, D]; down_proj [D, F]."""

    def __init__(self, config: DecoderConfig) -> None:
        """Draw initial weights."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, rows: mx.array) -> mx.array:
        """Return [R, D] of rows [R, D]."""
        out: mx.array = self.down_proj(swiglu(self.gate_proj(rows), self.up_proj(rows)))
        return out


class DecoderLayer(nn.Module):
    """The layer.

    Weights:
        self_attn, mlp (see there); post_attention_layernorm [D]; input_layernorm [D] with
        `input_norm`.
    """

    def __init__(self, config: DecoderConfig, width: int | None = None) -> None:
        """Draw initial weights; W is D unless given."""
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size if width is None else width)
        self.mlp = Mlp(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.input_norm:
            self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self, rows: mx.array, positions: mx.array, past: Past, mask: mx.array | None = None
    ) -> tuple[mx.array, Past]:
        """Read rows after the cache.

        Args:
            rows: [R, .] see `inputs`.
            positions: [R] int32 rotary positions.
            past: S rows.
            mask: [R, S + R] bool, True where row i attends; None is causal.

        Returns:
            [R, D], and the cache of S + R rows.
        """
        x, residual = self.inputs(rows)
        attended, past = self.self_attn(x, positions, past, mask)
        y = residual + attended
        return y + self.mlp(self.post_attention_layernorm(y)), past

    def inputs(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Return x [R, W], which the attention reads, and what its result is added to, [R, D]."""
        return (self.input_layernorm(rows) if "input_layernorm" in self else rows), rows
