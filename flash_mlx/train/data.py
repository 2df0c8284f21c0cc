"""Examples, and batches of them as arrays of rows and positions.

An example is a prompt and what the target answered. Every token of the answer but the last can be
a root: the drafter stands at the row before it, and its k slots are taught by the k rows after
that one, whose tokens the target chose. Nothing is asked about what follows the answer's end.
A batch may stand at some of these base rows only: neighbours are taught by nearly the same rows,
so a few of many answers teach more than all of few.

Example, in row numbers: a prompt of 4 rows and an answer of tokens 4, 5, 6. Base row 3 has root 4
and drafts tokens 5 (slot 0, taught by row 4) and 6 (slot 1, taught by row 5); base row 4 has root
5 and drafts token 6 (slot 0, taught by row 5).

Shapes:
    B: sequences.    T: rows of a sequence.    R: its rows of text.    S: rows of its compressed
    sequence.    I: images.    N: rows of an image.    M: latents.    Q: base rows of a sequence.
    n: base rows of all sequences.    m: rows that can teach, of all sequences.    k: slots.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_mlx.draft import Layout
from flash_mlx.prompt import Prompt

ROUND = 16  # sizes are padded to multiples of this, where few shapes are to occur


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt and the target's answer to it.

    Attributes:
        prompt: What the target read.
        answer: What it said, its stop token included. With fewer than two tokens there is
            nothing to draft.
        digest: SHA-256 of what was asked, pictures included, and of whom; empty if unknown.
    """

    prompt: Prompt
    answer: tuple[int, ...]
    digest: str = ""

    @property
    def tokens(self) -> tuple[int, ...]:
        """[T] prompt and answer."""
        return self.prompt.tokens + self.answer


@dataclass(frozen=True, eq=False)
class Taught:
    """What teaches a batch, whatever the drafter. Padding is 0 and has no weight.

    Attributes:
        base_rows: [B, Q] int32, the base rows.
        chosen: [n] int32, place b * Q + q of each base row that is not padding.
        teacher_rows: [m] int32, place b * T + row of each row after one that could be a base row.
        teacher: [n, k] int32, which entry of `teacher_rows` teaches slot i.
        said: [n, k] int32, the token before the one that slot i drafts; at slot 0 the root.
        weight: [n, k] float32, 1 where there is a token to draft.
    """

    base_rows: mx.array
    chosen: mx.array
    teacher_rows: mx.array
    teacher: mx.array
    said: mx.array
    weight: mx.array


@dataclass(frozen=True, eq=False)
class Inputs(Taught):
    """A batch as a FLASH drafter sees it. Padding is 0 and has no weight.

    Attributes:
        text_rows: [B, R] int32, rows that are text.
        followers: [B, R] int32, the token that follows each of them.
        num_raw: [B] int32, leading text rows, those before the first image.
        image_rows: [B, I, N] int32, rows of each image.
        image_mask: [B, I, 1, N] float32, 0 at rows of the image, -inf at padding.
        order: [B, S] int32, position in the compressed sequence -> row of the pool, which is the
            R text rows followed by the I * M latents.
        base: [B, Q] int32, position of each base row in the compressed sequence.
    """

    text_rows: mx.array
    followers: mx.array
    num_raw: mx.array
    image_rows: mx.array
    image_mask: mx.array
    order: mx.array
    base: mx.array


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples, padded.

    Attributes:
        examples: B of them.
        tokens: [B, T] int32, prompt and answer, then zeros.
        inputs: What the drafter is trained on.
    """

    examples: tuple[Example, ...]
    tokens: mx.array
    inputs: Taught


def collate(
    examples: Sequence[Example],
    num_latents: int | None,
    block_size: int,
    share: float = 1.0,
    seed: Sequence[int] = (),
    multiple: int = ROUND,
    video_groups: int = 0,
) -> Batch:
    """Put examples side by side.

    Args:
        examples: B, at least one.
        num_latents: M; None: images are not compressed.
        block_size: k.
        share: Of the possible base rows, those that are chosen, at random; at least one a sequence.
        seed: Of this choice.
        multiple: Sizes are padded to multiples of this; T is in any case to one of `ROUND`, as
            noise is drawn for all of its rows.
        video_groups: As in `FlashConfig`.
    """
    spans = [e.prompt.merged_spans(video_groups) for e in examples]
    whole = num_latents is None
    most = _longest(spans) if num_latents is None else num_latents
    layouts = [
        Layout.of(len(e.tokens) - 1, own, most, len(e.prompt), whole=whole)
        for e, own in zip(examples, spans, strict=True)
    ]
    num_text = round_up(max(len(layout.text_rows) for layout in layouts), multiple)
    places = places_of(examples, share, seed)
    bases = [
        _base_rows(e, layout, kept)
        for e, layout, kept in zip(examples, layouts, places, strict=True)
    ]
    orders = [
        np.where(x.order < len(x.text_rows), x.order, x.order + num_text - len(x.text_rows))
        for x in layouts
    ]
    image_rows, image_mask = _images(spans)
    tokens = pad([np.array(e.tokens) for e in examples], ROUND)
    num_base = round_up(max(map(len, places)), multiple)
    inputs = Inputs(
        text_rows=pad([layout.text_rows for layout in layouts], multiple),
        followers=pad(
            [np.array(e.tokens)[x.text_rows + 1] for e, x in zip(examples, layouts, strict=True)],
            multiple,
        ),
        num_raw=mx.array([layout.num_raw for layout in layouts], dtype=mx.int32),
        image_rows=image_rows,
        image_mask=image_mask,
        order=pad(orders, multiple),
        base=pad([positions for _, positions in bases], multiple),
        base_rows=pad([rows for rows, _ in bases], multiple),
        **slots_of(examples, places, (tokens.shape[1], num_base, multiple), block_size),
    )
    return Batch(tuple(examples), tokens, inputs)


def fingerprint(examples: Sequence[Example]) -> int:
    """Return a number that other examples, or the same in another order, hardly have."""
    check = 0
    for example in examples:
        content = (*example.tokens, -1, len(example.prompt), *sum(example.prompt.image_spans, ()))
        check = zlib.crc32(np.array(content, dtype=np.int64).tobytes(), check)
    return check


def places_of(
    examples: Sequence[Example], share: float, seed: Sequence[int]
) -> list[npt.NDArray[np.int32]]:
    """Return which of its possible base rows each example stands at, counted from the first."""
    rng = np.random.default_rng(list(seed))
    counts = [max(len(e.answer) - 1, 0) for e in examples]
    return [
        np.sort(rng.permutation(count)[: math.ceil(count * share)]).astype(np.int32)
        for count in counts
    ]


def _base_rows(
    example: Example, layout: Layout, places: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the example's base rows and their positions in the compressed sequence."""
    rows = (len(example.prompt) - 1 + places).astype(np.int32)
    return rows, layout.positions()[np.searchsorted(layout.text_rows, rows)]


