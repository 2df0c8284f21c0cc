"""The study of examples/scenes: replays are like decoding, and training like drafting."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx import load
from flash_mlx.draft.eagle import EagleModel
from flash_mlx.draft.msd import MsdModel
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.draft.vispec import ViSpecModel
from flash_mlx.loading import demo_pictures
from flash_mlx.processing import make_prompt
from flash_mlx.targets.taps import TappedTarget

SCENES = Path(__file__).resolve().parents[2] / "examples" / "scenes"


@pytest.fixture(scope="module")
def study():
    """The modules of the study, the demo, and its recorded answer to a prompt."""
    sys.path.insert(0, str(SCENES))
    try:
        import one_layer
        import replay
        import study_data
        import study_measure
    finally:
        sys.path.remove(str(SCENES))
    model = load("demo", drafting="fixed")
    prompt = make_prompt(model.loaded, "Describe the image in detail.", [demo_pictures()[0]])
    answer = replay.record(model.target, prompt, 160, model.loaded.eos_ids)
    return model, prompt, answer, (one_layer, replay, study_data, study_measure)


def test_a_replayed_answer_takes_the_same_rounds(study):
    model, prompt, answer, (_, replay, _, study_measure) = study
    known = replay.ReplayTarget(model.target, replay.states(model.target, prompt, answer))
    held_out = study_measure.HeldOut(model.loaded, {}, {}, 0)
    one, other = (
        held_out._answer(target, model.drafter, prompt, 0.0, 0) for target in (model.target, known)
    )
    assert one.outcomes == other.outcomes
    assert one.generation_tokens == other.generation_tokens == len(answer)
    assert other.mean_acceptance_length > 2


@pytest.mark.parametrize("kind", ["eagle", "msd", "vispec", "hidden", "middle"])
def test_one_layer_drafters_are_taught_at_the_rows_that_they_draft_from(study, kind):
    model, prompt, answer, (one_layer, replay, study_data, _) = study
    network = {
        "eagle": EagleModel,
        "msd": MsdModel,
        "vispec": ViSpecModel,
        "hidden": one_layer.HiddenVisionModel,
        "middle": one_layer.MiddleTapModel,
    }[kind]
    sizes = {"num_queries": 3} if kind == "vispec" else {}
    mx.random.seed(0)
    weights = network(one_layer.one_layer_config(model.loaded, **sizes))
    if kind == "middle":  # which starts as if there were no tap
        weights.fc_tap.weight = mx.random.normal(weights.fc_tap.weight.shape)
    target = TappedTarget(model.target, weights.taps(12))
    wide = replay.states(target, prompt, answer).hidden
    size, (start, stop) = model.target.hidden_size, prompt.image_spans[0]
    example = study_data.Example(prompt, tuple(answer))
    known = study_data.Examples(
        [example],
        np.array([0, len(example.tokens)]),
        np.array(wide[:, size:]),
        np.array(wide[None, start:stop, :size]),
    )
    text = one_layer._read(model.loaded, known, 0)
    outputs = one_layer._outputs(weights, text, one_layer._features(weights, text))
    drafter = StepwiseDrafter(weights, target.embed, target.lm_head, target.vocab_size, 2)
    end = len(prompt)
    state = drafter.prefill(prompt, wide[:end], answer[0])
    np.testing.assert_allclose(outputs[0], state.output[0], rtol=1e-3, atol=1e-3)
    state = drafter.extend(wide[end : end + 3], tuple(answer[1:4]), state)
    np.testing.assert_allclose(outputs[3], state.output[0], rtol=1e-3, atol=1e-3)
    assert len(outputs) == len(answer) - 1
    # What row 0 is taught is the state whose most likely token follows the first draft.
    said = mx.argmax(model.target.lm_head(text.taught), axis=-1)
    assert said.tolist() == list(answer[1:])
