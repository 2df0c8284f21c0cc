"""Texts that were read, kept so that what begins like them is not read again.

A store holds the target's keys and values of whole texts, each with the drafter's state: a second
question about the same pictures, or the next turn of a conversation, goes on where the two texts
part. What counts is the exact tokens and the content of the pictures. Between answers the store
takes no more memory than it was given; what was used least recently goes first.

Shapes:
    T: rows of a prompt.    S: rows of a kept text.    K: rows that a prompt shares with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import takewhile
from typing import Any

import mlx.core as mx

from flash_mlx.around import TargetAround
from flash_mlx.decode import Drafter, ReadingDrafter, Target
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets.cache import SequenceCache
from flash_mlx.tree import DraftTree

MEMORY_SHARE = 8  # a store may take one part in so many of the machine's memory


@dataclass(frozen=True, eq=False)
class KeptText:
    """A text that target and drafter have read.

    Attributes:
        target: Which read it.
        drafter: Likewise.
        tokens: [S + 1] ids, the last of which is not read yet.
        images: Row range and content of each image.
        cache: The target's, of S rows.
        state: The drafter's, after S rows.
    """

    target: Target
    drafter: Drafter[Any]
    tokens: tuple[int, ...]
    images: tuple[tuple[tuple[int, int], str], ...]
    cache: SequenceCache
    state: Any

    @property
    def nbytes(self) -> int:
        """Memory of the cache and the state."""
        return self.cache.nbytes + state_bytes(self.state)

    def num_shared(self, prompt: Prompt) -> int:
        """Return K, the rows that a prompt need not read again; 0 if an image differs.

        The drafter knows a row together with the token after it, so that token must agree too. At
        least the prompt's last row is read, for its logits.
        """
        images = _images(prompt)
        if images is None or images[: len(self.images)] != self.images:
            return 0
        pairs = zip(self.tokens, prompt.tokens, strict=False)
        rows = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) - 1
        first_row = self.images[-1][0][1] if self.images else 1
        further = [span[0] for span, _ in images[len(self.images) :]]
        rows = min(rows, *further) if further else rows
        return rows if rows >= first_row else 0


class TextStore:
    """Keeps texts within a limit of memory.

    Args:
        max_bytes: Most bytes kept between answers; an eighth of the machine's memory if None.

    Raises:
        ValueError: If the limit is negative.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """Start with nothing."""
        if max_bytes is None:
            max_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEMORY_SHARE
        if max_bytes < 0:
            raise ValueError(f"A store's limit of memory must be 0 or more; got {max_bytes} bytes.")
        self.max_bytes = max_bytes
        self._texts: list[KeptText] = []  # the one used last stands last

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(text.nbytes for text in self._texts)

    def clear(self) -> None:
        """Forget all texts."""
        self._texts.clear()

    def take(
        self, target: Target, drafter: Drafter[Any], prompt: Prompt
    ) -> tuple[KeptText, int] | None:
        """Take out the text with which a prompt shares most.

        A text in use is nowhere else, so two answers never write into one cache. A text that
        would lose more than it gives, and shares no image, is left to others.

        Returns:
            The text and K, at least 1; None if there is none.
        """
        found: tuple[KeptText, int] | None = None
        for text in self._texts:
            if text.target is not target or text.drafter != drafter:
                continue
            shared = text.num_shared(prompt)
            worthwhile = text.images or 2 * shared >= text.cache.length
            if shared and worthwhile and (found is None or shared >= found[1]):
                found = text, shared
        if found is not None:
            self._texts = [text for text in self._texts if text is not found[0]]
        return found

    def put(self, text: KeptText) -> None:
        """Keep a text; drop the least recently used ones that have no room beside it.

        One that has no room at all is not kept.
        """
        if text.nbytes > self.max_bytes:
            return
        self._texts.append(text)
        while self._texts and self.nbytes > self.max_bytes:
            del self._texts[0]


