"""A real decoder small enough to know everything about it, and drafters that guess at random.

`ToyTarget` has two layers of random float32 weights and positions that matter. `read` goes through
a whole text from scratch, with no cache and no tree: the oracle. `prefill` and `verify` are the
ways of `flash_mlx.decode.Target`, with provisional rows.

Shapes:
    S: rows in the cache.    R: rows read.    N: rows of a tree.    D: hidden size.
    V: vocabulary.    L: layers.    A: rows accepted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from flash_mlx.decode import Cache, Drafter, Output, Take, decode
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology

GREEDY = Sampler()
KEY = mx.random.key(0)

# Hypothesis: the same examples each time (two float32 logits that tie to the last bit would be no
# bug), on a machine of any speed.
steady = settings(max_examples=150, derandomize=True, deadline=None)


@dataclass
class ToyCache:
    """Keys and values: [L, 2, S, D] committed, [L, 2, N, D] of the tree read last."""

    kept: mx.array
    provisional: mx.array

    @property
    def length(self) -> int:
        return self.kept.shape[2]

    def commit(self, rows: Sequence[int]) -> None:
        assert rows[0] == 0
        assert list(rows) == sorted(rows)
        accepted = self.provisional[:, :, mx.array(list(rows))]
        self.kept = mx.concatenate([self.kept, accepted], axis=2)
        self.provisional = self.provisional[:, :, :0]


class ToyTarget:
    """A two-layer decoder with one attention head and random weights."""

    def __init__(
        self,
        vocab_size: int = 11,
        hidden_size: int = 16,
        max_context: int | None = None,
        seed: int = 0,
    ) -> None:
        self.vocab_size, self.hidden_size, self.max_context = vocab_size, hidden_size, max_context
        self.passes = 0
        keys = iter(mx.random.split(mx.random.key(seed), 16))

        def weight(*shape: int, scale: float) -> mx.array:
            return scale * mx.random.normal(shape, key=next(keys))

        narrow = hidden_size**-0.5
        self.embedding = weight(vocab_size, hidden_size, scale=1)
        self.positions = weight(128, hidden_size, scale=1)
        self.qkv = [weight(hidden_size, 3 * hidden_size, scale=narrow) for _ in range(2)]
        self.mlp = [weight(hidden_size, hidden_size, scale=2 * narrow) for _ in range(2)]
        self.head = weight(hidden_size, vocab_size, scale=2 * narrow)
        mx.eval(self.embedding, self.positions, self.qkv, self.mlp, self.head)

    def make_cache(self) -> ToyCache:
        return ToyCache(*2 * [mx.zeros((2, 2, 0, self.hidden_size))])

    def embed(self, tokens: mx.array) -> mx.array:
        return self.embedding[tokens]

    def lm_head(self, hidden: mx.array) -> mx.array:
        return hidden @ self.head

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        assert isinstance(cache, ToyCache)
        causal = Topology.chain(len(prompt) - 1)
        hidden = self._pass(mx.array(prompt.tokens), causal, cache)
        cache.commit(range(len(prompt)))
        if take is not None:
            take(0, hidden)
            hidden = hidden[-1:]
        return Output(self.lm_head(hidden[-1:]), hidden)

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        assert isinstance(cache, ToyCache)
        assert self.max_context is None or cache.length + len(tree) <= self.max_context
        hidden = self._pass(tree.tokens, tree.topology, cache)
        self.passes += 1
        return Output(self.lm_head(hidden), hidden)

    def read(self, tokens: Sequence[int]) -> mx.array:
        """Return the logits [R, V] of a text read from scratch."""
        causal = Topology.chain(len(tokens) - 1)
        return self.lm_head(self._pass(mx.array(tokens), causal, self.make_cache()))

    def _pass(self, tokens: mx.array, topology: Topology, cache: ToyCache) -> mx.array:
        """Return hidden [R, D] of rows that see the cache and their ancestors."""
        prefix = np.ones((len(topology), cache.length), dtype=np.bool_)
        mask = mx.array(np.concatenate([prefix, topology.mask], axis=1))
        x = self.embed(tokens) + self.positions[cache.length + mx.array(topology.depth)]
        layers = []
        for qkv, mlp, kept in zip(self.qkv, self.mlp, cache.kept, strict=True):
            query, key, value = mx.split(_norm(x) @ qkv, 3, axis=-1)
            layers.append(mx.stack([key, value]))
            keys, values = mx.concatenate([kept, layers[-1]], axis=1)
            scores = mx.where(mask, query @ keys.T * self.hidden_size**-0.5, -mx.inf)
            x = x + mx.softmax(scores, axis=-1) @ values
            x = x + mx.tanh(_norm(x) @ mlp)
        cache.provisional = mx.stack(layers)
        return _norm(x)


def _norm(x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, None, 1e-5)


def continuation(target: ToyTarget, text: Sequence[int], num_tokens: int) -> list[int]:
    """Return the next greedy tokens, re-reading the whole text for each."""
    text = list(text)
    for _ in range(num_tokens):
        text.append(int(mx.argmax(target.read(text)[-1]).item()))
    return text[len(text) - num_tokens :]


def greedy_oracle(
    target: ToyTarget, prompt: Sequence[int], max_tokens: int, stop_ids: Collection[int] = ()
) -> list[int]:
    """Return what `decode` must emit if greedy."""
    if target.max_context is not None:  # the last token emitted is not read any more
        max_tokens = min(max_tokens, target.max_context - len(prompt) + 1)
    tokens = continuation(target, prompt, max_tokens)
    ends = [i for i, token in enumerate(tokens, start=1) if token in stop_ids]
    return tokens[: ends[0]] if ends else tokens


def exact_law(
    target: ToyTarget, prompt: Sequence[int], sampler: Sampler, num_tokens: int
) -> np.ndarray:
    """Return [V] * num_tokens float64, the probability of each continuation."""
    vocabulary = range(target.vocab_size)
    law = np.ones((target.vocab_size,) * num_tokens)
    for depth in range(num_tokens):
        for begin in product(vocabulary, repeat=depth):
            row = np.array(sampler.probs(target.read([*prompt, *begin])[-1]), dtype=np.float64)
            law[begin] *= row.reshape(-1, *[1] * (num_tokens - depth - 1)) / row.sum()
    return law


def generate(
    target: ToyTarget,
    drafter: Drafter[Any],
    prompt: Sequence[int],
    max_tokens: int,
    *,
    sampler: Sampler = GREEDY,
    key: mx.array = KEY,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """Return all tokens of `decode`."""
    rounds = decode(
        target,
        drafter,
        Prompt(tuple(prompt)),
        sampler=sampler,
        key=key,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
    )
    return [token for r in rounds for token in r.tokens]


def draw_tree(topology: Topology, q: mx.array, key: mx.array) -> mx.array:
    """Draw the children of each row one after the other, without replacement.

    Args:
        topology: N rows.
        q: [N, V] law of each row's children.
        key: PRNG key.

    Returns:
        [N] int32; row 0 is 0.
    """
    # The largest perturbed log-probabilities, in order, are draws without replacement.
    ranked = mx.argsort(-(mx.log(q) + mx.random.gumbel(q.shape, key=key)), axis=-1)
    parents = mx.array((0, *topology.parents[1:]))
    tokens = ranked[parents, mx.array(topology.ranks)].astype(mx.int32)
    return mx.concatenate([mx.zeros(1, dtype=mx.int32), tokens[1:]])


class WideToy(ToyTarget):
    """Hands out what its first layer receives, which for images is not what their ids say."""

    def prefill(self, prompt, cache, take=None):
        out = super().prefill(prompt, cache)
        received = self.embed(mx.array(prompt.tokens))
        for start, stop in prompt.image_spans:
            received[start:stop] += self.positions[start:stop]
        wide = mx.concatenate([received, out.hidden], axis=-1)
        if take is not None:
            take(0, wide)
            wide = wide[-1:]
        return Output(out.logits, wide)

    def verify(self, tree, cache):
        out = super().verify(tree, cache)
        return Output(out.logits, mx.concatenate([self.embed(tree.tokens), out.hidden], axis=-1))


@dataclass(frozen=True)
class RandomDrafter:
    """Knows nothing. `sharpness` spreads its random laws; `laws`: whether it tells them."""

    topology: Topology
    vocab_size: int
    laws: bool
    sharpness: float = 1.0

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> None:
        assert hidden.shape[0] == len(prompt)

    def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:
        law_key, draw_key = mx.random.split(key)
        shape = (len(self.topology), self.vocab_size)
        q = mx.softmax(self.sharpness * mx.random.normal(shape, key=law_key), axis=-1)
        tokens = draw_tree(self.topology, q, draw_key)
        tokens[0] = root
        return DraftTree(self.topology, tokens, q if self.laws else None)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: None) -> None:
        assert hidden.shape[0] == len(tokens)


@dataclass(frozen=True)
class OracleDrafter:
    """Knows the target's greedy continuation; each draft strays with a given probability."""

    topology: Topology
    target: ToyTarget
    laws: bool
    corruption: float

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> tuple[int, ...]:
        return (*prompt.tokens, root)

    def draft(
        self, root: int, state: tuple[int, ...], sampler: Sampler, key: mx.array
    ) -> DraftTree:
        assert state[-1] == root
        depth, vocab_size = self.topology.depth, self.target.vocab_size
        follows = continuation(self.target, state, max(depth) + 1)
        right = mx.array([follows[d] for d in depth])[:, None]
        q = (1 - self.corruption) * (mx.arange(vocab_size) == right) + self.corruption / vocab_size
        tokens = draw_tree(self.topology, q, key)
        tokens[0] = root
        return DraftTree(self.topology, tokens, q if self.laws else None)

    def extend(
        self, hidden: mx.array, tokens: tuple[int, ...], state: tuple[int, ...]
    ) -> tuple[int, ...]:
        assert hidden.shape[0] == len(tokens)
        return state + tokens


@st.composite
def topologies(draw: st.DrawFn, max_drafts: int = 7) -> Topology:
    """Any tree; chains more often than chance has it."""
    num_drafts = draw(st.integers(0, max_drafts))
    if draw(st.booleans()):
        return Topology.chain(num_drafts)
    return Topology((-1, *(draw(st.integers(0, row)) for row in range(num_drafts))))
