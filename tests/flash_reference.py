"""The FLASH drafter from its definition, in numpy float64: no cache, no split softmax.

Every row of the compressed sequence gets all its slots, and one mask over all of them says who
sees whom. Slow, and easy to compare with the text of the method.

Shapes:
    T: rows.    S: rows of the compressed sequence.    k: slots.    D: hidden size.    M: latents.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from flash_mlx.draft import FlashConfig, FlashModel

SMALL = FlashConfig(
    hidden_size=16,
    vocab_size=11,
    block_size=3,
    num_latents=2,
    num_heads=2,
    head_dim=6,
    intermediate_size=20,
)


def random_model(config: FlashConfig = SMALL, seed: int = 0) -> FlashModel:
    """A model whose every weight matters: none is 0 or 1."""
    rng = np.random.default_rng(seed)
    model = FlashModel(config)
    weights = []
    for name, value in tree_flatten(model.trainable_parameters()):
        fan_in = value.shape[-1] if value.ndim == 2 else 4
        weight = rng.normal(0, fan_in**-0.5, value.shape) + ("norm" in name)
        weights.append((name, mx.array(weight.astype(np.float32))))
    model.update(tree_unflatten(weights))
    return model


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {k: np.array(v, dtype=np.float64) for k, v in tree_flatten(model.parameters())}


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Rotate dimension j of [R, Dh] with dimension j + Dh / 2."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def latents(model: FlashModel, image: np.ndarray) -> list[np.ndarray]:
    """Return what the drafter reads of an image's rows [N, D]."""
    config, num_rows, count = model.config, len(image), model.config.num_latents
    seeds = [int((i + 0.5) * num_rows / count) for i in range(count)]
    if count == 0 and config.compression != "none":
        return []
    match config.compression:
        case "queries":
            return list(softmax(weights_of(model)["A"] @ image.T) @ image)
        case "none":
            return list(image)
        case "stride":
            return [image[seed] for seed in seeds]
        case "mean":
            edges = [(i * num_rows // count, (i + 1) * num_rows / count) for i in range(count)]
            return [image[a : max(int(np.ceil(b)), a + 1)].mean(0) for a, b in edges]
    unit = image / np.linalg.norm(image, axis=-1, keepdims=True)
    joins = [max(range(count), key=lambda i: unit[seeds[i]] @ row) for row in unit]
    groups = [
        {n for n, joined in enumerate(joins) if joined == i} | {seeds[i]} for i in range(count)
    ]
    return [image[sorted(group)].mean(0) for group in groups]


def compressed(
    model: FlashModel,
    embedding: np.ndarray,
    tokens: Sequence[int],
    hidden: np.ndarray,
    spans: Sequence[tuple[int, int]],
    num_prompt_rows: int,
) -> tuple[np.ndarray, list[int]]:
    """Return the compressed sequence [S, D] and the row of the text behind each position.

    Args:
        model: Weights.
        embedding: [V, D] the target's.
        tokens: [T + 1] ids.
        hidden: [T, D] the target's.
        spans: Rows of the images.
        num_prompt_rows: The last of them is text in any case.
    """
    w, config = weights_of(model), model.config
    sequence, rows = [], []
    for t in range(len(hidden)):
        for start, stop in spans:
            if t == start:
                image = hidden[start:stop]
                seen = latents(model, image)
                sequence.extend(seen)
                rows.extend([-1] * len(seen))
        inside = any(start <= t < stop for start, stop in spans)
        if inside and t != num_prompt_rows - 1:
            continue
        if not config.fuse_pre_image and spans and t < spans[0][0]:
            sequence.append(hidden[t])
        else:
            e, h = embedding[tokens[t + 1]], hidden[t]
            if config.norm_inputs:
                e = rms_norm(e, w["norm_embedding.weight"], config.rms_norm_eps)
                h = rms_norm(h, w["norm_hidden.weight"], config.rms_norm_eps)
            pair = np.concatenate([e, h])
            gate, up = (
                w[f"fc_{name}.weight"] @ pair + w.get(f"fc_{name}.bias", 0)
                if f"fc_{name}.weight" in w
                else None
                for name in ("gate", "up")
            )
            sequence.append(up if gate is None else silu(gate) * up)
        rows.append(t)
    return np.array(sequence), rows


def slot_outputs(model: FlashModel, sequence: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Return y, [S, k, D], of every row of a compressed sequence with these hidden states."""
    w, config = weights_of(model), model.config
    num_rows, k, width = len(sequence), config.block_size, config.head_dim

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"layers.{name}.weight"].T + w.get(f"layers.{name}.bias", 0)

    t, i = (g.ravel() for g in np.meshgrid(range(num_rows), range(k), indexing="ij"))
    rows = (sequence[:, None] + w["layers.slot_embeddings"]).reshape(num_rows * k, -1)
    normed = rms_norm(rows, w["layers.input_layernorm.weight"], config.rms_norm_eps)
    earlier = (t[None] < t[:, None]) & (i[None] == 0)
    own = (t[None] == t[:, None]) & (i[None] <= i[:, None])
    mask = np.where(earlier | own, 0, -np.inf)
    heads = []
    for head in range(config.num_heads):
        cut = slice(head * width, (head + 1) * width)
        q = rotate(linear("q_proj", normed)[:, cut], t + i, config.rope_base)
        key = rotate(linear("k_proj", normed)[:, cut], t + i, config.rope_base)
        weights = softmax(q @ key.T / np.sqrt(width) + mask)
        heads.append(weights @ linear("v_proj", normed)[:, cut])
    rows = rows + linear("o_proj", np.concatenate(heads, axis=-1))
    normed = rms_norm(rows, w["layers.post_attn_layernorm.weight"], config.rms_norm_eps)
    gate = silu(linear("gate_proj", normed))
    rows = rows + linear("down_proj", gate * linear("up_proj", normed))
    return rows.reshape(num_rows, k, -1) + w["residual_gate"][:, None] * hidden[:, None]


def corrected(model: FlashModel, slots: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Return the slots [k, D] once the tokens of slots 0 to k - 2 have these embeddings."""
    w, config = weights_of(model), model.config
    slots, width = slots.copy(), config.recurrent_size
    state = np.zeros(width)
    for i in range(1, len(slots)):
        if config.hydra_size:
            pair = np.concatenate([embeddings[:i].sum(0), slots[i]])
            inner = np.maximum(w[f"hydra_projs.{i - 1}.0.weight"] @ pair, 0)
            slots[i] += w[f"hydra_projs.{i - 1}.2.weight"] @ inner
        elif config.recurrent_size:
            said, own = (
                rms_norm(x, w[f"recurrence.norm_{name}.weight"], config.rms_norm_eps)
                for name, x in (("embedding", embeddings[i - 1]), ("output", slots[i]))
            )
            z = w["recurrence.of_embedding.weight"] @ said + w["recurrence.of_output.weight"] @ own
            z += w["recurrence.of_state.weight"] @ state + w["recurrence.slot_bias"][i - 1]
            state = np.tanh(z[width:]) / (1 + np.exp(-z[:width]))
            slots[i] += w["recurrence.up.weight"] @ state
    return slots
