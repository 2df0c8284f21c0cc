"""An mlx-vlm model as a `flash_mlx.decode.Target`.

Three passes: the prompt in chunks, with the LM head on its last row only; a chain, which is the
model's ordinary causal pass; a tree, with its own mask and positions (`hooks`). Positions are
always given and the caches are values of the caller, so nothing is kept on the model.

Under M-RoPE, a row after the prompt has the position `cache length + rope_delta` on all three axes,
and a row of a tree that of its depth.

Shapes:
    T: prompt rows.    N: rows of the tree.    R: rows of any number.
    D: hidden size.    V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.decode import Cache, Output, Take
from flash_mlx.kernels.few_rows import MAX_ROWS
from flash_mlx.prompt import Prompt
from flash_mlx.targets.cache import SequenceCache
from flash_mlx.targets.decoder import Decoder
from flash_mlx.targets.families import Family
from flash_mlx.targets.head import Head
from flash_mlx.targets.hooks import TreeHooks
from flash_mlx.targets.joined import JoinedAttention, join_layers
from flash_mlx.targets.quantized import few_rows
from flash_mlx.targets.tree_kernel import TreeAttention
from flash_mlx.tree import DraftTree, Topology

CHUNK_SIZE = 512  # prompt rows per pass


class MlxVlmTarget:
    """A loaded mlx-vlm model behind the `Target` protocol.

    Attributes:
        model: The mlx-vlm model, unchanged.
        family: What is particular to its family.
        vocab_size: V.
        hidden_size: D.
        max_context: Rows that the model was made for; None if it does not say.
        supports_tree: Whether `verify` takes trees with siblings.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        chunk_size: int = CHUNK_SIZE,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
    ) -> None:
        """Wrap a model.

        Args:
            model: As `mlx_vlm.load` returns it.
            family: What is particular to its family.
            chunk_size: Prompt rows per pass.
            kv_bits: Of a number in the cache; None keeps the cache in the model's own type.
            kv_group_size: Numbers of the cache that share a scale.

        Raises:
            ValueError: If `chunk_size` is below 1 or the model's cache cannot drop rows.
        """
        from mlx_vlm.models.cache import KVCache, QuantizedKVCache

        if chunk_size < 1:
            raise ValueError(f"Prompt rows per pass must be 1 or more; got {chunk_size}.")
        self.model = model
        self.family = family
        self.supports_tree = True
        text = model.config.text_config
        self.vocab_size: int = text.vocab_size
        self.hidden_size: int = text.hidden_size
        self.max_context: int | None = text.max_position_embeddings
        self._decoder = Decoder(model, family)
        self._chunk_size = chunk_size
        self._kv = None if kv_bits is None else {"bits": kv_bits, "group_size": kv_group_size}
        self._packed = QuantizedKVCache
        self._hooks = TreeHooks(self._decoder.stack, KVCache if kv_bits is None else self._packed)
        # Windows and prefixes have masks that the kernel does not know.
        whole = not (family.sliding or family.prefix)
        self._attention = TreeAttention(self._decoder.stack) if whole else None
        self._joined = JoinedAttention(self._decoder.stack) if whole else None
        if any(type(layer) is not KVCache for layer in self._decoder.make_layers()):
            raise ValueError(
                f"The caches of a target must be able to drop rows; those of this "
                f"{family.model_type} model are not plain key-value caches."
            )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._decoder.stack.layers)

    def make_cache(self) -> SequenceCache:
        """Return the cache of a new sequence."""
        layers = self._decoder.make_layers()
        if self._kv is not None:
            layers = [self._packed(**self._kv) for _ in layers]
        return SequenceCache(layers)

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        """Read the rows of the prompt that the cache does not hold yet, in chunks; commit them.

        Unlike a tree pass this waits for the device after each chunk, which bounds memory. Where
        all images are in the cache already, none is looked at again. After a failure the chunks
        read before stay committed, so the same prompt goes on where it failed.

        Args:
            prompt: T rows.
            cache: Empty, or it holds the prompt's first rows, and not the last one.
            take: Gets the hidden states chunk by chunk; None keeps them.

        Returns:
            Logits [1, V] of the last row only; hidden [R, D] of all rows read, or with `take`
            [1, D] of the last row.

        Raises:
            ValueError: If the cache holds as many rows as the prompt or more, or the prompt
                exceeds the context.
        """
        cache = _own(cache)
        first, num_rows = cache.length, len(prompt)
        if first >= num_rows:
            raise ValueError(
                f"A prompt must be longer than what the cache holds of it; this one has "
                f"{num_rows} rows, the cache holds {first} rows."
            )
        if first and self.family.prefix:
            raise ValueError(
                f"A {self.family.model_type} model reads a prompt at once, all of it; the cache "
                f"holds {first} rows of it. Start with a new cache."
            )
        prompt.require_fits(self.max_context)
        kept: list[mx.array] = []
        for start, hidden in self._read_chunks(prompt, cache):
            if take is None:
                kept.append(hidden)
            else:
                take(start, hidden)
                kept = [hidden[-1:]]
        return Output(self.lm_head(kept[-1][-1:]), mx.concatenate(kept))

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """Read a tree after the committed rows; lazy.

        Returns:
            Logits [N, V] and hidden [N, D]; row i has read the prefix, row i and its ancestors.

        Raises:
            ValueError: If the tree has siblings and this target takes chains only.
        """
        cache = _own(cache)
        topology = tree.topology
        if not (topology.is_chain or self.supports_tree):
            raise ValueError(
                f"This {self.family.model_type} target takes chains only: its tree pass does not "
                "say what single passes say. Draft chains."
            )
        cache.open(topology)
        ids = tree.tokens[None]
        causal = topology.is_chain and not self.family.prefix
        hidden = self._read_chain(ids, cache) if causal else self._read_tree(tree, cache)
        return Output(self._verified(hidden), hidden)

    @property
    def costs_key(self) -> dict[str, str]:
        """What passes cost by, besides the weights."""
        kv = self._kv
        return {} if kv is None else {"cache": f"{kv['bits']} bits by {kv['group_size']}"}

    @property
    def joins(self) -> bool:
        """Whether `verify_together` reads several texts in one pass."""
        return self._joined is not None and self.supports_tree and self._kv is None

    def verify_together(self, trees: Sequence[DraftTree], caches: Sequence[Cache]) -> list[Output]:
        """Read trees of several texts, each after its own committed rows, in one pass; lazy.

        Args:
            trees: [B], one a text.
            caches: [B], all different.

        Returns:
            What `verify` returns of each, to rounding.

        Raises:
            ValueError: If this target reads one text at a time (see `joins`).
        """
        if self._joined is None or not self.joins:
            raise ValueError(
                f"A {self.family.model_type} target reads one text at a time; verify each alone."
            )
        own = [_own(cache) for cache in caches]
        positions = []
        for tree, cache in zip(trees, own, strict=True):
            cache.open(tree.topology)
            depth = mx.array(tree.topology.depth)
            positions.append(depth + (cache.length + cache.rope_delta))
        ids = mx.concatenate([tree.tokens for tree in trees])[None]
        where, layers = mx.concatenate(positions), join_layers(trees, own)
        more = {}
        if self.family.mrope:
            more["position_ids"] = mx.broadcast_to(where, (3, *ids.shape))
        lengths = [cache.length for cache in own]
        with self._hooks.active((), where[None], where), self._joined.active(trees, lengths):
            hidden = self._decoder(ids, layers, **more)
        logits, stops = self._verified(hidden), list(accumulate(map(len, trees)))
        parts = zip(mx.split(logits, stops[:-1]), mx.split(hidden, stops[:-1]), strict=True)
        return [Output(*each) for each in parts]

    def embed(self, tokens: mx.array) -> mx.array:
        """Return [R, D], the embeddings of ids [R] as the decoder layers receive them."""
        return self._decoder.embed(tokens)

    @property
    def lm_head(self) -> Head:
        """The LM head: logits [R, V] of hidden [R, D], of all tokens or of some."""
        return self._decoder.head

    def _verified(self, hidden: mx.array) -> mx.array:
        """Return what `lm_head` does, by the kernel for few rows, which has no gradient."""
        packed = self.lm_head.packed
        if packed is None or not 2 <= hidden.shape[0] <= MAX_ROWS:
            return self.lm_head(hidden)
        return few_rows(hidden, *packed)

    def _read_chunks(self, prompt: Prompt, cache: SequenceCache) -> Iterator[tuple[int, mx.array]]:
        """Read and commit the rows after the cache's.

        Yields:
            The number of a chunk's first row, and its hidden [R, D], computed.
        """
        first, num_rows = cache.length, len(prompt)
        ids = mx.array(prompt.tokens, dtype=mx.int32)[None]
        text_alone = first > 0 and all(stop <= first for _, stop in prompt.image_spans)
        if not text_alone:
            features = self._decoder.read(prompt)
            cache.rope_delta = features.rope_delta
        chunk_size = num_rows if self.family.prefix else self._chunk_size
        for start in range(first, num_rows, chunk_size):
            rows = slice(start, min(start + chunk_size, num_rows))
            cache.open(Topology.chain(rows.stop - start - 1))
            if text_alone:
                hidden = self._read_chain(ids[:, rows], cache)
            else:
                hidden = self._decoder(ids[:, rows], cache.layers, **features.of(rows))
            mx.eval(hidden)
            cache.commit(range(rows.stop - start))
            if num_rows - first > self._chunk_size:
                mx.clear_cache()  # each chunk's scores have a size of their own, used once
            yield start, hidden

    def _read_chain(self, ids: mx.array, cache: SequenceCache) -> mx.array:
        """Return hidden [N, D] of ids [1, N] in the model's ordinary causal pass."""
        if not self.family.mrope:
            return self._decoder(ids, cache.layers)
        first = cache.length + cache.rope_delta
        return self._read_at(ids, mx.arange(first, first + ids.shape[1]), cache)

    def _read_tree(self, tree: DraftTree, cache: SequenceCache) -> mx.array:
        """Return hidden [N, D]; every row reads the prefix, its ancestors and itself."""
        num_rows, length = len(tree), cache.length
        ancestors = mx.array(tree.topology.mask)
        mask = mx.concatenate([mx.ones((num_rows, length), mx.bool_), ancestors], axis=1)
        positions = mx.array(tree.topology.depth) + (length + cache.rope_delta)
        ids = tree.tokens[None]
        attention = self._attention
        kernel = nullcontext() if attention is None else attention.active(tree.topology, length)
        with self._hooks.active(cache.layers, mask[None, None], positions), kernel:
            if self.family.mrope:
                return self._read_at(ids, positions, cache)
            # A decoder whose rows all attend to one another asks no cache for a mask.
            given = {"mask": mask[None, None]} if self.family.prefix else {}
            return self._decoder(ids, cache.layers, **given)

    def _read_at(self, ids: mx.array, positions: mx.array, cache: SequenceCache) -> mx.array:
        """Return hidden [N, D] of ids [1, N] at text positions [N], alike on the M-RoPE axes."""
        position_ids = mx.broadcast_to(positions, (3, 1, ids.shape[1]))
        return self._decoder(ids, cache.layers, position_ids=position_ids)


def _own(cache: Cache) -> SequenceCache:
    if not isinstance(cache, SequenceCache):
        raise TypeError(
            f"A target takes the caches that its make_cache returns; got {type(cache).__name__}."
        )
    return cache
