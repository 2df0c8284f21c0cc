"""What of the drafts the target would have said itself.

Greedy: follow the tree along the target's most likely tokens. Sampling: exact rejection sampling
against the processed law, so the emitted text has the law of plain sampling, whatever the drafter
proposes. All rows are judged at once on the device; one transfer brings the verdict to the host,
which walks down from the root.

The rule at one row, with p the target's law there and q the law its children were drawn from:

    for each child c, eldest first:
        accept c with probability min(1, p(c) / q(c))
        else  p <- norm(max(p - q, 0))  and  q <- norm(q without c)
    if no child is accepted: draw the next token from p

A deterministic draft is one with q(c) = 1: it is accepted with probability p(c), and on rejection
p(c) becomes 0.

Shapes:
    N: rows of the tree.    V: vocabulary.    A: rows accepted, the root included.
    P: rows with a child of the rank at hand.

Source: Leviathan et al. 2023, algorithm 1; siblings without replacement as in Jeon et al. 2024
(recursive rejection sampling).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flash_mlx.kernels.accept_tree import accept_tree
from flash_mlx.sampling import Sampler, draw
from flash_mlx.tree import DraftTree, Topology


@dataclass(frozen=True)
class Acceptance:
    """A path of the tree and what it says.

    Example:
        The chain root, 5, 7, 9 of which the target keeps 5, and says 8 where 7 was drafted:
        `rows == (0, 1)`, `tokens == (5, 8)`.

    Attributes:
        rows: [A] accepted rows from the root down; `rows[0] == 0`.
        tokens: [A] ids; `tokens[i]` follows `rows[i]`. The last one is the target's own.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]

    def of(self, hidden: mx.array) -> mx.array:
        """Return the accepted rows [A, .] of `hidden` [N, .], gathered only if they lie apart."""
        if self.rows[-1] == len(self.rows) - 1:
            return hidden[: len(self.rows)]
        return hidden[mx.array(self.rows)]


@dataclass(frozen=True, eq=False)
class Verdict:
    """Which drafts hold and what comes where none does; on the device, not yet evaluated.

    Attributes:
        topology: Shape of the judged tree, N rows.
        table: [3, N] int32; the tree's tokens; 1 where row i is accepted if its parent is and no
            elder sibling is; what follows row i if none of its children is accepted. If `walked`:
            [2, N] int32; the accepted rows and the token after each, -1 behind the last.
        walked: Whether the device has followed the rows already.
    """

    topology: Topology
    table: mx.array
    walked: bool = False

    @property
    def next_tokens(self) -> mx.array:
        """[N] int32; what follows row i if none of its children is accepted."""
        return self.table[2]

    def walk(self) -> Acceptance:
        """Follow accepted rows from the root. Waits for the device: the round's one transfer."""
        if self.walked:
            path, words = (row[row >= 0].tolist() for row in np.asarray(self.table))
            return Acceptance(tuple(path), tuple(words))
        tokens, holds, next_tokens = np.asarray(self.table).tolist()
        row: int | None = 0
        rows: list[int] = []
        while row is not None:
            rows.append(row)
            row = next((child for child in self.topology.children[row] if holds[child]), None)
        said = [tokens[row] for row in rows[1:]] + [next_tokens[rows[-1]]]
        return Acceptance(tuple(rows), tuple(said))


def accept(tree: DraftTree, logits: mx.array, sampler: Sampler, key: mx.array) -> Acceptance:
    """Return the path that the target accepts and the tokens it says.

    Args:
        tree: The drafts, N rows.
        logits: [N, V] the target's; row i is about the token after row i, so the children of
            row i are checked against it.
        sampler: Gives the processed law.
        key: PRNG key of this round; not used if greedy.

    Raises:
        ValueError: If `logits` does not fit the tree, or the drafter's vocabulary differs.
    """
    return judge(tree, logits, sampler, key).walk()


def judge(tree: DraftTree, logits: mx.array, sampler: Sampler, key: mx.array) -> Verdict:
    """Judge every row of the tree on the device; `accept` without the wait.

    Args, errors: see `accept`.
    """
    if logits.ndim != 2 or logits.shape[0] != len(tree):
        raise ValueError(
            f"A tree of {len(tree)} rows needs logits of shape ({len(tree)}, V); "
            f"got {logits.shape}."
        )
    if tree.probs is not None and tree.probs.shape != logits.shape:
        raise ValueError(
            f"The drafter's laws must be over the target's {logits.shape[1]} tokens; got "
            f"{tree.probs.shape[1]}. Pad the missing tokens with probability 0."
        )
    if len(tree) == 1:  # nothing to check, and the walk reads only what follows the root
        return Verdict(tree.topology, mx.broadcast_to(sampler.sample(logits, key), (3, 1)))
    if sampler.greedy:
        holds, next_tokens = _follow(tree, sampler.sample(logits, key))
    else:
        coin_key, draw_key = mx.random.split(key)
        holds, left = _reject(tree, sampler.probs(logits), coin_key)
        # Only what follows the end of the walk is ever said: one row to draw from instead of N.
        said = draw(left(_end(tree.topology, holds)), draw_key)
        next_tokens = mx.broadcast_to(said, (len(tree),))
    flags = holds.astype(mx.int32)
    fallen = None if sampler.greedy else flags  # else the walk compares tokens itself
    path = accept_tree(tree.topology.parents, tree.tokens, next_tokens, fallen)
    if path is not None:
        return Verdict(tree.topology, path, walked=True)
    return Verdict(tree.topology, mx.stack([tree.tokens, flags, next_tokens]))


