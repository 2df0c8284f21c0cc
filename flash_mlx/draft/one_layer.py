"""What the drafters with one decoder layer have in common; what a row is made of is each one's own.

Row t stands for the token after prompt row t: it joins that token's embedding with a feature of the
target at row t. The layer's output is the feature of row t + 1, so after the newest token the
drafter goes on with its own outputs in place of the target's features.

Shapes:
    R: rows of a pass.    S: rows in the cache.
    D: the drafter's hidden size.    V: the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flash_mlx.draft.decoder import DecoderConfig, DecoderLayer, Past

Spans = Sequence[tuple[int, int]]


def image_rows(images: Spans, num_rows: int) -> npt.NDArray[np.bool_]:
    """Return which of `num_rows` rows are in one of these ranges, [num_rows] bool."""
    marks = np.zeros(num_rows, dtype=np.bool_)
    for start, stop in images:
        marks[start:stop] = True
    return marks


def shifted(image_spans: Spans) -> list[tuple[int, int]]:
    """Return the ranges of the rows whose next row is an image's."""
    spans = [(max(start - 1, 0), stop - 1) for start, stop in image_spans]
    return [(start, stop) for start, stop in spans if start < stop]


def with_images(embeddings: mx.array, received: mx.array | None, images: Spans) -> mx.array:
    """Return embeddings of next tokens, those of images being what the target received.

    Args:
        embeddings: [R, D] of the token after each row.
        received: [R + 1 or more, D] what the target's layers received at each row; None: images
            are read like text.
        images: From `shifted`.
    """
    if received is None:
        return embeddings
    for start, stop in images:
        seen = received[start + 1 : stop + 1].astype(embeddings.dtype)
        embeddings = mx.concatenate([embeddings[:start], seen, embeddings[stop:]])
    return embeddings


@dataclass(frozen=True, eq=False)
class Reading:
    """What a drafter's layer reads of a prompt.

    Attributes:
        rows: [R, .] its inputs; fewer than were read where an image is compressed.
        positions: [R] int32, each row's place among those that were read.
        context: What all later rows read as well; None: nothing.
    """

    rows: mx.array
    positions: npt.NDArray[np.int32]
    context: mx.array | None = None


class OneLayerModel(nn.Module):
    """A drafter's weights. Subclasses say what a row is made of.

    Attributes:
        config: Settings.
        needs_hidden: Whether the target's last hidden states are read besides those of `taps`.

    Weights:
        embed_tokens [V of the drafter, D] with `own_embedding`; and the subclass's.
    """

    needs_hidden = True

    def __init__(self, config: DecoderConfig) -> None:
        """Draw initial weights."""
        super().__init__()
        self.config = config
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    @property
    def proposed_ids(self) -> mx.array | None:
        """Tokens that it may propose, [U] int32; None: all."""
        return None

    @property
    def target_size(self) -> int:
        """The target's hidden size."""
        return self.config.hidden_size

    @property
    def layer(self) -> DecoderLayer:
        """The decoder layer."""
        raise NotImplementedError

    def taps(self, num_layers: int) -> tuple[int, ...]:
        """Return which of the target's layers have their inputs read; layer 0's are embeddings."""
        raise NotImplementedError

    def split(self, hidden: mx.array) -> tuple[mx.array | None, mx.array]:
        """Take apart what the target gives: inputs of the tapped layers, then its hidden states.

        Args:
            hidden: [R, .].

        Returns:
            [R, D] embeddings as the target's layers received them, or None where the drafter looks
            up ids even of images; [R, D] features.
        """
        raise NotImplementedError

    def look_up(self, tokens: mx.array, embed: Callable[[mx.array], mx.array]) -> mx.array:
        """Return [R, D] of ids [R], by the target's `embed` unless the drafter brings its own.

        Ids beyond the drafter's own table are the target's padding.
        """
        if not self.config.own_embedding:
            return embed(tokens)
        embedded: mx.array = self.embed_tokens(mx.minimum(tokens, self.config.vocab_size - 1))
        return embedded

    def fuse(self, embeddings: mx.array, features: mx.array, context: mx.array | None) -> mx.array:
        """Return the layer's inputs, [R, .].

        Args:
            embeddings: [R, D] of the token after each row.
            features: [R, D] at each row.
            context: From `read_prompt`.
        """
        raise NotImplementedError

    def logits(
        self, outputs: mx.array, lm_head: Callable[[mx.array], mx.array], vocab_size: int
    ) -> mx.array:
        """Return [R, V] of the layer's outputs [R, D]; -inf where nothing can be proposed.

        Args:
            outputs: From the layer.
            lm_head: The target's.
            vocab_size: V.
        """
        raise NotImplementedError

    def read_prompt(
        self,
        embeddings: mx.array,
        features: mx.array,
        images: Spans,  # noqa: ARG002
        context: mx.array | None = None,
    ) -> Reading:
        """Return what is read of some rows of a prompt.

        Args:
            embeddings: [R, D] of the token after each row; of the next row, if it is an image's.
            features: [R, D].
            images: Half-open ranges of the rows whose next row is an image's, in order.
            context: From the rows before; None if there are none.
        """
        positions = np.arange(embeddings.shape[0], dtype=np.int32)
        return Reading(self.fuse(embeddings, features, context), positions, context)

    def read(
        self, rows: mx.array, positions: mx.array, past: Past, mask: mx.array | None = None
    ) -> tuple[mx.array, Past]:
        """Pass rows through the layer; see `DecoderLayer`."""
        outputs: tuple[mx.array, Past] = self.layer(rows, positions, past, mask)
        return outputs