def slots_of(
    examples: Sequence[Example],
    places: Sequence[npt.NDArray[np.int32]],
    sizes: tuple[int, int, int],
    block_size: int,
) -> dict[str, mx.array]:
    """Return what teaches the slots of all base rows: see `Inputs`.

    Args:
        examples: B.
        places: Of each, from `_places`.
        sizes: T, Q, and the multiple that n and m are padded to.
        block_size: k.
    """
    num_rows, num_base, multiple = sizes
    counts = [max(len(e.answer) - 1, 0) for e in examples]
    teacher_rows = np.zeros(round_up(sum(counts), multiple), dtype=np.int32)
    total = round_up(sum(map(len, places)), multiple)
    chosen = np.zeros(total, dtype=np.int32)
    teacher, said = np.zeros((2, total, block_size), dtype=np.int32)
    weight = np.zeros((total, block_size), dtype=np.float32)
    slots, begin, taught = np.arange(block_size), 0, 0
    for b, (example, count, kept) in enumerate(zip(examples, counts, places, strict=True)):
        first = b * num_rows + len(example.prompt)
        teacher_rows[taught : taught + count] = first + np.arange(count)
        part = slice(begin, begin + len(kept))
        chosen[part] = b * num_base + np.arange(len(kept))
        after = kept[:, None] + slots  # the answer's token before the one that a slot drafts
        inside = after < count
        teacher[part] = np.where(inside, taught + after, 0)
        said[part] = np.array(example.answer)[np.where(inside, after, 0)]
        weight[part] = inside
        begin, taught = begin + len(kept), taught + count
    arrays = {"chosen": chosen, "teacher_rows": teacher_rows, "teacher": teacher, "said": said}
    return {name: mx.array(value) for name, value in (arrays | {"weight": weight}).items()}


def _images(spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[mx.array, mx.array]:
    """Return rows and mask of all images; a sequence with fewer has images of one row, row 0."""
    num_images = max(map(len, spans))
    longest = _longest(spans)
    rows = np.zeros((len(spans), num_images, longest), dtype=np.int32)
    mask = np.full((len(spans), num_images, 1, longest), -np.inf, dtype=np.float32)
    mask[..., :1] = 0
    for b, images in enumerate(spans):
        for i, (start, stop) in enumerate(images):
            rows[b, i, : stop - start] = np.arange(start, stop)
            mask[b, i, :, : stop - start] = 0
    return mx.array(rows), mx.array(mask)


def _longest(spans: Sequence[Sequence[tuple[int, int]]]) -> int:
    """Return N, the rows of the image that has most."""
    return max((stop - start for images in spans for start, stop in images), default=0)


def round_up(size: int, multiple: int) -> int:
    """Return the next multiple of a number, at least one."""
    return max(-(-size // multiple), 1) * multiple


def pad(rows: Sequence[npt.NDArray[np.generic]], multiple: int) -> mx.array:
    """Stack rows of different lengths, zeros behind: [B, longest] int32."""
    padded = np.zeros((len(rows), round_up(max(map(len, rows)), multiple)), dtype=np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return mx.array(padded)
