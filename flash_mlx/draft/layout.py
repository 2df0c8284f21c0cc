"""Where the rows of a prompt go in the sequence that the drafter reads.

The drafter reads one row for each row of text and M latents for each image, at consecutive
positions: the *compressed* sequence. The last row of the prompt is always read as text, since
drafting starts there.

Shapes:
    T: rows of the prompt (in training: prompt and answer).    I: images.    M: latents an image.
    R: rows of text.    S: rows of the compressed sequence, R + I * M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Layout:
    """Which row stands at which position.

    Example:
        Five rows, rows 1 and 2 an image of two latents: rows 0, 3 and 4 are text, and the order
        is (0, 3, 4, 1, 2) - text row 0, latents 0 and 1, which stand after the three text rows in
        the pool, text rows 1 and 2. Row 3 is at position 3, row 4 at position 4.

    Attributes:
        text_rows: [R] the rows that are text, ascending.
        order: [S] position in the compressed sequence -> row of the pool, which is the R text
            rows followed by the M latents of each image in turn.
        num_raw: Leading text rows, those before the first image.
    """

    text_rows: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    num_raw: int

    @classmethod
    def of(
        cls,
        num_rows: int,
        image_spans: Sequence[tuple[int, int]],
        num_latents: int,
        num_prompt_rows: int | None = None,
        *,
        whole: bool = False,
    ) -> Layout:
        """Lay out `num_rows` rows.

        Args:
            num_rows: T.
            image_spans: Half-open row range of each image, in order and disjoint.
            num_latents: M.
            num_prompt_rows: Rows of the prompt, if rows of an answer follow it; else all.
            whole: Whether an image has as many latents as rows, at most M; in the pool it has M
                places all the same.
        """
        last = (num_prompt_rows or num_rows) - 1
        is_text = np.ones(num_rows, dtype=np.bool_)
        for start, stop in image_spans:
            is_text[start:stop] = False
        is_text[last] = True
        text_rows = np.flatnonzero(is_text).astype(np.int32)

        pieces, done = [], 0
        for image, (start, stop) in enumerate(image_spans):
            before = int(np.searchsorted(text_rows, start))
            latents = len(text_rows) + image * num_latents
            count = stop - start if whole else num_latents
            pieces += [np.arange(done, before), np.arange(latents, latents + count)]
            done = before
        pieces.append(np.arange(done, len(text_rows)))
        num_raw = int(np.searchsorted(text_rows, image_spans[0][0])) if image_spans else 0
        return cls(text_rows, np.concatenate(pieces).astype(np.int32), num_raw)

    def positions(self) -> npt.NDArray[np.int32]:
        """[R] position of each text row in the compressed sequence."""
        return np.flatnonzero(self.order < len(self.text_rows)).astype(np.int32)
