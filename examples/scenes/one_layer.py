"""Training of drafters with one decoder layer, which the library only runs: EAGLE and its kin.

Row t of a text joins the target's hidden state there with the embedding of token t + 1; its output
stands for the hidden state of row t + 1. Rows of the answer are taught, by the same objectives and
optimisers as the library's own drafters.

Shapes:
    T: rows of prompt and answer.    R: rows that the drafter reads of them.    D: hidden size.
    n: taught rows of a batch.    N: rows of an image.    V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import flash_mlx  # noqa: F401  (binds a fast BLAS before MLX is imported)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from flash_mlx.draft.decoder import DecoderConfig, Past
from flash_mlx.draft.eagle import EagleModel
from flash_mlx.draft.one_layer import OneLayerModel, Reading, Spans, image_rows
from flash_mlx.targets import LoadedTarget
from flash_mlx.train import LossWeights, TrainConfig
from flash_mlx.train.config import make_optimizer
from flash_mlx.train.losses import said_by_target, weighted
from flash_mlx.train.order import Epochs
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


@dataclass(frozen=True, eq=False)
class _Text:
    """A text as the drafter reads it.

    Attributes:
        embeddings: [T - 2, D] of the token, or the piece of an image, after each row.
        given: [T - 2, W] what the target gives but for its embeddings: its hidden states last.
        images: Of `OneLayerModel.read_prompt`.
        taught: [A - 1, D] the hidden states that the last A - 1 outputs stand for.
    """

    embeddings: mx.array
    given: mx.array
    images: Spans
    taught: mx.array


def train_one_layer(
    model: OneLayerModel, loaded: LoadedTarget, source: Examples, config: TrainConfig
) -> None:
    """Train for `config.iterations` steps; the model ends with the averaged weights.

    Args:
        model: With initial weights.
        loaded: The target.
        source: Its answers.
        config: Steps, batch, optimiser, losses, `hidden_noise` and `rollout`; nothing else counts.
    """
    numbers = [i for i, e in enumerate(source.examples) if len(e.answer) > 1]
    lengths = [len(source.examples[i].tokens) for i in numbers]
    order = Epochs(lengths, config.batch_size, config.seed)
    optimizer = make_optimizer(config)
    optimizer.init(model.trainable_parameters())
    average = dict(tree_flatten(model.parameters()))
    loss_and_gradient = nn.value_and_grad(
        model, lambda texts: _loss(model, loaded, texts, config.losses, config.rollout)
    )
    for step in range(config.iterations):
        texts = [_read(loaded, source, numbers[i]) for i in order[step]]
        key = mx.random.key(config.seed + (step << 20))
        texts = [
            replace(text, given=_noisy(text.given, config.hidden_noise, one))
            for text, one in zip(texts, mx.random.split(key, len(texts)), strict=True)
        ]
        loss, gradient = loss_and_gradient(texts)
        gradient, _ = optim.clip_grad_norm(gradient, config.max_grad_norm)
        optimizer.update(model, gradient)
        keep = min(config.ema_decay, (step + 1) / (step + 11))
        for name, value in tree_flatten(model.parameters()):
            average[name] = keep * average[name] + (1 - keep) * value
        mx.eval(loss, model.state, optimizer.state, average)
        if not mx.isfinite(loss).item():
            raise ValueError(f"The loss must be a number; it is {loss.item()} at step {step}.")
    model.update(tree_unflatten(list(average.items())))


def _read(loaded: LoadedTarget, source: Examples, number: int) -> _Text:
    """Put an example's embeddings and states side by side, as `StepwiseDrafter.prefill` does."""
    example = source.examples[number]
    tokens, prompt = example.tokens, example.prompt
    hidden = mx.array(source.rows(number).astype(np.float32))
    embeddings = loaded.target.embed(mx.array(tokens[1:-1], dtype=mx.int32))
    images = []
    for start, stop in prompt.image_spans:
        seen = mx.array(source.visual[number // 2].astype(np.float32))
        embeddings = mx.concatenate([embeddings[: start - 1], seen, embeddings[stop - 1 :]])
        images.append((start - 1, stop - 1))
    end = len(tokens) - 2
    taught = hidden[len(prompt) : end + 1, -loaded.target.hidden_size :]
    return _Text(embeddings[:end], hidden[:end], images, taught)


def _features(model: OneLayerModel, text: _Text) -> mx.array:
    """Return what the drafter makes of what the target gives, [T - 2, D]."""
    return model.split(mx.concatenate([text.embeddings, text.given], axis=-1))[1]


def _noisy(features: mx.array, width: float, key: mx.array) -> mx.array:
    """Add what the published recipes do: uniform noise, less in longer texts."""
    if not width:
        return features
    scale = width * 512 / features.shape[0]
    return features + scale * mx.random.uniform(-1, 1, features.shape, key=key)


def _outputs(model: OneLayerModel, text: _Text, features: mx.array) -> mx.array:
    """Return the outputs at the rows that are taught, [A - 1, D]."""
    reading = model.read_prompt(text.embeddings, features, text.images)
    empty = Past.empty(model.config, features.dtype)
    outputs, _ = model.read(reading.rows, mx.array(reading.positions), empty)
    return outputs[-text.taught.shape[0] :]


def _loss(
    model: OneLayerModel,
    loaded: LoadedTarget,
    texts: Sequence[_Text],
    weights: LossWeights,
    rollout: int,
) -> mx.array:
    """Return the mean over rows and passes; later passes read what the one before predicted."""
    lm_head = loaded.target.lm_head
    taught = mx.concatenate([text.taught for text in texts])
    target_logits = mx.stop_gradient(lm_head(taught))
    p, order = said_by_target(target_logits, weights)
    given = [_features(model, text) for text in texts]
    read, total = given, mx.zeros(())
    for number in range(1 + rollout):
        outputs = [_outputs(model, *pair) for pair in zip(texts, read, strict=True)]
        rows = mx.concatenate(outputs)
        logits = model.logits(rows, lm_head, loaded.target.vocab_size)
        total = total + weighted(rows, logits, taught, p, order, weights).mean()
        if number < rollout:
            read = [
                mx.concatenate([rows[: -len(out) + 1], out[:-1]]) if len(out) > 1 else rows
                for rows, out in zip(given, outputs, strict=True)
            ]
    return total / (1 + rollout)


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
