"""The ids of mlx-vlm with the same penalties and processors, on the same in-memory model."""

from typing import Any

import mlx.core as mx
import pytest

from flash_mlx.decode import NoDrafter
from flash_mlx.penalties import Penalties
from flash_mlx.processed import ProcessedTarget
from flash_mlx.targets import LoadedTarget
from identity import SHAPES, CorruptedOracle, ask, mlx_vlm_ids, run

SETTINGS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "long memory": {"repetition_penalty": 1.1, "repetition_context_size": 64},
    "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    "everything": {
        "repetition_penalty": 1.2,
        "repetition_context_size": 11,
        "presence_penalty": 0.5,
        "presence_context_size": 3,
        "frequency_penalty": -0.6,
        "frequency_context_size": 30,
        "logit_bias": {40: -100.0, 41: 3.0},
    },
}


def no_token_before_its_double(tokens: mx.array, logits: mx.array) -> mx.array:
    """Forbid the id after the last one, and change the array that came, as mlx-lm's do."""
    logits[:, (tokens[-1:] + 1) % logits.shape[1]] = -mx.inf
    return logits


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_plain_decoding_says_what_mlx_vlm_says(
    loaded: LoadedTarget, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ask(loaded, 1)
    expected = mlx_vlm_ids(loaded, prompt, 48, monkeypatch, **settings)
    assert expected != mlx_vlm_ids(loaded, prompt, 48, monkeypatch)
    target = ProcessedTarget(loaded.target, Penalties(**settings))
    assert run(target, NoDrafter(), prompt, 48)[0] == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_change_nothing(
    loaded: LoadedTarget, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS["everything"]
    processors = [no_token_before_its_double]
    target = ProcessedTarget(loaded.target, Penalties(**settings), processors)
    accepted = rejected = 0
    for num_images in (0, 1):
        prompt = ask(loaded, num_images)
        expected = mlx_vlm_ids(
            loaded, prompt, 100, monkeypatch, logits_processors=processors, **settings
        )
        drafter = CorruptedOracle(tuple(expected), SHAPES[shape], target.vocab_size)
        ids, kept, dropped = run(target, drafter, prompt, 100)
        assert ids == expected
        accepted += kept
        rejected += dropped
    assert accepted >= 50
    assert rejected >= 100
