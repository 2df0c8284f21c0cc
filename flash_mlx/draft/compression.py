"""How an image's rows become M latents: five ways, all of them weights over the rows.

`queries` learns what to look for (see `model.pool`); the others have nothing to learn. `mean` takes
the average of M stretches of rows, `stride` M rows evenly apart. `merge` starts at those rows, lets
every row join the one that it is most like, and averages. `none` keeps all rows.

Shapes:
    M: latents.    N: rows of an image, padded.    n: its rows that are not padding.
    D: hidden size.    ...: any leading axes.

Source: `merge` is one step of k-means by cosine; what pairs of rows become in ToMe (arXiv
2210.09461) by pairwise matching.
"""

from __future__ import annotations

import mlx.core as mx

COMPRESSIONS = ("queries", "mean", "stride", "merge", "none")


def fixed_weights(
    kind: str, num_latents: int, rows: mx.array, mask: mx.array | None = None
) -> mx.array:
    """Return how much each latent takes of each row, for kinds that learn nothing.

    Args:
        kind: `mean`, `stride` or `merge`.
        num_latents: M, at least 1.
        rows: [..., N, D] the target's hidden at the image's rows.
        mask: [..., 1, N] float32, 0 at rows of the image, which come first, and -inf at padding;
            None if there is none.

    Returns:
        [..., M, N] float32; what a latent takes adds up to 1. With fewer rows than latents, some
        rows are taken more than once.
    """
    place = mx.arange(rows.shape[-2])
    mask = mx.zeros((*rows.shape[:-2], 1, rows.shape[-2])) if mask is None else mask
    count = (mask == 0).sum(axis=-1, keepdims=True)  # n, [..., 1, 1]
    latent = mx.arange(num_latents)[:, None]
    first = latent * count // num_latents
    if kind == "mean":
        stop = mx.maximum(-(-(latent + 1) * count // num_latents), first + 1)
        taken = (first <= place) & (place < stop)
        return taken / taken.sum(axis=-1, keepdims=True)
    middle = (2 * latent + 1) * count // (2 * num_latents)
    chosen = (place == middle).astype(mx.float32)
    if kind == "stride":
        return chosen
    wide = rows.astype(mx.float32)
    wide = wide * mx.rsqrt(mx.maximum((wide * wide).sum(axis=-1, keepdims=True), 1e-12))
    likeness = (chosen @ wide) @ wide.swapaxes(-1, -2)
    joined = (latent == mx.argmax(likeness, axis=-2)[..., None, :]) & (mask == 0)
    # A seed that is the same as an earlier one stays alone.
    taken = mx.maximum(joined, chosen)
    return taken / taken.sum(axis=-1, keepdims=True)
