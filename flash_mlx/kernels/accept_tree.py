"""Following the accepted rows of a draft tree down from its root, on the device.

    row i holds:  greedy: tokens[i] = choice[parents[i]];  else: as the coins fell
    path:         from row 0 to its first child that holds, and on from there
    said:         the token of each row after the root, then the choice at the last row

Otherwise it takes half a dozen small launches to bring to the host what it needs to walk.

Shapes:
    N: rows of the tree, root included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from flash_mlx.kernels.dispatch import Kernel, choose
from flash_mlx.kernels.metal import Source, launch, padded, scalar

MAX_ROWS = 64

SOURCE = Source(
    name="flash_accept_tree",
    inputs=("parents", "tokens", "choice", "flags", "count"),
    outputs=("path",),
    body=r"""
  // One threadgroup of 64 threads, a row each. path [2, N]: rows, then tokens; -1 behind the last.
  const int n = count;
  const int i = int(thread_index_in_threadgroup);
  threadgroup int parent[64];
  threadgroup int token[64];
  threadgroup int next[64];
  threadgroup bool holds[64];
  parent[i] = i < n ? parents[i] : -1;
  token[i] = i < n ? tokens[i] : -1;
  next[i] = i < n ? choice[i] : -1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  holds[i] = i > 0 && i < n && (GREEDY ? token[i] == next[parent[i]] : flags[i] != 0);
  if (i < n) {
    path[i] = -1;
    path[n + i] = -1;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  if (i == 0) {
    int row = 0;
    int length = 1;
    path[0] = 0;
    for (int child = 1; child < n; ++child) {  // children come after their parent, eldest first
      if (holds[child] && parent[child] == row) {
        path[n + length - 1] = token[child];
        path[length] = child;
        row = child;
        length += 1;
      }
    }
    path[n + length - 1] = next[row];
  }
""",
)


def accept_tree(
    parents: Sequence[int], tokens: mx.array, choice: mx.array, holds: mx.array | None = None
) -> mx.array | None:
    """Walk down a tree on the device, where that is right and faster on this machine.

    Args:
        parents: [N] of the tree; `parents[0]` is -1.
        tokens: [N] int32.
        choice: [N] int32; what follows row i if none of its children is accepted.
        holds: [N] int32; not 0 where row i is accepted if its parent is and no elder sibling is.
            None (greedy): where `tokens[i]` is the choice at its parent.

    Returns:
        [2, N] int32: the accepted rows from the root down, and the token after each; -1 behind the
        last. None: the host has to walk.
    """
    arguments = (_on_device(tuple(parents)), tokens, choice, holds)
    if not choose(ACCEPT_TREE, *arguments).use:
        return None
    return ACCEPT_TREE.launch(*arguments)[0]


def accept_tree_ops(
    parents: mx.array, tokens: mx.array, choice: mx.array, holds: mx.array | None
) -> tuple[mx.array]:
    """Define `accept_tree`, by the host's walk; waits for the device."""
    if holds is None:
        holds = (tokens == choice[mx.maximum(parents, 0)]).astype(mx.int32)
    above, said, own, accepted = np.asarray(mx.stack([parents, tokens, choice, holds])).tolist()
    rows, words = [0], []
    for child in range(1, len(above)):
        if accepted[child] and above[child] == rows[-1]:
            rows.append(child)
            words.append(said[child])
    words.append(own[rows[-1]])
    rest = [-1] * (len(above) - len(rows))
    return (mx.array([rows + rest, words + rest], dtype=mx.int32),)


def accept_tree_kernel(
    parents: mx.array, tokens: mx.array, choice: mx.array, holds: mx.array | None
) -> list[mx.array]:
    """Launch `accept_tree`: one kernel."""
    num_rows = parents.size
    rows = [parents, tokens, choice, choice if holds is None else holds]
    return launch(
        SOURCE,
        [*map(padded, rows), scalar(num_rows)],
        [((2, num_rows), mx.int32)],
        grid=(MAX_ROWS, 1, 1),
        threadgroup=(MAX_ROWS, 1, 1),
        template=[("GREEDY", holds is None)],
    )


def accept_tree_fits(
    parents: mx.array, tokens: mx.array, choice: mx.array, holds: mx.array | None
) -> str | None:
    """Return why the kernel does not take these arguments; None if it does."""
    rows = [parents, tokens, choice] + ([] if holds is None else [holds])
    if not 1 <= parents.size <= MAX_ROWS or any(row.shape != (parents.size,) for row in rows):
        return f"1 to {MAX_ROWS} rows"
    if any(row.dtype != mx.int32 for row in rows):
        return "int32 only"
    return None


@lru_cache(maxsize=64)
def _on_device(parents: tuple[int, ...]) -> mx.array:
    return mx.array(parents, dtype=mx.int32)


ACCEPT_TREE = Kernel(
    "accept_tree", accept_tree_ops, accept_tree_kernel, accept_tree_fits, (SOURCE,)
)
