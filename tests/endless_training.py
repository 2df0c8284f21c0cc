"""A training run on a toy, for tests that kill it: `python endless_training.py FOLDER`."""

import sys
from pathlib import Path

import flash_mlx  # noqa: F401  binds the BLAS, which works only before mlx.core is imported

# isort: split
import mlx.core as mx

from flash_mlx.draft import FlashModel
from flash_mlx.train import Teacher, TrainConfig, Trainer
from flash_mlx.train.state import STATE
from flash_reference import SMALL
from toy import ToyTarget
from training import EXAMPLES


def trainer(folder: Path) -> Trainer:
    mx.random.seed(0)
    config = TrainConfig(
        iterations=40, batch_size=2, warmup=2, report_every=5, save_every=1, hidden_noise=0.01
    )
    return Trainer(FlashModel(SMALL), Teacher.of(ToyTarget()), EXAMPLES, folder, config)


if __name__ == "__main__":
    made = trainer(Path(sys.argv[1]))
    if (made.output / STATE).is_file():
        made.resume()
    made.run()
