"""The demo target while it is trained: a LLaVA with Hugging Face's parameter names, batched.

mlx-vlm's LLaVA merges one image at a time and is built for inference. This one holds the same
parameters under the same names (so `export.py` only writes files), takes batches, and lets several
conversations about one picture share the picture's rows: rows of the picture are computed once.

Shapes:
    B pictures, P patches, N rows that all conversations of a picture share (text before the
    picture, then visual tokens), C conversations a picture, L tokens a conversation, D width, H
    heads, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fastops import attention, quick_gelu, swiglu

Array = mx.array
MASKED = -1e4


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the CLIP vision tower."""

    hidden_size: int = 160
    num_hidden_layers: int = 4
    intermediate_size: int = 640
    num_attention_heads: int = 5
    image_size: int = 128
    patch_size: int = 8
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class TextShape:
    """Sizes of the Llama decoder."""

    hidden_size: int = 192
    num_hidden_layers: int = 12
    intermediate_size: int = 512
    num_attention_heads: int = 3
    vocab_size: int = 1280
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def as_config(self) -> dict[str, Any]:
        return asdict(self)


def _heads(x: Array, count: int) -> Array:
    """[..., L, D] -> [..., H, L, D / H]."""
    *lead, length, width = x.shape
    return x.reshape(*lead, length, count, width // count).swapaxes(-2, -3)


def _join(x: Array) -> Array:
    """[..., H, L, D / H] -> [..., L, D]."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)


class VisionAttention(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        d = shape.hidden_size
        self.num_heads = shape.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.v_proj, self.out_proj = nn.Linear(d, d), nn.Linear(d, d)

    def __call__(self, x: Array) -> Array:
        scale = (x.shape[-1] // self.num_heads) ** -0.5
        q = _heads(self.q_proj(x) * scale, self.num_heads)
        k, v = _heads(self.k_proj(x), self.num_heads), _heads(self.v_proj(x), self.num_heads)
        return self.out_proj(_join(attention(q, k, v, mx.zeros((1, 1)))))


class VisionMLP(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def __call__(self, x: Array) -> Array:
        return self.fc2(quick_gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(shape), VisionMLP(shape)
        self.layer_norm1 = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        d, p = shape.hidden_size, shape.patch_size
        self.class_embedding = mx.random.normal((d,)) * 0.02
        self.patch_embedding = nn.Conv2d(3, d, p, p, bias=False)
        self.position_embedding = nn.Embedding((shape.image_size // p) ** 2 + 1, d)

    def __call__(self, pixels: Array) -> Array:
        b, height, width, c = pixels.shape
        p = self.patch_embedding.weight.shape[1]
        patches = pixels.reshape(b, height // p, p, width // p, p, c).swapaxes(2, 3)
        weight = self.patch_embedding.weight.reshape(-1, p * p * c)
        x = patches.reshape(b, -1, p * p * c) @ weight.T
        first = mx.broadcast_to(self.class_embedding, (b, 1, x.shape[-1]))
        return mx.concatenate([first, x], axis=1) + self.position_embedding.weight


class VisionEncoder(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.layers = [VisionLayer(shape) for _ in range(shape.num_hidden_layers)]


class VisionModel(nn.Module):
    """CLIP's vision tower; what the language model reads is the last layer's output."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)
        self.encoder = VisionEncoder(shape)
        self.post_layernorm = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)

    def __call__(self, pixels: Array) -> Array:
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.vision_model = VisionModel(shape)

    def __call__(self, pixels: Array) -> Array:
        """[B, 128, 128, 3] pixels in [-1, 1] -> [B, P + 1, D], the class token first."""
        return self.vision_model(pixels)


class Projector(nn.Module):
    def __init__(self, vision: VisionShape, text: TextShape) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision.hidden_size, text.hidden_size)
        self.linear_2 = nn.Linear(text.hidden_size, text.hidden_size)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(nn.gelu(self.linear_1(x)))


