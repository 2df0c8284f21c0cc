"""Small language models that were really trained, in llama2.c's first file format.

A file is 7 int32 (width, feed-forward width, layers, heads, key-value heads, vocabulary, context)
and float32 weights. The LM head is the embedding. Rotary positions turn neighbouring pairs.

Shapes:
    R: rows read.    S: rows in the cache.    N: rows of a tree.    D: hidden size.
    V: vocabulary.    L: layers.    H: heads.    K: key-value heads.    Dh: size of a head.
    F: feed-forward width.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from flash_mlx.decode import Cache, Output, Take
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology
from toy import ToyCache

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiny_lms"
BOS = 1


class Llama:
    """Implements `flash_mlx.decode.Target`."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        header = struct.unpack("<7i", data[:28])
        width, inner, layers, self.num_heads, self.num_kv_heads, vocab_size, context = header
        self.vocab_size, self.hidden_size, self.max_context = vocab_size, width, context
        self.head_size = width // self.num_heads
        kv_width = self.num_kv_heads * self.head_size
        floats = np.frombuffer(data, dtype="<f4", offset=28)
        place = 0

        def take(*shape: int) -> mx.array:
            nonlocal place
            start, place = place, place + int(np.prod(shape))
            return mx.array(floats[start:place].reshape(shape))

        self.embedding = take(vocab_size, width)
        self.attention_norm = take(layers, width)
        self.query = take(layers, width, width)
        self.key = take(layers, kv_width, width)
        self.value = take(layers, kv_width, width)
        self.output = take(layers, width, width)
        self.mlp_norm = take(layers, width)
        self.gate = take(layers, inner, width)
        self.down = take(layers, width, inner)
        self.up = take(layers, inner, width)
        self.norm = take(width)
        assert place + context * self.head_size == floats.size  # tables of angles are left

    def make_cache(self) -> ToyCache:
        kv_width = self.num_kv_heads * self.head_size
        return ToyCache(*2 * [mx.zeros((len(self.query), 2, 0, kv_width))])

    def embed(self, tokens: mx.array) -> mx.array:
        return self.embedding[tokens]

    def lm_head(self, hidden: mx.array) -> mx.array:
        return hidden @ self.embedding.T

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        assert isinstance(cache, ToyCache)
        hidden = self._pass(mx.array(prompt.tokens), Topology.chain(len(prompt) - 1), cache)
        cache.commit(range(len(prompt)))
        if take is not None:
            take(0, hidden)
            hidden = hidden[-1:]
        return Output(self.lm_head(hidden[-1:]), hidden)

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        assert isinstance(cache, ToyCache)
        hidden = self._pass(tree.tokens, tree.topology, cache)
        return Output(self.lm_head(hidden), hidden)

    def read(self, tokens: Sequence[int]) -> mx.array:
        """Return the logits [R, V] of a text read from scratch."""
        hidden = self._pass(mx.array(tokens), Topology.chain(len(tokens) - 1), self.make_cache())
        return self.lm_head(hidden)

    def _pass(self, tokens: mx.array, topology: Topology, cache: ToyCache) -> mx.array:
        """Return hidden [R, D] of rows that see the cache and their ancestors."""
        prefix = np.ones((len(topology), cache.length), dtype=np.bool_)
        mask = mx.array(np.concatenate([prefix, topology.mask], axis=1))
        positions = cache.length + mx.array(topology.depth)
        x = self.embed(tokens)
        layers = []
        for layer, kept in enumerate(cache.kept):
            rows = mx.fast.rms_norm(x, self.attention_norm[layer], 1e-5)
            key = self._turn(rows @ self.key[layer].T, positions)
            layers.append(mx.stack([key, rows @ self.value[layer].T]))
            keys, values = map(self._heads, mx.concatenate([kept, layers[-1]], axis=1))
            queries = self._heads(self._turn(rows @ self.query[layer].T, positions))
            attended = mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=self.head_size**-0.5, mask=mask
            )
            x = x + attended[0].swapaxes(0, 1).flatten(1) @ self.output[layer].T
            rows = mx.fast.rms_norm(x, self.mlp_norm[layer], 1e-5)
            gate = rows @ self.gate[layer].T
            x = x + (gate * mx.sigmoid(gate) * (rows @ self.up[layer].T)) @ self.down[layer].T
        cache.provisional = mx.stack(layers)
        return mx.fast.rms_norm(x, self.norm, 1e-5)

    def _heads(self, x: mx.array) -> mx.array:
        """[R, H * Dh] -> [1, H, R, Dh]; likewise with K."""
        return x.reshape(1, x.shape[0], -1, self.head_size).swapaxes(1, 2)

    def _turn(self, x: mx.array, positions: mx.array) -> mx.array:
        """Turn each head's pairs (2 i, 2 i + 1) of [R, H * Dh] by position / 10000^(2 i / Dh)."""
        speeds = 10000.0 ** (-mx.arange(0, self.head_size, 2) / self.head_size)
        angles = (positions[:, None] * speeds)[:, None]
        pairs = x.reshape(x.shape[0], -1, self.head_size // 2, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        cos, sin = mx.cos(angles), mx.sin(angles)
        return mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class LlamaState:
    """What a `LlamaDrafter` has read: [L, 2, S, K * Dh] of all but the newest token, the root."""

    kept: mx.array
    root: int


@dataclass(frozen=True, eq=False)
class LlamaDrafter:
    """Drafts with a smaller vocabulary, one token after the other.

    `ids`, [drafter's V]: the target's id of each token of the drafter. Each row of the spine has
    `width` children, drawn without replacement; the eldest continues the spine.
    """

    model: Llama
    ids: mx.array
    vocab_size: int
    num_drafts: int
    width: int = 1

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> LlamaState:
        cache = self.model.make_cache()
        self.model.prefill(Prompt(tuple(self.own(prompt.tokens).tolist())), cache)
        return LlamaState(cache.kept, root)

    def draft(self, root: int, state: LlamaState, sampler: Sampler, key: mx.array) -> DraftTree:
        assert root == state.root
        cache = ToyCache(state.kept, state.kept[:, :, :0])
        tokens, laws, parents, spine = [mx.array([root], dtype=mx.int32)], [], [-1], [0]
        own = self.own([root])
        for step_key in mx.random.split(key, self.num_drafts):
            out = self.model.verify(DraftTree(Topology.chain(0), own), cache)
            cache.commit((0,))
            laws.append(sampler.probs(out.logits))
            noise = mx.random.gumbel(laws[-1].shape, key=step_key)
            # Greedy: the most likely token comes first, any others after it.
            ranked = mx.argsort(-(mx.log(laws[-1]) + noise), axis=-1)[0, : self.width]
            own = ranked[:1].astype(mx.int32)
            tokens.append(self.ids[ranked])
            parents += self.width * [spine[-1]]
            spine.append(len(parents) - self.width)
        probs = mx.zeros((len(parents), self.vocab_size))
        probs[mx.array(spine[:-1])[:, None], self.ids] = mx.concatenate(laws)
        topology = Topology(tuple(parents))
        return DraftTree(topology, mx.concatenate(tokens), None if sampler.greedy else probs)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: LlamaState) -> LlamaState:
        cache = ToyCache(state.kept, state.kept[:, :, :0])
        own = self.own([state.root, *tokens[:-1]])
        self.model.verify(DraftTree(Topology.chain(len(tokens) - 1), own), cache)
        cache.commit(range(len(tokens)))
        return LlamaState(cache.kept, tokens[-1])

    def own(self, tokens: Sequence[int]) -> mx.array:
        """The drafter's ids of the target's; 0 (unknown) where it has none."""
        return mx.array([self._own_ids.get(token, 0) for token in tokens], dtype=mx.int32)

    @cached_property
    def _own_ids(self) -> dict[int, int]:
        return {token: own for own, token in enumerate(self.ids.tolist())}
