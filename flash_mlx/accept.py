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
        holds, next_tokens = _reject(tree, sampler.probs(logits), key)
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


def _reject(tree: DraftTree, p: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
    """Apply the rule of this module to all rows at once, one sibling rank after the other.

    Args:
        tree: The drafts.
        p: [N, V] float32, the target's processed law after row i.
        key: PRNG key.

    Returns:
        See `_follow`.
    """
    coin_key, draw_key = mx.random.split(key)
    coins = mx.random.uniform(shape=(len(tree),), key=coin_key)
    holds = mx.zeros((len(tree),), dtype=mx.bool_)
    # Writing to an array changes it for all who hold it, and the tree's is not ours.
    q = None if tree.probs is None else mx.array(tree.probs, dtype=mx.float32)
    for family in tree.topology.families:
        # Rows change as if each child were rejected: if it is accepted, nobody looks any more.
        parents, children = map(mx.array, family)
        token = tree.tokens[children][:, None]
        p_row = p[parents]
        p_token = mx.take_along_axis(p_row, token, axis=1)
        if q is None:
            q_token = mx.ones_like(p_token)
            residual = mx.put_along_axis(p_row, token, mx.zeros_like(p_token), axis=1)
        else:
            q_row = q[parents]
            q_token = mx.take_along_axis(q_row, token, axis=1)
            residual = mx.maximum(p_row - q_row, 0)
            q_row = mx.put_along_axis(q_row, token, mx.zeros_like(q_token), axis=1)
            q[parents] = _normalise(q_row, otherwise=q_row)
        holds[children] = ((q_token > 0) & (coins[children][:, None] * q_token < p_token))[:, 0]
        # A child that its law could not produce is skipped and says nothing about p.
        p[parents] = mx.where(q_token > 0, _normalise(residual, otherwise=p_row), p_row)
    return holds, draw(p, draw_key)


def _normalise(rows: mx.array, otherwise: mx.array) -> mx.array:
    """Divide each row, [P, V], by its sum; where that is 0, take the row of `otherwise`."""
    total = rows.sum(axis=-1, keepdims=True)
    return mx.where(total > 0, rows / mx.where(total > 0, total, 1), otherwise)
