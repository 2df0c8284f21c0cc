"""The decode loop, and what it asks of a target, a drafter and a cache.

A round: the drafter proposes a tree, the target reads it in one pass, what the target would have
said is kept, the rest is dropped. The root of every tree is the newest token, emitted but not yet
read, so a tree of the root alone is plain decoding and needs no loop of its own.

Shapes:
    T: prompt rows.    N: rows of the draft tree.    A: rows accepted, the root included.
    R: rows of any number.    D: hidden size.    V: vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import mlx.core as mx

from flash_mlx.accept import Verdict, accept, judge
from flash_mlx.guard import guard, warn
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler, keys_from
from flash_mlx.tree import DraftTree, Topology

State = TypeVar("State")
Take = Callable[[int, mx.array], None]  # gets rows of a prompt: the first's number, hidden [R, D]

ROOT_ALONE = Topology.chain(0)


@dataclass(frozen=True, eq=False)
class Output:
    """What a pass of the target returns.

    Attributes:
        logits: [R, V] of a float type; row i is about the token after row i.
        hidden: [R, D]; the LM head's input at row i, after the final norm.
    """

    logits: mx.array
    hidden: mx.array


class Cache(Protocol):
    """The target's memory of one sequence. It knows only committed rows; others come and go."""

    @property
    def length(self) -> int:
        """Rows committed."""
        ...

    def commit(self, rows: Sequence[int]) -> None:
        """Keep these rows of the tree verified last, in this order, and drop the others.

        Args:
            rows: Ascending path from the root; `rows[0] == 0`.
        """
        ...


class Target(Protocol):
    """The model whose text is reproduced. A pass is lazy: no method waits for the device."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def hidden_size(self) -> int:
        """D."""
        ...

    @property
    def max_context(self) -> int | None:
        """Rows that its cache may hold; None: no limit."""
        ...

    def make_cache(self) -> Cache:
        """Return the cache of a new sequence."""
        ...

    def prefill(self, prompt: Prompt, cache: Cache, take: Take | None = None) -> Output:
        """Read the rows of the prompt that the cache does not hold yet, and commit them.

        Args:
            prompt: T rows.
            cache: Empty, or it holds the prompt's first rows, and not the last one.
            take: Gets the hidden states, which then need not be kept; None keeps them.

        Returns:
            Logits [1, V] of the last row only; hidden [R, D] of all rows read, or with `take`
            [1, D] of the last row.
        """
        ...

    def verify(self, tree: DraftTree, cache: Cache) -> Output:
        """Read a tree after the committed rows. Its rows stay provisional until `cache.commit`.

        A second call without a commit in between replaces the rows of the first.

        Returns:
            Logits [N, V] and hidden [N, D]; row i has read the prefix, row i and its ancestors.
        """
        ...

    def embed(self, tokens: mx.array) -> mx.array:
        """Return [R, D], the embeddings of ids [R] as the target's own layers receive them."""
        ...

    def lm_head(self, hidden: mx.array) -> mx.array:
        """Return logits [R, V] of `hidden` [R, D]."""
        ...


class Drafter(Protocol[State]):
    """Proposes trees. Its state is a value that the loop hands back, so nothing is undone."""

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> State:
        """Return the state after the prompt.

        Args:
            prompt: What the target read.
            hidden: [T, D] the target's, all prompt rows.
            root: The first token, which follows row T - 1.
        """
        ...

    def draft(self, root: int, state: State, sampler: Sampler, key: mx.array) -> DraftTree:
        """Propose a tree whose row 0 is `root`. Lazy: no wait for the device.

        Args:
            root: Newest token.
            state: From `prefill` or `extend`.
            sampler: How the target's tokens are chosen. Only a speed matter: any draft is safe.
            key: PRNG key of this round, used for nothing else.
        """
        ...

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: State) -> State:
        """Return the state after a round.

        Args:
            hidden: [A, D] the target's, at the accepted rows, root first.
            tokens: [A] ids; `tokens[i]` follows row i, and the last one is the next root.
            state: The state that the round's tree was drafted from.
        """
        ...


@runtime_checkable
class ReadingDrafter(Drafter[State], Protocol[State]):
    """A drafter that reads a prompt with the target; its hidden states need not be kept."""

    def read(self, prompt: Prompt, start: int, hidden: mx.array, state: State | None) -> State:
        """Return the state after further rows of a prompt; `extend` adds the root to the last.

        Args:
            prompt: What the target reads.
            start: Row of `hidden`'s first.
            hidden: [R, D] the target's, one row or more.
            state: After the rows before `start`, of any prompt that agrees with this one up to
                and including row `start`; None at row 0.
        """
        ...

    def rewind(self, state: State, rows: int) -> State:
        """Return the state `rows` rows earlier, all of them text, for `read` to go on from."""
        ...


@dataclass(frozen=True)
class NoDrafter:
    """Drafts nothing: plain decoding."""

    def read(self, prompt: Prompt, start: int, hidden: mx.array, state: None) -> None:
        """Need no state."""

    def rewind(self, state: None, rows: int) -> None:
        """Need no state."""

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> None:
        """Need no state."""

    def draft(self, root: int, state: None, sampler: Sampler, key: mx.array) -> DraftTree:  # noqa: ARG002
        """Return the root alone."""
        return DraftTree(ROOT_ALONE, mx.array([root], dtype=mx.int32), lookahead=True)

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: None) -> None:
        """Need no state."""


