"""The training loop: checkpoints that resume exactly, the best weights kept, metrics as JSONL.

The output folder is a drafter at every save: `config.json` and `model.safetensors` with the
averaged weights, the best that were measured or else the last. Beside them stand
`training.safetensors`, all that is needed to go on, and `metrics.jsonl`. What happens at a step
depends on the seed and the step's number alone, so a run that is stopped and resumed ends with the
same weights as one that was not.

Nothing is printed here; progress goes to a callback with the two methods of mlx-lm's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_map, tree_unflatten

from flash_mlx.checkpoint import save_drafter
from flash_mlx.draft.config import FlashConfig
from flash_mlx.draft.kinds import DraftModel
from flash_mlx.train.config import TrainConfig, make_optimizer, schedule
from flash_mlx.train.data import ROUND, Batch, Example, fingerprint
from flash_mlx.train.memory import bounded
from flash_mlx.train.order import Epochs, TextFirst
from flash_mlx.train.pupil import pupil_of
from flash_mlx.train.state import RunState, flat, forget_metrics_after, log_metrics
from flash_mlx.train.step import Step, with_noise
from flash_mlx.train.teacher import Teacher
from flash_mlx.train.validate import BEST_BY, expected_acceptance


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
        callback: Is told.
        best: The best that was measured, by `config.best_by`; None before the first measurement
            and where nothing was asked for.
    """

    def __init__(
        self,
        model: DraftModel,
        teacher: Teacher,
        examples: Sequence[Example],
        output: Path,
        config: TrainConfig,
        *,
        target_info: Mapping[str, object] | None = None,
        callback: TrainingCallback | None = None,
        validate: Callable[[DraftModel], Mapping[str, float]] | None = None,
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
            ValueError: If no example is left, the order asks for some that there are not, or a
                drafter of this kind cannot be trained.
        """
        self.model, self.config, self.output, self.step = model, config, output, 0
        self._teacher, self._target_info = teacher, dict(target_info or {})
        self.callback, self._validate = callback or TrainingCallback(), validate
        self._examples = [example for example in examples if len(example.answer) > 1]
        if not self._examples:
            raise ValueError(
                f"Training needs answers of two tokens or more; none of the {len(examples)} "
                "examples has one."
            )
        self._order = self._make_order()
        self._pupil = pupil_of(model)
        self._optimizer = make_optimizer(config)
        self._optimizer.init(model.trainable_parameters())
        self._ema = {name: mx.array(value) for name, value in flat(model.parameters()).items()}
        mx.eval(model.parameters(), self._optimizer.state, self._ema)
        self._step = self._make_step()
        self.best: float | None = None
        self._worse = 0  # validations since the best one
        self._length: float | None = None  # mean acceptance length, measured last
        self._sums: list[tuple[mx.array, mx.array, mx.array]] = []
        self._target_seconds, self._rows = 0.0, 0  # since the last report
        self._ahead: tuple[int, list[Batch]] = (-1, [])

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train up to the last step, or until told to stop; either ends with a checkpoint.

        Args:
            should_stop: Asked after each step: a deadline, a signal.

        Returns:
            Whether the run is finished.

        Raises:
            ValueError: If the loss is no longer a number; the last checkpoint is good.
            OSError: If the output cannot be written.
        """
        config, stopped = self.config, False
        if self._validate and config.best_by and self.step == 0 and self.best is None:
            self._measure(self._validate)  # training must not end worse than it began
            self.save()
        since = time.perf_counter()
        while not self.finished and not stopped:
            self._sums.append(self._train_step())
            self.step += 1
            stopped = should_stop()
            last = stopped or self.step == config.iterations
            if last or self.step % config.report_every == 0:
                now = time.perf_counter()
                self._report(now - since)
                since = now
            due = config.validate_every and self.step % config.validate_every == 0
            if self._validate and (due or self.step == config.iterations):
                self._measure(self._validate)
                since = time.perf_counter()
            if last or self.finished or self.step % config.save_every == 0:
                self.save()
        return self.finished

    @property
    def finished(self) -> bool:
        """Whether the last step was done, or the drafter no longer gets better."""
        patience = self.config.patience
        return self.step >= self.config.iterations or bool(patience and self._worse >= patience)

    def averaged(self) -> DraftModel:
        """Return a model with the averaged weights."""
        model: DraftModel = type(self.model)(self.model.config)  # type: ignore[arg-type]
        model.update(tree_unflatten(list(self._ema.items())))
        return model

    def save(self) -> None:
        """Write the state that `resume` reads, and the drafter, unless a better one is there.

        Raises:
            OSError: If the output cannot be written; what was there is intact.
        """
        if self.best is None:
            self._save_drafter()
        arrays = {"model": flat(self.model.parameters()), "ema": self._ema}
        arrays["optimizer"] = flat(self._optimizer.state)
        RunState(self.step, self._run(), arrays, self.best, self._worse).save(self.output)

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
        self.best, self._worse = state.best, state.worse
        mx.eval(self.model.parameters(), self._optimizer.state, self._ema)
        self._step = self._make_step()
        forget_metrics_after(self.output, self.step)
        return self.step

    def _save_drafter(self) -> None:
        training = {"steps": self.step, **asdict(self.config)}
        metadata = {"target": self._target_info, "training": training}
        model = self.averaged()
        if self._length is not None and isinstance(model.config, FlashConfig):
            known = expected_acceptance(self._length, model.config.block_size)
            model.config = replace(model.config, expected_acceptance=known)
        save_drafter(model, self.output, metadata)

    def _measure(self, validate: Callable[[DraftModel], Mapping[str, float]]) -> None:
        """Measure the averaged weights, and keep them if they are the best."""
        info = {"iteration": self.step, **validate(self.averaged())}
        self._length = info.get(BEST_BY)
        if name := self.config.best_by:
            value = info[name]
            self._worse += 1
            if self.best is None or value > self.best:
                self.best, self._worse = value, 0
                self._save_drafter()
            info["best"] = self.best
        log_metrics(self.output, {"kind": "validation", **info})
        self.callback.on_val_loss_report(dict(info))

    def _make_step(self) -> Step:
        learns = self._optimizer, self._ema
        return Step(self.model, self._pupil, self._teacher, *learns, self.config)

    def _make_order(self) -> Epochs | TextFirst:
        config = self.config
        lengths = [len(example.answer) for example in self._examples]
        if config.order == "mixed":
            return Epochs(lengths, config.batch_size, config.seed)
        seen = [bool(example.prompt.image_spans) for example in self._examples]
        num_batches = config.iterations * config.accumulate
        return TextFirst(lengths, seen, config.batch_size, config.seed, num_batches)

    def _batches(self, step: int) -> list[Batch]:
        """Return the batches of a step."""
        if self._ahead[0] == step:
            return self._ahead[1]
        config = self.config
        return [
            self._pupil.collate(
                [self._examples[i] for i in self._order[number]],
                config.base_share,
                (config.seed, 2, number),
                ROUND if config.compile else 4,  # each shape would be compiled
            )
            for number in range(step * config.accumulate, (step + 1) * config.accumulate)
        ]

    def _train_step(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return loss, agreement and number of base rows of the next step, evaluated."""
        config, batches, parts = self.config, self._batches(self.step), []
        for number, batch in enumerate(batches):
            start = time.perf_counter()
            hidden = self._teacher.hidden(batch)
            self._target_seconds += time.perf_counter() - start
            self._rows += sum(len(example.answer) - 1 for example in batch.examples)
            states = hidden[..., -self.model.config.hidden_size :]
            taught = states.reshape(-1, states.shape[-1])[batch.inputs.teacher_rows]
            place = self.step * len(batches) + number
            noisy = with_noise(hidden, batch, config, self._pupil.clean, place)
            parts.append(self._step.gradient(vars(batch.inputs), noisy, taught))
            if len(batches) > 1:
                with bounded(self.model.config, batch.inputs, config):
                    mx.eval(parts[-1])  # one batch's activations at a time
        losses, agreed, gradients = zip(*parts, strict=True)
        gradient = tree_map(lambda *each: sum(each[1:], start=each[0]) / len(each), *gradients)
        norm = self._step.update(gradient, mx.array(self.step + 1.0))
        loss, agreement = sum(losses) / len(losses), sum(agreed)
        with bounded(self.model.config, batches[0].inputs, config):
            mx.async_eval(loss, agreement, norm, self.model.state, self._optimizer.state, self._ema)
        if self.step + 1 < config.iterations:  # while the device is at work
            self._ahead = (self.step + 1, self._batches(self.step + 1))
        if not (mx.isfinite(loss) & mx.isfinite(norm)).item():
            raise ValueError(
                f"The loss must be a number; it is {loss.item()} at step {self.step}, with a "
                f"gradient of norm {norm.item()}, at examples "
                f"{self._order[self.step * len(batches)]}. Begin anew with a lower learning rate, "
                f"or from the last good weights (--init-from {self.output})."
            )
        return loss, agreement[:-1], agreement[-1]

    def _report(self, seconds: float) -> None:
        """Tell the means since the last report."""
        losses, agreed, counts = (mx.stack(list(v)) for v in zip(*self._sums, strict=True))
        shares = cast(list[float], (agreed.sum(axis=0) / counts.sum()).tolist())
        info = {
            "iteration": self.step,
            "train_loss": losses.mean().item(),
            "learning_rate": schedule(self.config)(mx.array(self.step - 1)).item(),
            "it_per_second": len(self._sums) / seconds,
            "tokens_per_second": self._rows / seconds,
            "target_share": self._target_seconds / seconds,
            "acceptance_by_position": [round(share, 4) for share in shares],
            "estimated_acceptance_length": 1 + sum(shares),
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        self._sums, self._rows, self._target_seconds = [], 0, 0.0
        log_metrics(self.output, {"kind": "training", **info})
        self.callback.on_train_loss_report(dict(info))

    def _run(self) -> dict[str, object]:
        """Return what must not change when a run is resumed."""
        run = {"drafter": self.model.config.to_dict(), **asdict(self.config)}
        run |= {"examples": fingerprint(self._examples), "target": self._target_info}
        for name in ("report_every", "save_every", "validate_every"):
            del run[name]
        return cast(dict[str, object], json.loads(json.dumps(run)))
