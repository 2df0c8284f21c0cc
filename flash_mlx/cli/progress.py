"""Progress of a training run on stderr, and how it is interrupted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

from tqdm import tqdm

from flash_mlx.train import TrainingCallback
from flash_mlx.train.validate import BEST_BY


class Bar(TrainingCallback):
    """A line with the time left, loss, agreement of each slot, tokens per second and memory."""

    def __init__(self, done: int, total: int) -> None:
        """Begin.

        Args:
            done: Steps done.
            total: Steps in all.
        """
        self._bar = progress("Training", total, "step", done)

    def on_train_loss_report(self, train_info: dict[str, object]) -> None:
        """Show what was reported."""
        info = cast(dict[str, Any], train_info)
        self._bar.set_postfix_str(
            f"loss {info['train_loss']:.3f}, "
            f"slots {' '.join(f'{share:.2f}' for share in info['acceptance_by_position'])}, "
            f"{info['tokens_per_second']:.0f} tokens/s, {info['target_share']:.0%} target's, "
            f"{info['peak_memory_gb']:.2f} GB",
            refresh=False,
        )
        self._bar.update(info["iteration"] - self._bar.n)

    def on_val_loss_report(self, val_info: dict[str, object]) -> None:
        """Write a line that stays."""
        info = cast(dict[str, Any], val_info)
        best = " (the best)" if info.get("best") == info[BEST_BY] else ""
        self._bar.write(
            f"Step {info['iteration']}: {info[BEST_BY]:.3f} tokens per pass{best}, "
            f"{info[f'{BEST_BY}_t1']:.3f} at temperature 1",
            file=sys.stderr,
        )

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()


def progress(what: str, total: int, unit: str, done: int = 0) -> Any:
    """Return a progress bar on stderr."""
    return tqdm(desc=what, total=total, initial=done, unit=unit, file=sys.stderr, mininterval=0.5)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yield a list that SIGINT adds to; the second one interrupts at once."""
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, _: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, remember)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