class Reading:
    """One prompt read with the help of a store: a target and a drafter for `decode`.

    What was kept is taken when `decode` asks for a cache, and put back by `close`. Without a store,
    and with a drafter that does not read along, all is read anew.

    Attributes:
        prompt: What is read.
        target: Reads only what the store did not have.
        drafter: Likewise.
        num_kept: K, rows that were not read again; 0 before `decode` began.
    """

    def __init__(
        self, store: TextStore | None, target: Target, drafter: Drafter[Any], prompt: Prompt
    ) -> None:
        """Prepare; nothing is taken yet."""
        self.prompt, self.target, self.drafter = prompt, target, drafter
        self.num_kept = 0
        self._cache: SequenceCache | None = None
        if store is not None and isinstance(drafter, ReadingDrafter):
            self._store, self._plain = store, target
            self._follower = self.drafter = _Follower(drafter)
            self.target = _KeptTarget(target, self)

    def open(self) -> SequenceCache:
        """Return a cache with the prompt's first K rows."""
        follower = self._follower
        taken = self._store.take(self._plain, follower.drafter, self.prompt)
        if taken is None:
            self._cache = _own(self._plain.make_cache())
        else:
            text, self.num_kept = taken
            self._cache = text.cache
            follower.state = follower.drafter.rewind(text.state, text.cache.length - self.num_kept)
            text.cache.rewind(self.num_kept)
        return self._cache

    def close(self) -> None:
        """Keep what was read, for the next time. A text that an error cut off is dropped."""
        cache, self._cache = self._cache, None
        images = _images(self.prompt)
        if cache is None or images is None:
            return
        follower = self._follower
        tokens = (*self.prompt.tokens, *follower.said)
        if follower.said and cache.length >= len(tokens) - 1:
            cache.rewind(len(tokens) - 1)  # drops rows that the drafter has not heard of
            drafter, state = follower.drafter, follower.state
            self._store.put(KeptText(self._plain, drafter, tokens, images, cache, state))


class _KeptTarget(TargetAround):
    """A target whose cache comes from a store."""

    def __init__(self, target: Target, reading: Reading) -> None:
        super().__init__(target)
        self._reading = reading

    def make_cache(self) -> SequenceCache:
        """See `Target`."""
        return self._reading.open()


class _Follower:
    """A drafter that begins with a state from a store and remembers its last one.

    Attributes:
        drafter: Does the work.
        state: The last one; before `read`, the one to begin with.
        said: Tokens after the prompt.
    """

    def __init__(self, drafter: ReadingDrafter[Any]) -> None:
        self.drafter = drafter
        self.state: Any = None
        self.said: tuple[int, ...] = ()

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> Any:
        """See `Drafter`."""
        return self.extend(hidden[-1:], (root,), self.read(prompt, 0, hidden, None))

    def read(self, prompt: Prompt, start: int, hidden: mx.array, state: Any) -> Any:
        """See `ReadingDrafter`."""
        state = self.state if state is None else state
        self.state = self.drafter.read(prompt, start, hidden, state)
        return self.state

    def rewind(self, state: Any, rows: int) -> Any:
        """See `ReadingDrafter`."""
        return self.drafter.rewind(state, rows)

    def draft(self, root: int, state: Any, sampler: Sampler, key: mx.array) -> DraftTree:
        """See `Drafter`."""
        return self.drafter.draft(root, state, sampler, key)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: Any) -> Any:
        """See `Drafter`."""
        self.state = self.drafter.extend(hidden, tokens, state)
        self.said += tokens
        return self.state


def state_bytes(state: Any) -> int:
    """Return the bytes of the arrays in a drafter's state, a dataclass or a sequence of such."""
    if isinstance(state, mx.array):
        return state.nbytes
    if is_dataclass(state):
        return sum(state_bytes(vars(state)[field.name]) for field in fields(state))
    if isinstance(state, Sequence) and not isinstance(state, str):
        return sum(map(state_bytes, state))
    return 0


def _images(prompt: Prompt) -> tuple[tuple[tuple[int, int], str], ...] | None:
    """Return the place and content of each image; None if the content is not known."""
    if len(prompt.image_digests) != len(prompt.image_spans):
        return None
    return tuple(zip(prompt.image_spans, prompt.image_digests, strict=True))


def _own(cache: object) -> SequenceCache:
    if not isinstance(cache, SequenceCache):
        raise TypeError(f"A store keeps caches of flash_mlx.targets; got {type(cache).__name__}.")
    return cache
