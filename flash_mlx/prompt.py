"""What the target reads before it speaks: token ids, where images stand, and their arrays.

Shapes:
    T: rows of the prompt, each image placeholder already expanded to its visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import mlx.core as mx


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation turn, ready for the target.

    Attributes:
        tokens: [T] ids on the host; an image's placeholder is repeated once for each of its rows.
        image_spans: Half-open row range `(start, stop)` of each image's visual tokens, in order.
            Two images may touch; their ranges stay separate. Each frame of a video (or frames that
            the target sees as one) counts as an image.
        inputs: The processor's arrays besides the ids (`pixel_values`, `image_grid_thw`,
            `attention_mask`, ...); empty for text.
        image_digests: What tells the content of each image from others; empty if nobody asked.
        videos: Half-open range in `image_spans` of each video's frames, in order.

    Raises:
        ValueError: If there is no token, or a span is empty, out of order or out of the prompt.
    """

    tokens: tuple[int, ...]
    image_spans: tuple[tuple[int, int], ...] = ()
    inputs: Mapping[str, mx.array] = field(default_factory=dict)
    image_digests: tuple[str, ...] = ()
    videos: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check that there is something to read and that the spans lie in it, in order."""
        if not self.tokens:
            raise ValueError("A prompt must hold at least one token, and this one is empty.")
        end = 0
        for start, stop in self.image_spans:
            if not end <= start < stop <= len(self.tokens):
                raise ValueError(
                    f"Image spans must be non-empty, in order and inside the prompt's "
                    f"{len(self.tokens)} rows; got {self.image_spans}."
                )
            end = stop

    def __len__(self) -> int:
        """Return T."""
        return len(self.tokens)

    def require_fits(self, limit: int | None) -> None:
        """Require the prompt to fit in a context of `limit` rows; None: any does.

        Raises:
            ValueError: If it is longer.
        """
        if limit is not None and len(self) > limit:
            raise ValueError(
                f"The prompt must fit in the model's context of {limit} tokens; it has "
                f"{len(self)}, {self.num_visual_tokens} of them from images. Shorten it, or use "
                "smaller images or fewer frames."
            )

    def merged_spans(self, most: int) -> tuple[tuple[int, int], ...]:
        """Return `image_spans` with neighbouring frames of a video joined.

        Rows between two frames that are joined belong to the new span.

        Args:
            most: Spans of one video at most; 0 joins none.
        """
        if not most:
            return self.image_spans
        spans: list[tuple[int, int]] = []
        done = 0
        for first, stop in self.videos:
            spans += self.image_spans[done:first]
            frames, done = self.image_spans[first:stop], stop
            groups = min(most, len(frames))
            bounds = [len(frames) * group // groups for group in range(groups + 1)]
            spans += [(frames[start][0], frames[end - 1][1]) for start, end in pairwise(bounds)]
        return (*spans, *self.image_spans[done:])

    @property
    def num_visual_tokens(self) -> int:
        """Rows that hold an image."""
        return sum(stop - start for start, stop in self.image_spans)
