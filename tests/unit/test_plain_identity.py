"""The ids of mlx-vlm itself, on the same in-memory float32 model, image and prompt.

Once without a drafter, once with drafters that know the answer and corrupt it.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.decode import Drafter, NoDrafter, decode
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets import LoadedTarget
from flash_mlx.tree import DraftTree, Topology
from tiny import random_image

MAX_TOKENS = 48
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
    loaded: LoadedTarget, prompt: Prompt, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Return the ids of `mlx_vlm.stream_generate`; no id ends the text."""
    from mlx_vlm import stream_generate

    criteria = loaded.processor.tokenizer.stopping_criteria
    inputs = {"pixel_values": None, **prompt.inputs}
    with monkeypatch.context() as patch:
        patch.setattr(criteria, "eos_token_ids", [])
        responses = stream_generate(
            loaded.target.model,
            loaded.processor,
            "",
            input_ids=mx.array(prompt.tokens)[None],
            mask=None,
            max_tokens=max_tokens,
            temperature=0.0,
            **inputs,
        )
        # The last response repeats the last id.
        return [response.token for response in responses][:max_tokens]


def run(loaded: LoadedTarget, drafter: Drafter, prompt: Prompt, max_tokens: int) -> tuple:
    """Return the ids, and how many drafts were accepted and rejected."""
    rounds = list(
        decode(
            loaded.target,
            drafter,
            prompt,
            sampler=Sampler(),
            key=mx.random.key(0),
            max_tokens=max_tokens,
            stop_ids=(),
        )
    )
    accepted = sum(r.num_accepted for r in rounds)
    rejected = sum(r.num_drafted for r in rounds) - accepted
    return [token for r in rounds for token in r.tokens], accepted, rejected


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_plain_decoding_says_what_mlx_vlm_says(
    loaded: LoadedTarget, num_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ask(loaded, num_images)
    expected = mlx_vlm_ids(loaded, prompt, MAX_TOKENS, monkeypatch)
    ids, accepted, rejected = run(loaded, NoDrafter(), prompt, MAX_TOKENS)
    assert ids == expected
    assert accepted == rejected == 0
    assert len(set(ids)) > 3  # not one id repeated, which any mistake could say too


@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_change_nothing(
    loaded: LoadedTarget, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = rejected = 0
    for num_images in (0, 1, 2):
        prompt = ask(loaded, num_images)
        expected = mlx_vlm_ids(loaded, prompt, 100, monkeypatch)
        drafter = CorruptedOracle(tuple(expected), SHAPES[shape], loaded.target.vocab_size)
        ids, kept, dropped = run(loaded, drafter, prompt, 100)
        assert ids == expected
        accepted += kept
        rejected += dropped
    assert accepted >= 100
    assert rejected >= 100


def test_mlx_vlms_own_input_preparation_gives_the_same_prompt_under_qwen(
    qwen: LoadedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_vlm import stream_generate
    from mlx_vlm.prompt_utils import apply_chat_template

    image = random_image(84, 112)
    model, processor = qwen.target.model, qwen.processor
    written = apply_chat_template(processor, model.config, "What is this?", num_images=1)
    monkeypatch.setattr(processor.tokenizer.stopping_criteria, "eos_token_ids", [])
    responses = stream_generate(
        model, processor, written, image=[image], max_tokens=24, temperature=0.0
    )
    expected = [response.token for response in responses][:24]
    ids, *_ = run(qwen, NoDrafter(), make_prompt(qwen, "What is this?", [image]), 24)
    assert ids == expected