def _follow(tree: DraftTree, choice: mx.array) -> tuple[mx.array, mx.array]:
    """Accept the drafts that equal the target's choice, [N] int32, at their parent row.

    Returns:
        [N] bool, whether row i holds; [N] int32, what follows row i if no child of it does.
    """
    # The root has no parent; its own flag is never read.
    parents = mx.array((0, *tree.topology.parents[1:]))
    return tree.tokens == choice[parents], choice


def _reject(
    tree: DraftTree, p: mx.array, key: mx.array
) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
    """Apply the rule of this module to all rows at once, one sibling rank after the other.

    Args:
        tree: The drafts.
        p: [N, V] float32, the target's processed law after row i.
        key: PRNG key.

    Returns:
        [N] bool, whether row i holds; and from rows [...] to what is left of their p, [..., V], up
        to a factor a row, once all of their children are rejected.
    """
    topology = tree.topology
    coins = mx.random.uniform(shape=(len(tree),), key=key)
    holds = mx.zeros((len(tree),), dtype=mx.bool_)
    q = None if tree.probs is None else tree.probs.astype(mx.float32)  # not the tree's own
    for rank, (rows, drafts) in enumerate(topology.families):
        parents, children = mx.array(rows), mx.array(drafts)
        token = tree.tokens[children]
        p_token, coin = p[parents, token], coins[children]
        if q is None:
            holds[children] = coin < p_token
        else:
            q_token = q[parents, token]
            holds[children] = (q_token > 0) & (coin * q_token < p_token)
        # For further siblings, rows change as if this child were rejected: if it is accepted,
        # nobody looks any more.
        elder = [row for row in rows if len(topology.children[row]) > rank + 1]
        if elder:
            again = mx.array(elder)
            token = tree.tokens[mx.array([topology.children[row][rank] for row in elder])]
            q_row = None if q is None else q[again]
            rest = _residual(p[again], q_row, token, mx.array(True))
            p[again] = rest / rest.sum(axis=-1, keepdims=True)
            if q is not None and q_row is not None:
                q[again] = _without(q_row, token)
    youngest = mx.array([children[-1] if children else 0 for children in topology.children])

    def left(rows: mx.array) -> mx.array:
        child = youngest[rows]
        return _residual(p[rows], None if q is None else q[rows], tree.tokens[child], child > 0)

    return holds, left


def _residual(p: mx.array, q: mx.array | None, token: mx.array, tried: mx.array) -> mx.array:
    """Return what is left of p, [..., V], up to a factor a row, once a token is rejected.

    Args:
        p: [..., V].
        q: [..., V] the law that the token was drawn from; None: it was certain.
        token: [...]. One that its law could not produce is skipped and says nothing about p.
        tried: [...] bool, whether there was such a token.
    """
    token = token[..., None]
    if q is None:
        rest = mx.put_along_axis(p, token, mx.zeros(token.shape), axis=-1)
    else:
        rest = mx.maximum(p - q, 0)
        tried = tried & (mx.take_along_axis(q, token, axis=-1) > 0)[..., 0]
    tried = tried[..., None] & (rest.sum(axis=-1, keepdims=True) > 0)
    return mx.where(tried, rest, p)


def _without(q: mx.array, token: mx.array) -> mx.array:
    """Return the law q, [P, V], once a token a row has been drawn; nothing may be left of it."""
    q = mx.put_along_axis(q, token[:, None], mx.zeros((len(token), 1)), axis=-1)
    total = q.sum(axis=-1, keepdims=True)
    return q / mx.where(total > 0, total, 1)


def _end(topology: Topology, holds: mx.array) -> mx.array:
    """Return [], the row at which the walk along rows that hold, [N] bool, ends."""
    if topology.is_chain:
        return mx.cumprod(holds[1:].astype(mx.int32)).sum()
    rows = mx.array(topology.elders)
    taken = holds & ~(rows & holds).any(axis=1)
    taken[0] = True
    reached = ~(mx.array(topology.mask) & ~taken).any(axis=1)
    return mx.argmax(mx.where(reached, mx.array(topology.depth), -1))
