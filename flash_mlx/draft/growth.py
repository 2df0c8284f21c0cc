"""Growing a tree whose shape follows the drafter's confidence: EAGLE-2's dynamic tree.

Level 1 holds the b likeliest tokens after the root. Each further level reads its b branches in one
pass, tries the b likeliest tokens after each of them, and goes on with the b best of these b * b.
A node's score is the log-probability of its path. Of all nodes grown, the n best become the tree.

Scores are float32, whatever the model's dtype, never above 0, and equal ones go to the earlier
node: so a parent is never worse than its child and comes first, and no child is chosen without it.
Rows of the tree are in the order of their scores, so that its leading rows are the best tree of
that size.

Shapes:
    b: branches, `top_k`.    n: drafts of the tree.    C: nodes grown, b + (levels - 1) * b * b.
    S: rows in the cache.    D: hidden size.    V: vocabulary.

Source: Li et al., EAGLE-2, arXiv 2406.16858.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_mlx.draft.decoder import Past
from flash_mlx.tree import DraftTree, Topology

# From tokens [b], features [b, D], the level from 1, the cache and a mask to outputs [b, D].
Step = Callable[[mx.array, mx.array, int, Past, mx.array], tuple[mx.array, Past]]
Logits = Callable[[mx.array], mx.array]


def grow_tree(
    root: int,
    output: mx.array,
    past: Past,
    *,
    step: Step,
    logits: Logits,
    levels: int,
    top_k: int,
    num_nodes: int,
) -> DraftTree:
    """Return the tree of the drafter's likeliest paths. Waits for the device once.

    Args:
        root: Newest token.
        output: [1, D] the drafter's output at the root.
        past: S rows; what is grown is appended to a copy.
        step: Reads one level.
        logits: From outputs to [., V].
        levels: Most tokens of a path, 1 or more.
        top_k: b.
        num_nodes: n.
    """
    top_k = min(top_k, logits(output).shape[-1])
    tokens, scores = (each[0] for each in _best(logits(output), top_k))
    grown_tokens, grown_scores = [tokens], [scores]
    parents = [mx.full(top_k, -1, dtype=mx.int32)]
    branch = mx.arange(top_k)  # where the branches stand among all nodes grown
    features = mx.broadcast_to(output, (top_k, output.shape[-1]))
    num_committed, first = past.length, top_k
    ancestors = mx.eye(top_k, dtype=mx.bool_)
    for level in range(1, levels):
        committed = mx.ones((top_k, num_committed), dtype=mx.bool_)
        mask = mx.concatenate([committed, ancestors], axis=1)
        outputs, past = step(tokens, features, level, past, mask)
        each, added = _best(logits(outputs), top_k)
        each, total = each.flatten(), (scores[:, None] + added).flatten()
        grown_tokens.append(each)
        grown_scores.append(total)
        parents.append(mx.repeat(branch, top_k).astype(mx.int32))
        kept = mx.argsort(-total)[:top_k]
        row = kept // top_k
        tokens, scores, features, branch = each[kept], total[kept], outputs[row], first + kept
        ancestors = mx.concatenate([ancestors[row], mx.eye(top_k, dtype=mx.bool_)], axis=1)
        first += top_k * top_k
    nodes = mx.concatenate(grown_tokens).astype(mx.int32)
    host = map(mx.concatenate, (parents, grown_scores))
    above, score = (np.array(values) for values in host)
    if np.isnan(score).any():  # an id that no target has says that the drafter is broken
        return DraftTree(Topology.chain(1), mx.array([root, -1], dtype=mx.int32))
    order, follows = _choose(above, score, num_nodes)
    drafts = nodes[mx.array(order)]
    return DraftTree(Topology(follows), mx.concatenate([mx.array([root], mx.int32), drafts]))


def _best(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Return the likeliest tokens of each row, likeliest first, and their log-probabilities.

    Args:
        logits: [b, V].
        count: How many.

    Returns:
        [b, count] ids, [b, count] float32, 0 or less.
    """
    wide = logits.astype(mx.float32)
    logprobs = mx.minimum(wide - mx.logsumexp(wide, axis=-1, keepdims=True), 0)
    ids = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[:, :count]
    found = mx.take_along_axis(logprobs, ids, axis=-1)
    order = mx.argsort(-found, axis=-1)
    return mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(found, order, axis=-1)


def _choose(
    parents: npt.NDArray[np.int32], scores: npt.NDArray[np.float32], num_nodes: int
) -> tuple[npt.NDArray[np.int64], tuple[int, ...]]:
    """Choose the best nodes.

    Args:
        parents: [C] a node's parent, which stands before it; -1: the root.
        scores: [C] never above the parent's; -inf cannot be proposed.
        num_nodes: n.

    Returns:
        [n] nodes, best first (fewer, if there are fewer), and the topology's parents, [n + 1].
    """
    order = np.argsort(-scores, kind="stable")[:num_nodes]
    order = order[np.isfinite(scores[order])]
    row = {-1: 0} | {int(node): place for place, node in enumerate(order, start=1)}
    return order, (-1, *(row[int(parents[node])] for node in order))
