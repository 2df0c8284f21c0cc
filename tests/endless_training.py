"""A training run on a toy, for tests that kill it: `python endless_training.py KIND FOLDER`."""

import sys
from pathlib import Path

import flash_mlx  # noqa: F401  binds the BLAS, which works only before mlx.core is imported

# isort: split
import mlx.core as mx

from flash_mlx.draft import FlashModel
from flash_mlx.train import Teacher, TrainConfig, Trainer
from flash_mlx.train.state import STATE
from flash_reference import SMALL
from peers_reference import network
from toy import ToyTarget, WideToy
from training import EXAMPLES


def trainer(kind: str, folder: Path) -> Trainer:
    mx.random.seed(0)
    is_flash = kind == "flash"
    config = TrainConfig(
        iterations=40,
        batch_size=2,
        warmup=2,
        report_every=5,
        save_every=1,
        hidden_noise=0.01,
        optimizer="muon" if is_flash else "adamw",
        rollout=0 if is_flash else 1,
    )
    model = FlashModel(SMALL) if is_flash else network(kind)
    teacher = Teacher.of(ToyTarget() if is_flash else WideToy())
    return Trainer(model, teacher, EXAMPLES, folder, config)


if __name__ == "__main__":
    made = trainer(sys.argv[1], Path(sys.argv[2]))
    if (made.output / STATE).is_file():
        made.resume()
    made.run()