@dataclass(frozen=True)
class Round:
    """What one pass of the target brought.

    Attributes:
        tokens: New ids, one or more. Nothing follows a stop token.
        num_drafted: Drafts that the target read.
        num_accepted: Drafts among `tokens`.
        parked: Whether the drafter held back because drafting does not pay at present.
        due: What the target reads next, if this is a pause before that pass; else None.
    """

    tokens: tuple[int, ...]
    num_drafted: int
    num_accepted: int
    parked: bool = False
    due: DraftTree | None = None


def decode(
    target: Target,
    drafter: Drafter[Any],
    prompt: Prompt,
    *,
    sampler: Sampler,
    key: mx.array,
    max_tokens: int,
    stop_ids: Collection[int],
    pauses: bool = False,
) -> Iterator[Round]:
    """Yield the target's continuation of a prompt, round by round.

    The first round is the prefill's own token. The text ends with the first stop token, after
    `max_tokens`, or when the next token would not fit in the target's context. It is the one that
    plain decoding gives: the same ids if greedy, the same law if not. A drafter that returns ids
    outside of the vocabulary or laws that are none is dropped, with a warning.

    Args:
        target: The model whose text this is.
        drafter: Proposes what the target may say next.
        prompt: What to continue.
        sampler: How tokens are chosen from the target's logits.
        key: PRNG key; the same key, the same text.
        max_tokens: Most tokens to emit, the stop token included.
        stop_ids: Ids that end the text; the one that does is still emitted.
        pauses: Whether to yield a round that is due before each pass, and launch none ahead.

    Raises:
        ValueError: If `max_tokens` is below 1 or the prompt is longer than the context.
    """
    limit = sys.maxsize if target.max_context is None else target.max_context
    if max_tokens < 1:
        raise ValueError(f"The number of tokens to generate must be 1 or more; got {max_tokens}.")
    prompt.require_fits(target.max_context)
    keys = keys_from(key)
    cache = target.make_cache()
    out, begin = _prefill(target, drafter, prompt, cache)
    last = DraftTree(ROOT_ALONE, mx.array(prompt.tokens[-1:], dtype=mx.int32))
    (root,) = accept(last, out.logits, sampler, next(keys)).tokens
    yield Round((root,), num_drafted=0, num_accepted=0)

    state = begin(root)
    del begin  # it may hold the prompt's hidden states
    left = max_tokens - 1
    ahead: Output | None = None
    while left > 0 and root not in stop_ids and cache.length < limit:
        tree = drafter.draft(root, state, sampler, next(keys)).head(limit - cache.length)
        if tree.topology.is_chain:  # `left` rows bring `left` tokens; a tree's may be siblings
            tree = tree.head(left)
        tree, fault = guard(tree, target.vocab_size)
        mx.async_eval(tree.tokens)  # the device drafts while the host prepares the pass
        if pauses:
            yield Round((), 0, 0, due=tree)
        out = ahead if ahead is not None and len(tree) == 1 else target.verify(tree, cache)
        verdict = judge(tree, out.logits, sampler, next(keys))
        # Queued before any pass ahead, so it does not wait for that.
        mx.async_eval(verdict.table, *([] if fault is None else [fault]))
        ahead, alone = None, len(tree) == 1 and tree.lookahead and not pauses
        if alone and left > 1 and cache.length + 1 < limit:
            ahead = _read_ahead(target, verdict, cache)
        accepted = verdict.walk()
        if fault is not None and fault.item():  # decided by the drafts alone, so the law is kept
            warn()
            drafter, state = NoDrafter(), None
            tree = drafter.draft(root, state, sampler, next(keys))
            out = target.verify(tree, cache)
            accepted = accept(tree, out.logits, sampler, next(keys))
        if ahead is None:
            cache.commit(accepted.rows)
        state = drafter.extend(accepted.of(out.hidden), accepted.tokens, state)

        tokens = accepted.tokens[:left]
        end = next((i for i, token in enumerate(tokens, 1) if token in stop_ids), len(tokens))
        tokens = tokens[:end]  # nothing follows a stop token
        # A stop token or the end of the budget may cut the target's own last token off.
        num_accepted = min(len(accepted.rows) - 1, len(tokens))
        yield Round(tokens, len(tree) - 1, num_accepted, tree.parked)
        root, left = tokens[-1], left - len(tokens)


def _prefill(
    target: Target, drafter: Drafter[State], prompt: Prompt, cache: Cache
) -> tuple[Output, Callable[[int], State]]:
    """Return the target's output about a prompt, and from a root to the drafter's state."""
    if not isinstance(drafter, ReadingDrafter):
        out = target.prefill(prompt, cache)
        return out, lambda root: drafter.prefill(prompt, out.hidden, root)
    states: list[State | None] = [None]

    def take(start: int, hidden: mx.array) -> None:
        states.append(drafter.read(prompt, start, hidden, states.pop()))

    last = target.prefill(prompt, cache, take)
    return last, lambda root: drafter.extend(last.hidden, (root,), states.pop())


def _read_ahead(target: Target, verdict: Verdict, cache: Cache) -> Output:
    """Launch the pass over the token after a root alone, before the host knows that token.

    Nothing can be rejected of a root alone, so it is committed at once. If the text turns out to
    end there, the pass was for nothing, and its row stays provisional.
    """
    cache.commit((0,))
    out = target.verify(DraftTree(ROOT_ALONE, verdict.next_tokens), cache)
    mx.async_eval(out.logits)
    return out
