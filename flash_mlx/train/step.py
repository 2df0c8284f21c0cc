"""One step: the gradient of a batch, and what is done with it.

Weights, their average and the optimiser's moments are float32, always; what a batch is computed in
is another matter (`TrainConfig.dtype`): the weights are cast inside of the gradient, which comes
back in float32.

Shapes: those of `data`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from flash_mlx.draft.kinds import DraftModel
from flash_mlx.draft.vocabulary import head_of
from flash_mlx.train.config import TrainConfig
from flash_mlx.train.data import Batch, Taught
from flash_mlx.train.losses import objective
from flash_mlx.train.pupil import Pupil
from flash_mlx.train.state import flat
from flash_mlx.train.teacher import Teacher, rolled_out

Gradient = tuple[mx.array, mx.array, dict[str, Any]]


class Step:
    """The two halves of a step, as (compiled) functions of arrays.

    Attributes:
        gradient: Inputs by name, noisy hidden [B, T, W] and what is taught [n, D] -> loss,
            agreement (see `objective`) and the gradient, a tree like the weights.
        update: The gradient and the number of this step, from 1 -> the gradient's norm. Moves
            weights, moments and average.
    """

    def __init__(
        self,
        model: DraftModel,
        pupil: Pupil[Any],
        teacher: Teacher,
        optimizer: optim.Optimizer,
        ema: dict[str, mx.array],
        config: TrainConfig,
    ) -> None:
        """Build the functions.

        Args:
            model: The drafter; its weights are changed in place, as are the next two.
            pupil: The same drafter, as training sees it.
            teacher: The target.
            optimizer: Holds the moments.
            ema: The averaged weights by name.
            config: How to train.
        """
        self._model, self._pupil = model, pupil
        self._teacher, self._config = teacher, config
        self._lm_head = pupil.head(teacher.lm_head)
        self._own_head = head_of(self._lm_head, model.proposed_ids)  # its rows are gathered once
        self._optimizer, self._ema = optimizer, ema
        self._value_and_grad = nn.value_and_grad(model, self._loss)
        self.gradient: Callable[..., Gradient] = self._gradient
        self.update: Callable[..., mx.array] = self._update
        if config.compile:
            state = [model.state, optimizer.state, ema]
            # Differentiating puts other arrays in the weights' place, so they are an output too.
            weights = [model.state]
            if pupil.compiles:
                self.gradient = mx.compile(self._gradient, inputs=weights, outputs=weights)
            self.update = mx.compile(self._update, inputs=state, outputs=state)

    def _gradient(self, arrays: dict[str, Any], hidden: mx.array, taught: mx.array) -> Gradient:
        inputs = self._pupil.inputs(**arrays)
        (loss, agreed), gradient = self._value_and_grad(inputs, hidden, taught)
        return loss, agreed, gradient

    def _update(self, gradient: dict[str, Any], number: mx.array) -> mx.array:
        config = self._config
        gradient, norm = optim.clip_grad_norm(gradient, config.max_grad_norm)
        self._optimizer.update(self._model, gradient)
        keep = mx.minimum(config.ema_decay, number / (number + 10))
        for name, value in flat(self._model.trainable_parameters()).items():
            self._ema[name] = keep * self._ema[name] + (1 - keep) * value
        return cast(mx.array, norm)

    def _loss(
        self, inputs: Taught, hidden: mx.array, taught: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return the mean loss of all passes, and the agreement of the first."""
        dtype: mx.Dtype = {
            "float32": mx.float32,
            "bfloat16": mx.bfloat16,
            "float16": mx.float16,
        }[self._config.dtype]
        model = self._model
        weights = model.trainable_parameters()
        if dtype != mx.float32:
            model.update(tree_map(lambda weight: weight.astype(dtype), weights))
        pupil = self._pupil
        given = pupil.given(hidden.astype(dtype))
        loss, agreed = mx.zeros(()), mx.zeros(())
        read = given
        for number in range(1 + self._config.rollout):
            outputs = pupil.outputs(inputs, read, self._teacher.embed)
            one, also = objective(
                model,
                inputs,
                outputs,
                taught,
                self._lm_head,
                self._config.losses,
                self._config.chunk,
                self._own_head,
            )
            loss, agreed = loss + one, agreed if number else also
            if number < self._config.rollout:
                read = rolled_out(inputs, given, outputs)
        model.update(weights)
        return loss / (1 + self._config.rollout), agreed


def with_noise(
    hidden: mx.array, batch: Batch, config: TrainConfig, clean: int, number: int
) -> mx.array:
    """Return what the drafter reads: the target's rows, with noise if asked for.

    Args:
        hidden: [B, T, W] the target's.
        batch: Whose; longer texts get less.
        config: Says how much.
        clean: Leading columns that get none.
        number: Of the batch, from the run's first: each has noise of its own.
    """
    if not config.hidden_noise:
        return hidden
    key = mx.random.key(config.seed + (number << 20))
    lengths = mx.array([len(example.tokens) for example in batch.examples])
    width = config.hidden_noise * 512 / lengths[:, None, None]
    noise = width * mx.random.uniform(-1, 1, hidden.shape, key=key)
    if clean:
        noise = noise * (mx.arange(hidden.shape[-1]) >= clean)
    return hidden + noise
