"""Training a drafter on what its target says: `data`, `teacher`, `losses`, `trainer`."""

from flash_mlx.train.config import TrainConfig
from flash_mlx.train.data import Batch, Example, collate
from flash_mlx.train.losses import LossWeights
from flash_mlx.train.teacher import Teacher
from flash_mlx.train.trainer import Trainer, TrainingCallback

__all__ = [
    "Batch",
    "Example",
    "LossWeights",
    "Teacher",
    "TrainConfig",
    "Trainer",
    "TrainingCallback",
    "collate",
]
