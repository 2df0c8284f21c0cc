"""Drafters of the study with one decoder layer, and their training: the library's.

Shapes:
    B: sequences of a batch.    T: rows of a sequence.    R: rows that the drafter reads of a
    prompt.    D: hidden size.    W: width of what the target gives.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_mlx.draft.decoder import DecoderConfig
from flash_mlx.draft.eagle import EagleModel
from flash_mlx.draft.one_layer import OneLayerModel, Reading, Spans, image_rows
from flash_mlx.targets import LoadedTarget
from flash_mlx.train import Batch, Teacher, TrainConfig, Trainer
from study_data import Examples


class HiddenVisionModel(EagleModel):
    """EAGLE without the rows of images: what it knows of them is in the text's hidden states.

    Source: the idea of HiViS, arXiv 2509.23928.
    """

    def read_prompt(
        self,
        embeddings: mx.array,
        features: mx.array,
        images: Spans,
        context: mx.array | None = None,
    ) -> Reading:
        """Return what is read of a prompt; see `OneLayerModel.read_prompt`."""
        visual = image_rows(images, embeddings.shape[0])
        rows = np.flatnonzero(~visual).astype(np.int32)
        chosen = mx.array(rows)
        return Reading(self.fuse(embeddings[chosen], features[chosen], context), rows, context)


class MiddleTapModel(EagleModel):
    """EAGLE that reads what the target's middle layer reads as well, at the rows it has read.

    The drafter's own outputs stand for last hidden states alone: what the middle layer would read
    of a draft is not predicted.

    Weights:
        Those of EAGLE; tap_norm [D]; fc_tap [D, D], zeros at first.

    Source: the tap of DREAM, arXiv 2505.19201, without its cross-attention and its choice of layer.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.tap_norm = nn.RMSNorm(size)
        self.fc_tap = nn.Linear(size, size, bias=False)
        self.fc_tap.weight = mx.zeros_like(self.fc_tap.weight)

    def taps(self, num_layers: int) -> tuple[int, ...]:
        """Return layer 0, whose inputs are the embeddings, and the middle one."""
        return 0, num_layers // 2

    def split(self, hidden: mx.array) -> tuple[mx.array | None, mx.array]:
        """Turn [R, 3D] into embeddings and features."""
        embeddings, middle, last = mx.split(hidden, 3, axis=-1)
        return embeddings, last + self.fc_tap(self.tap_norm(middle))


class _Unsaved(Trainer):
    """A run whose drafter is measured at once: some are of no kind that a folder may say."""

    def save(self) -> None:
        """Write nothing."""


def train_one_layer(
    model: OneLayerModel, loaded: LoadedTarget, source: Examples, config: TrainConfig
) -> None:
    """Train for `config.iterations` steps; the model ends with the averaged weights.

    Args:
        model: With initial weights.
        loaded: The target.
        source: Its answers.
        config: How to train.
    """
    with tempfile.TemporaryDirectory() as folder:
        teacher = with_embeddings(loaded, source)
        trainer = _Unsaved(model, teacher, source.examples, Path(folder), config)
        trainer.run()
    model.update(trainer.averaged().parameters())


def with_embeddings(loaded: LoadedTarget, source: Examples) -> Teacher:
    """Return the teacher whose rows [B, T, D + W] begin with what the target's layers receive."""
    known, place = source.teacher(loaded), {id(e): i for i, e in enumerate(source.examples)}

    def hidden(batch: Batch) -> mx.array:
        rows = known.hidden(batch)
        received = loaded.target.embed(batch.tokens).astype(rows.dtype)
        for b, example in enumerate(batch.examples):
            spans = example.prompt.image_spans  # as many in every example
            for number, (start, stop) in enumerate(spans, place[id(example)] // 2 * len(spans)):
                received[b, start:stop] = mx.array(source.visual[number].astype(np.float32))
        return mx.concatenate([received, rows], axis=-1)

    return Teacher(hidden, known.embed, known.lm_head)


def one_layer_config(loaded: LoadedTarget, **changes: int) -> DecoderConfig:
    """The sizes of the study's own drafters: three heads of 64, an MLP of four times the width."""
    size = loaded.target.hidden_size
    settings = {
        "hidden_size": size,
        "vocab_size": loaded.target.vocab_size,
        "intermediate_size": 4 * size,
        "num_heads": size // 64,
        "num_kv_heads": size // 64,
        "head_dim": 64,
        "block_size": 6,
    }
    return DecoderConfig(**{**settings, **changes})
