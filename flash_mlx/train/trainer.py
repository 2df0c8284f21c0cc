"""The training loop: one step, checkpoints that resume exactly, metrics as JSONL.

The output folder is a drafter at every save: `config.json` and `model.safetensors` with the
averaged weights. Beside them stand `training.safetensors`, all that is needed to go on, and
`metrics.jsonl`. What happens at a step depends on the seed and the step's number alone, so a run
that is stopped and resumed ends with the same weights as one that was not.

Nothing is printed here; progress goes to a callback with the two methods of mlx-lm's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from flash_mlx.checkpoint import save_drafter
from flash_mlx.draft import FlashModel
from flash_mlx.train.config import TrainConfig, make_optimizer, schedule
from flash_mlx.train.data import Batch, Epochs, Example, Inputs, collate, fingerprint
from flash_mlx.train.features import Teacher, slot_outputs
from flash_mlx.train.losses import objective
from flash_mlx.train.state import RunState, flat, forget_metrics_after, log_metrics


class TrainingCallback:
    """Told what happens; does nothing by itself. The methods are those of mlx-lm's callback."""

    def on_train_loss_report(self, train_info: dict[str, object]) -> None:
        """Take the means since the last report."""

    def on_val_loss_report(self, val_info: dict[str, object]) -> None:
        """Take what `validate` measured."""


