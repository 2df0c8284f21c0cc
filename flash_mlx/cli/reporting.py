"""Who else is told how training goes: Weights & Biases, if asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click

from flash_mlx.train import TrainingCallback


class Several(TrainingCallback):
    """Tells several callbacks."""

    def __init__(self, callbacks: Sequence[TrainingCallback]) -> None:
        """Remember them, in order."""
        self._callbacks = tuple(callbacks)

    def on_train_loss_report(self, train_info: dict[str, object]) -> None:
        """Tell each."""
        for each in self._callbacks:
            each.on_train_loss_report(dict(train_info))

    def on_val_loss_report(self, val_info: dict[str, object]) -> None:
        """Tell each."""
        for each in self._callbacks:
            each.on_val_loss_report(dict(val_info))


class Reporter(TrainingCallback):
    """A callback with a beginning and an end; tells nobody by itself."""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""


class WandbReporter(Reporter):
    """Logs to Weights & Biases; where to, and whether at all, its own settings say (WANDB_MODE)."""

    def __init__(self, wandb: Any, output: Path, settings: Mapping[str, object]) -> None:
        """Remember what to report.

        Args:
            wandb: The module.
            output: Folder of the run, which names it and gets wandb's files.
            settings: What was asked for.
        """
        self._wandb, self._output, self._settings = wandb, output, dict(settings)
        self._run: Any = None

    def __enter__(self) -> Self:
        """Begin."""
        self._run = self._wandb.init(
            project="flash-mlx",
            name=self._output.resolve().name,
            dir=str(self._output),
            config=self._settings,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End, as failed after an error."""
        self._run.finish(exit_code=0 if error is None else 1)

    def on_train_loss_report(self, train_info: dict[str, object]) -> None:
        """Log the means, slots one by one."""
        self._log(train_info, "train")

    def on_val_loss_report(self, val_info: dict[str, object]) -> None:
        """Log what was measured."""
        self._log(val_info, "validation")

    def _log(self, info: Mapping[str, object], kind: str) -> None:
        values: dict[str, object] = {}
        for name, value in info.items():
            if isinstance(value, list):
                values |= {f"{kind}/{name}_{i}": each for i, each in enumerate(value)}
            elif name != "iteration":
                values[f"{kind}/{name}"] = value
        self._run.log({"iteration": info["iteration"], **values})


def report_to(where: str | None, output: Path, settings: Mapping[str, object]) -> Reporter:
    """Return what reports there.

    Args:
        where: `wandb`, or None for nobody.
        output: Folder of the run.
        settings: What was asked for.

    Raises:
        UsageError: What it needs is not installed.
    """
    if where is None:
        return Reporter()
    try:
        import wandb
    except ImportError as error:
        raise click.UsageError(
            "--report-to wandb needs wandb, which is not installed here: "
            "pip install 'flash-mlx[wandb]'."
        ) from error
    return WandbReporter(wandb, output, settings)
