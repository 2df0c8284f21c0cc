"""What mlx-vlm itself says on the same in-memory model, and drafters that know it.

Shapes:
    N: rows of a tree.    T: prompt rows.    A: rows accepted.    D: hidden size.
"""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.decode import Drafter, Target
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets import LoadedTarget
from flash_mlx.targets.stock import stock_inputs
from flash_mlx.tree import DraftTree, Topology
from flash_mlx.verify import greedy_text
from tiny import random_image

TREE = Topology((-1, 0, 0, 0, 1, 2, 2, 4, 5, 5, 7, 9))
SHAPES = {"chain": Topology.chain(5), "tree": TREE}


@dataclass(frozen=True)
class CorruptedOracle:
    """Knows the whole answer. Of the children of each row on its path, at most one is right.

    The state is the number of tokens said. `right` of the drafts are right; the others, and all
    off the path, are any other id.
    """

    answer: tuple[int, ...]
    topology: Topology
    vocab_size: int
    right: float = 0.7
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def prefill(self, prompt: Prompt, hidden: mx.array, root: int) -> int:
        assert hidden.shape[0] == len(prompt)
        return 1

    def draft(self, root: int, state: int, sampler: Sampler, key: mx.array) -> DraftTree:
        assert self.answer[state - 1] == root
        depth, tokens, on_path = self.topology.depth, [root], {0}
        for row, children in enumerate(self.topology.children):
            if row in on_path and children and self.rng.random() < self.right:
                on_path.add(int(self.rng.choice(children)))
        for row in range(1, len(self.topology)):
            place = state - 1 + depth[row]
            truth = self.answer[place] if place < len(self.answer) else root
            other = (truth + int(self.rng.integers(1, self.vocab_size))) % self.vocab_size
            tokens.append(truth if row in on_path else other)
        return DraftTree(self.topology, mx.array(tokens, dtype=mx.int32))

    def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: int) -> int:
        assert hidden.shape[0] == len(tokens)
        return state + len(tokens)


def ask(loaded: LoadedTarget, num_images: int) -> Prompt:
    images = [random_image(70 + 50 * i, 90, seed=i) for i in range(num_images)]
    return make_prompt(loaded, "Describe what you see in detail.", images)


def mlx_vlm_ids(
    loaded: LoadedTarget,
    prompt: Prompt,
    max_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    **settings: Any,
) -> list[int]:
    """Return the greedy ids of `mlx_vlm.stream_generate`; no id ends the text."""
    from mlx_vlm import stream_generate

    criteria = loaded.processor.tokenizer.stopping_criteria
    with monkeypatch.context() as patch:
        patch.setattr(criteria, "eos_token_ids", [])
        responses = stream_generate(
            loaded.target.model,
            loaded.processor,
            "",
            max_tokens=max_tokens,
            temperature=0.0,
            **settings,
            **stock_inputs(loaded, prompt),
        )
        # The last response repeats the last id.
        return [response.token for response in responses][:max_tokens]


def run(target: Target, drafter: Drafter, prompt: Prompt, max_tokens: int) -> tuple:
    """Return the greedy ids, and how many drafts were accepted and rejected."""
    text = greedy_text(target, drafter, prompt, max_tokens)
    return list(text.tokens), text.accepted, text.drafted - text.accepted