class Trainer:
    """Trains a drafter; see the module.

    Attributes:
        model: The drafter, being trained.
        step: Steps done.
    """

    def __init__(
        self,
        model: FlashModel,
        teacher: Teacher,
        examples: Sequence[Example],
        output: Path,
        config: TrainConfig,
        *,
        target_info: Mapping[str, object] | None = None,
        callback: TrainingCallback | None = None,
        validate: Callable[[FlashModel], Mapping[str, float]] | None = None,
    ) -> None:
        """Prepare a new run.

        Args:
            model: With initial weights: new ones (call `mx.random.seed` before they are made) or
                those of another drafter.
            teacher: The frozen target.
            examples: Those with an answer of one token are left out.
            output: Folder for the drafter; made at the first save.
            config: How to train.
            target_info: About the target, for the drafter's `config.json`.
            callback: Is told.
            validate: Measures a model with the averaged weights.

        Raises:
            ValueError: If no example is left.
        """
        self.model, self.config, self.output, self.step = model, config, output, 0
        self._teacher, self._target_info = teacher, dict(target_info or {})
        self._callback, self._validate = callback or TrainingCallback(), validate
        self._examples = [example for example in examples if len(example.answer) > 1]
        if not self._examples:
            raise ValueError(
                f"Training needs answers of two tokens or more; none of the {len(examples)} "
                "examples has one."
            )
        lengths = [len(example.tokens) for example in self._examples]
        self._epochs = Epochs(lengths, config.batch_size, config.seed)
        self._optimizer = make_optimizer(config)
        self._optimizer.init(model.trainable_parameters())
        self._ema = {name: mx.array(value) for name, value in flat(model.parameters()).items()}
        mx.eval(model.parameters(), self._optimizer.state, self._ema)
        self._step = self._make_step()
        self._sums: list[tuple[mx.array, mx.array, mx.array]] = []

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train up to the last step, or until told to stop; either ends with a checkpoint.

        Args:
            should_stop: Asked after each step: a deadline, a signal.

        Returns:
            Whether the last step was reached.

        Raises:
            ValueError: If the loss is no longer a number; the last checkpoint is good.
            OSError: If the output cannot be written.
        """
        config, stopped, since = self.config, False, time.perf_counter()
        while self.step < config.iterations and not stopped:
            self._sums.append(self._train_step())
            self.step += 1
            stopped = should_stop()
            last = stopped or self.step == config.iterations
            if last or self.step % config.report_every == 0:
                now = time.perf_counter()
                self._report(now - since)
                since = now
            if last or self.step % config.save_every == 0:
                self.save()
            due = config.validate_every and self.step % config.validate_every == 0
            if self._validate and (due or self.step == config.iterations):
                info = {"iteration": self.step, **self._validate(self.averaged())}
                log_metrics(self.output, {"kind": "validation", **info})
                self._callback.on_val_loss_report(dict(info))
                since = time.perf_counter()
        return self.step == config.iterations

    def averaged(self) -> FlashModel:
        """Return a model with the averaged weights."""
        model = FlashModel(self.model.config)
        model.update(tree_unflatten(list(self._ema.items())))
        return model

    def save(self) -> None:
        """Write the drafter, and the state that `resume` reads.

        Raises:
            OSError: If the output cannot be written; what was there is intact.
        """
        training = {"steps": self.step, **asdict(self.config)}
        metadata = {"target": self._target_info, "training": training}
        save_drafter(self.averaged(), self.output, metadata)
        arrays = {"model": flat(self.model.parameters()), "ema": self._ema}
        arrays["optimizer"] = flat(self._optimizer.state)
        RunState(self.step, self._run(), arrays).save(self.output)

    def resume(self) -> int:
        """Go on from the checkpoint in the output folder.

        Returns:
            Steps done.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is of a run with other settings or examples.
        """
        state = RunState.load(self.output, self._run())
        self.step = state.step
        self.model.update(tree_unflatten(list(state.arrays["model"].items())))
        self._optimizer.state = tree_unflatten(list(state.arrays["optimizer"].items()))
        self._ema = dict(state.arrays["ema"])
        mx.eval(self.model.parameters(), self._optimizer.state, self._ema)
        self._step = self._make_step()
        forget_metrics_after(self.output, self.step)
        return self.step

    def _make_step(self) -> Callable[..., tuple[mx.array, mx.array]]:
        """Return the step: inputs, (noisy) hidden, features, number to loss and agreement."""
        model, optimizer, ema, config = self.model, self._optimizer, self._ema, self.config

        def loss_of(
            inputs: Inputs, hidden: mx.array, features: mx.array
        ) -> tuple[mx.array, mx.array]:
            outputs = slot_outputs(model, inputs, hidden, self._teacher.embed)
            head, weights = self._teacher.lm_head, config.losses
            return objective(model, inputs, outputs, features, head, weights, config.chunk)

        gradient = nn.value_and_grad(model, loss_of)

        def step(
            arrays: dict[str, mx.array], hidden: mx.array, features: mx.array, done: mx.array
        ) -> tuple[mx.array, mx.array]:
            (loss, agreed), grads = gradient(Inputs(**arrays), hidden, features)
            grads, _ = optim.clip_grad_norm(grads, config.max_grad_norm)
            optimizer.update(model, grads)
            keep = mx.minimum(config.ema_decay, done / (done + 10))
            for name, value in flat(model.parameters()).items():
                ema[name] = keep * ema[name] + (1 - keep) * value
            return loss, agreed

        if not config.compile:
            return step
        state = [model.state, optimizer.state, ema]
        return mx.compile(step, inputs=state, outputs=state)

    def _train_step(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return loss, agreement and number of base rows of the next batch, evaluated."""
        examples = [self._examples[i] for i in self._epochs[self.step]]
        sizes = self.model.config
        batch = collate(examples, sizes.num_latents, sizes.block_size)
        hidden = self._teacher.features(batch)
        size = hidden.shape[-1]
        features = hidden.reshape(-1, size)[batch.inputs.teacher_rows]
        arrays = vars(batch.inputs)
        loss, agreed = self._step(
            arrays, self._noisy(hidden, batch), features, mx.array(self.step + 1.0)
        )
        mx.eval(loss, agreed, self.model.state, self._optimizer.state, self._ema)
        if not mx.isfinite(loss).item():
            raise ValueError(
                f"The loss must be a number; it is {loss.item()} at step {self.step}, examples "
                f"{self._epochs[self.step]}. Lower the learning rate and resume."
            )
        return loss, agreed[:-1], agreed[-1]

    def _noisy(self, hidden: mx.array, batch: Batch) -> mx.array:
        """Return what the drafter reads: the target's hidden states, with noise if asked for."""
        if not self.config.hidden_noise:
            return hidden
        key = mx.random.key(self.config.seed + (self.step << 20))
        lengths = mx.array([len(example.tokens) for example in batch.examples])
        width = self.config.hidden_noise * 512 / lengths[:, None, None]
        return hidden + width * mx.random.uniform(-1, 1, hidden.shape, key=key)

    def _report(self, seconds: float) -> None:
        """Tell the means since the last report."""
        losses, agreed, counts = (mx.stack(list(v)) for v in zip(*self._sums, strict=True))
        shares = cast(list[float], (agreed.sum(axis=0) / counts.sum()).tolist())
        info = {
            "iteration": self.step,
            "train_loss": losses.mean().item(),
            "learning_rate": schedule(self.config)(mx.array(self.step - 1)).item(),
            "it_per_second": len(self._sums) / seconds,
            "acceptance_by_position": [round(share, 4) for share in shares],
            "estimated_acceptance_length": 1 + sum(shares),
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        self._sums = []
        log_metrics(self.output, {"kind": "training", **info})
        self._callback.on_train_loss_report(dict(info))

    def _run(self) -> dict[str, object]:
        """Return what must not change when a run is resumed."""
        run = {"drafter": self.model.config.to_dict(), **asdict(self.config)}
        run["examples"] = fingerprint(self._examples)
        for name in ("report_every", "save_every", "validate_every"):
            del run[name]
        return cast(dict[str, object], json.loads(json.dumps(run)))
