"""The ids of mlx-vlm itself, on the same in-memory float32 model, image and prompt.

Once without a drafter, once with drafters that know the answer and corrupt it.
"""

import pytest

from flash_mlx.decode import NoDrafter
from flash_mlx.processing import make_prompt
from flash_mlx.targets import LoadedTarget
from identity import SHAPES, CorruptedOracle, ask, mlx_vlm_ids, run
from tiny import random_image

MAX_TOKENS = 48


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_plain_decoding_says_what_mlx_vlm_says(
    loaded: LoadedTarget, num_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ask(loaded, num_images)
    expected = mlx_vlm_ids(loaded, prompt, MAX_TOKENS, monkeypatch)
    ids, accepted, rejected = run(loaded.target, NoDrafter(), prompt, MAX_TOKENS)
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
        ids, kept, dropped = run(loaded.target, drafter, prompt, 100)
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
    ids, *_ = run(qwen.target, NoDrafter(), make_prompt(qwen, "What is this?", [image]), 24)
    assert ids == expected
