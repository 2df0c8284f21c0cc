"""What the kinds of drafters read of a batch, and what they make of it; training asks no more.

Every kind stands at the same base rows and is taught by the target's states at the rows after them.
FLASH answers for k slots from one pass. A drafter with one layer answers for the next row alone,
as a layer over rows of text and image in the order in which `StepwiseDrafter` reads them.

Shapes: those of `data`. D: hidden size.    W: width of the target's rows.    V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from flash_mlx.draft import FlashModel
from flash_mlx.draft.decoder import Past
from flash_mlx.draft.eagle import EagleModel
from flash_mlx.draft.kinds import DraftModel
from flash_mlx.draft.one_layer import shifted, with_images
from flash_mlx.train.data import (
    ROUND,
    Batch,
    Example,
    Inputs,
    Taught,
    collate,
    pad,
    places_of,
    round_up,
    slots_of,
)
from flash_mlx.train.teacher import slot_outputs

Function = Callable[[mx.array], mx.array]
Read = TypeVar("Read", bound=Taught)


class Pupil(Protocol[Read]):
    """A drafter in training.

    Attributes:
        inputs: What its batches are made of.
        compiles: Whether its batches hold arrays alone, so that a step can be compiled.
    """

    inputs: type[Read]
    compiles: bool

    @property
    def clean(self) -> int:
        """Leading columns of the target's rows that no noise is added to."""

    def collate(
        self, examples: Sequence[Example], share: float, seed: Sequence[int], multiple: int
    ) -> Batch:
        """Put examples side by side; see `data.collate`."""

    def given(self, hidden: mx.array) -> mx.array:
        """Return what is read of the target's rows [B, T, W]: [B, T, .], the states last."""

    def outputs(self, inputs: Read, read: mx.array, embed: Function) -> mx.array:
        """Return the LM head's inputs [n, k, D] at all base rows.

        Args:
            inputs: The batch.
            read: From `given`, or with the drafter's own predictions in the states' place.
            embed: The target's.
        """

    def head(self, lm_head: Function) -> Function:
        """Return the target's LM head over the ids that this drafter knows."""


@dataclass(frozen=True, eq=False)
class FlashPupil:
    """A FLASH drafter in training; implements `Pupil[Inputs]`."""

    model: FlashModel
    inputs = Inputs
    compiles = True

    @property
    def clean(self) -> int:
        """None: taps are states too."""
        return 0

    def collate(
        self, examples: Sequence[Example], share: float, seed: Sequence[int], multiple: int
    ) -> Batch:
        """Put examples side by side; see `data.collate`."""
        sizes = self.model.config
        num_latents = None if sizes.reads_whole_images else sizes.num_latents
        return collate(
            examples, num_latents, sizes.block_size, share, seed, multiple, sizes.video_groups
        )

    def given(self, hidden: mx.array) -> mx.array:
        """Return the rows as they are."""
        return hidden

    def outputs(self, inputs: Inputs, read: mx.array, embed: Function) -> mx.array:
        """Return [n, k, D]; see `teacher.slot_outputs`."""
        return slot_outputs(self.model, inputs, read, embed)

    def head(self, lm_head: Function) -> Function:
        """Return the LM head: of tokens that it cannot propose it learns that they are said."""
        return lm_head


@dataclass(frozen=True, eq=False)
class TextInputs(Taught):
    """A batch as a drafter with one layer sees it.

    Attributes:
        tokens: [B, T] int32, prompt and answer, then zeros.
        texts: Of each sequence, how many of its rows are read (the last two have nothing to
            predict), and the ranges of those whose next row is an image's.
    """

    tokens: mx.array
    texts: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True, eq=False)
class OneLayerPupil:
    """An EAGLE, MSD or ViSpec drafter in training; implements `Pupil[TextInputs]`."""

    model: EagleModel
    inputs = TextInputs
    compiles = False

    @property
    def clean(self) -> int:
        """D: the embeddings, which come first."""
        return self.model.config.hidden_size

    def collate(
        self, examples: Sequence[Example], share: float, seed: Sequence[int], multiple: int
    ) -> Batch:
        """Put examples side by side; one slot a base row."""
        tokens = pad([np.array(e.tokens) for e in examples], ROUND)
        places = places_of(examples, share, seed)
        rows = [len(e.prompt) - 1 + kept for e, kept in zip(examples, places, strict=True)]
        num_base = round_up(max(map(len, places)), multiple)
        inputs = TextInputs(
            tokens=tokens,
            texts=tuple(
                (len(e.tokens) - 2, tuple(shifted(e.prompt.image_spans))) for e in examples
            ),
            base_rows=pad(rows, multiple),
            **slots_of(examples, places, (tokens.shape[1], num_base, multiple), 1),
        )
        return Batch(tuple(examples), tokens, inputs)

    def given(self, hidden: mx.array) -> mx.array:
        """Return what the layers received and the features, [B, T, 2D]."""
        received, features = self.model.split(hidden.reshape(-1, hidden.shape[-1]))
        rows = [features] if received is None else [received.astype(features.dtype), features]
        return mx.concatenate(rows, axis=-1).reshape(*hidden.shape[:2], -1)

    def outputs(self, inputs: TextInputs, read: mx.array, embed: Function) -> mx.array:
        """Return [n, 1, D] of one text after the other, as each is read by itself."""
        model, (_, num_rows, _), size = self.model, read.shape, self.model.config.hidden_size
        texts: list[mx.array] = []
        for (length, images), tokens, rows in zip(inputs.texts, inputs.tokens, read, strict=True):
            received, features = rows[:, :-size], rows[:length, -size:]
            after = model.look_up(tokens[1 : length + 1], embed).astype(features.dtype)
            after = with_images(after, received, images)
            reading = model.read_prompt(after, features, images)
            empty = Past.empty(model.config, features.dtype)
            outputs, _ = model.read(reading.rows, mx.array(reading.positions), empty)
            # Fewer rows where images are compressed; those of the answer are the last in any case.
            before = length - outputs.shape[0]
            texts.append(mx.pad(outputs, [(before, num_rows - length), (0, 0)]))
        at_base = mx.take_along_axis(mx.stack(texts), inputs.base_rows[..., None], axis=1)
        return at_base.reshape(-1, 1, size)[inputs.chosen]

    def head(self, lm_head: Function) -> Function:
        """Return the LM head without ids that the drafter lacks: the target's padding."""
        num_ids = self.model.config.vocab_size
        return lambda rows: lm_head(rows)[..., :num_ids]


def pupil_of(model: DraftModel) -> Pupil[Any]:
    """Return a drafter as training sees it.

    An embedding table that a drafter with one layer brings is the target's and stays as it is.

    Raises:
        ValueError: If its kind cannot be trained.
    """
    if isinstance(model, FlashModel):
        return FlashPupil(model)
    if not isinstance(model, EagleModel):
        raise ValueError(
            f"A drafter must predict states of its target to be trained; {type(model).__name__} "
            "does not. Begin with a FLASH, EAGLE, MSD or ViSpec drafter."
        )
    if model.config.own_embedding:
        model.embed_tokens.freeze()
    return OneLayerPupil(model)