def rope_table(positions: Array, head_size: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines [..., L, Dh / 2] of the rotary angles at `positions` [..., L]."""
    half = head_size // 2
    frequencies = mx.exp(-math.log(theta) * mx.arange(half) / half)
    angles = positions[..., None].astype(mx.float32) * frequencies
    return mx.cos(angles), mx.sin(angles)


@mx.compile
def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@dataclass(frozen=True)
class Layout:
    """Where each row stands and what it may read.

    Attributes:
        shared_rope: cos, sin [B, 1, N, Dh / 2] of the shared rows.
        text_rope: cos, sin [B, 1, C * L, Dh / 2] of the conversations' rows.
        shared_mask: [N, N] causal, added to scores.
        text_mask: [L, L] causal.
    """

    shared_rope: tuple[Array, Array]
    text_rope: tuple[Array, Array]
    shared_mask: Array
    text_mask: Array
    conversations: int


class TextAttention(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        d = shape.hidden_size
        self.num_heads = shape.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.v_proj, self.o_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)

    def __call__(self, shared: Array, text: Array, layout: Layout) -> tuple[Array, Array]:
        """Shared rows [B, N, D] read themselves; text rows [B, C * L, D] read both."""
        b, n, d = shared.shape
        c, h = layout.conversations, self.num_heads
        length = text.shape[1] // c
        rows = mx.concatenate([shared, text], axis=1)
        scale = (d // h) ** -0.5
        q, k, v = (_heads(f(rows), h) for f in (self.q_proj, self.k_proj, self.v_proj))
        q = q * scale
        q_s, q_t = (
            _rotate(q[:, :, :n], *layout.shared_rope),
            _rotate(q[:, :, n:], *layout.text_rope),
        )
        k_s, k_t = (
            _rotate(k[:, :, :n], *layout.shared_rope),
            _rotate(k[:, :, n:], *layout.text_rope),
        )
        v_s, v_t = v[:, :, :n], v[:, :, n:]
        out_s = attention(q_s, k_s, v_s, layout.shared_mask)

        def per_conversation(x: Array) -> Array:
            return x.reshape(b, h, c, length, -1)

        def for_each(x: Array) -> Array:
            return mx.broadcast_to(x[:, :, None], (b, h, c, n, x.shape[-1]))

        keys = mx.concatenate([for_each(k_s), per_conversation(k_t)], axis=3)
        values = mx.concatenate([for_each(v_s), per_conversation(v_t)], axis=3)
        mask = mx.concatenate([mx.zeros((length, n)), layout.text_mask], axis=1)
        out_t = attention(per_conversation(q_t), keys, values, mask).reshape(b, h, c * length, -1)
        out = self.o_proj(_join(mx.concatenate([out_s, out_t], axis=2)))
        return out[:, :n], out[:, n:]


class TextMLP(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        d, f = shape.hidden_size, shape.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class TextLayer(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.self_attn, self.mlp = TextAttention(shape), TextMLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def __call__(self, shared: Array, text: Array, layout: Layout) -> tuple[Array, Array]:
        n = shared.shape[1]
        x = mx.concatenate([shared, text], axis=1)
        y = self.input_layernorm(x)
        x = x + mx.concatenate(self.self_attn(y[:, :n], y[:, n:], layout), axis=1)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x[:, :n], x[:, n:]


class TextModel(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = [TextLayer(shape) for _ in range(shape.num_hidden_layers)]
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class LanguageModel(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.model = TextModel(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)


class Llava(nn.Module):
    """The whole target. Weights are drawn from MLX's global key: call `mx.random.seed` first."""

    def __init__(self, vision: VisionShape, text: TextShape) -> None:
        super().__init__()
        self.vision_tower = VisionTower(vision)
        self.multi_modal_projector = Projector(vision, text)
        self.language_model = LanguageModel(text)
        self.shape = text
        self._initialise(text)

    def _initialise(self, text: TextShape) -> None:
        model = self.language_model.model
        model.embed_tokens.weight = mx.random.normal(model.embed_tokens.weight.shape) * 0.05
        self.language_model.lm_head.weight = (
            mx.random.normal((text.vocab_size, text.hidden_size)) * 0.02
        )
        depth = 1 / math.sqrt(2 * text.num_hidden_layers)
        for layer in model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                shape = linear.weight.shape
                linear.weight = mx.random.normal(shape) * (depth / math.sqrt(shape[1]))

    def visual_tokens(self, pixels: Array) -> Array:
        """[B, 128, 128, 3] -> [B, P, D], as the language model reads them."""
        return self.multi_modal_projector(self.vision_tower(pixels)[:, 1:])

    def hidden(
        self, shared: Array, positions: Array, text: Array, start: int
    ) -> tuple[Array, Array]:
        """The LM head's input at every row.

        Args:
            shared: [B, N, D] embeddings of the rows that all conversations of a picture share.
            positions: [B, N] their positions, ascending; gaps are allowed.
            text: [B, C, L] token ids of the conversations.
            start: Position of the first token of a conversation.

        Returns:
            [B, N, D] states of the shared rows, [B, C, L, D] states of the conversations' rows.
        """
        shape = self.shape
        head = shape.hidden_size // shape.num_attention_heads
        b, c, length = text.shape
        n = shared.shape[1]
        text_positions = mx.tile(start + mx.arange(length), (c,))[None, None]
        layout = Layout(
            rope_table(positions[:, None], head, shape.rope_theta),
            rope_table(text_positions, head, shape.rope_theta),
            mx.triu(mx.full((n, n), MASKED), 1),
            mx.triu(mx.full((length, length), MASKED), 1),
            c,
        )
        rows = self.language_model.model.embed_tokens(text).reshape(b, c * length, -1)
        for layer in self.language_model.model.layers:
            shared, rows = layer(shared, rows, layout)
        norm = self.language_model.model.norm
        return norm(shared), norm(rows.reshape(b, c, length, -1))

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> [..., V]."""
        return self.language_model.lm_head(hidden)
