"""A prompt read in chunks: which rows are text, and an image compressed from parts of it.

Learned queries need no more than sums of the parts:
the softmax over an image's rows is taken part by part: each has its scores' maximum, its sum of
exp(score - maximum) and its weighted sum of rows. Two parts are joined by scaling both to the
larger maximum, and the latents are the quotient of the sums.

Shapes:
    M: latents.    N: rows of a part of an image.    D: hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from flash_mlx.draft.model import FlashModel
from flash_mlx.kernels.latent_pool import latent_pool


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a prompt that are all text, or all of one image.

    Attributes:
        start: The first row.
        stop: The row after the last.
        image: The row range of the whole image; None for text.
    """

    start: int
    stop: int
    image: tuple[int, int] | None


def pieces(image_spans: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[Piece]:
    """Cut rows `start` to `stop` where text meets an image, or an image another.

    Args:
        image_spans: Half-open row range of each image of the prompt, in order and disjoint.
        start: The first row.
        stop: The row after the last.
    """
    for first, end in image_spans:
        if end <= start or first >= stop:
            continue
        if start < first:
            yield Piece(start, first, None)
        yield Piece(max(start, first), min(end, stop), (first, end))
        start = min(end, stop)
    if start < stop:
        yield Piece(start, stop, None)


@dataclass(frozen=True, eq=False)
class PartPool:
    """Some rows of an image, pooled; all float32.

    Attributes:
        largest: [M, 1] the largest score of each latent.
        total: [M, 1] sum of exp(score - largest).
        rows: [M, D] the rows' sum, weighted by exp(score - largest).

    Source:
        Milakov and Gimelshein 2018, online softmax, arXiv 1805.02867, equation 4.
    """

    largest: mx.array
    total: mx.array
    rows: mx.array

    @classmethod
    def of(cls, queries: mx.array, rows: mx.array) -> PartPool:
        """Pool rows [N, D] by queries [M, D]."""
        return cls(*latent_pool(queries, rows))

    def join(self, other: PartPool) -> PartPool:
        """Return what both parts are together."""
        largest = mx.maximum(self.largest, other.largest)
        mine, others = mx.exp(self.largest - largest), mx.exp(other.largest - largest)
        total = mine * self.total + others * other.total
        return PartPool(largest, total, mine * self.rows + others * other.rows)

    def latents(self) -> mx.array:
        """Return [M, D], once all rows of the image are in."""
        return self.rows / self.total


@dataclass(frozen=True, eq=False)
class PartRows:
    """Some rows of an image that can only be compressed as a whole.

    Attributes:
        rows: [N, D] the target's hidden states there.
    """

    rows: mx.array


Part = PartPool | PartRows


def compress_piece(
    model: FlashModel, rows: mx.array, piece: Piece, part: Part | None
) -> tuple[mx.array, Part | None]:
    """Compress a piece of an image, on top of the parts before it.

    Args:
        model: The drafter's weights.
        rows: [N, D] the target's hidden states at the piece.
        piece: Which rows these are.
        part: The image's rows before; None if there are none.

    Returns:
        Latents [M, D] in the rows' dtype and None after the image's last row; else none [0, D],
        and the part so far.
    """
    config = model.config
    done = piece.image is None or piece.stop == piece.image[1]
    if config.learns_queries:
        pooled = PartPool.of(model.A, rows)
        pooled = part.join(pooled) if isinstance(part, PartPool) else pooled
        return (pooled.latents().astype(rows.dtype), None) if done else (rows[:0], pooled)
    if config.reads_whole_images or not config.num_latents:
        return model.latents(rows), None
    rows = mx.concatenate([part.rows, rows]) if isinstance(part, PartRows) else rows
    return (model.latents(rows), None) if done else (rows[:0], PartRows(rows))
