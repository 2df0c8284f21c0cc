"""A few made-up examples for the trainer: with and without images, long and short."""

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from flash_mlx.prompt import Prompt
from flash_mlx.train import Example


def example(seed: int, num_prompt: int, num_answer: int, spans=()) -> Example:
    tokens = np.random.default_rng(seed).integers(0, 11, num_prompt + num_answer).tolist()
    return Example(Prompt(tuple(tokens[:num_prompt]), tuple(spans)), tuple(tokens[num_prompt:]))


EXAMPLES = [
    example(0, 4, 6),
    example(1, 7, 3, [(2, 5)]),
    example(2, 9, 2, [(1, 4), (4, 6)]),
    example(3, 5, 7, [(3, 5)]),  # ends with an image
    example(4, 3, 1),  # nothing to draft
]


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}
