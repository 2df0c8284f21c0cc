"""The study of examples/scenes: replays are like decoding, and training like drafting."""

import json
import sys
from dataclasses import asdict
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
from flash_mlx.train import LossWeights
from flash_mlx.train.config import PRESETS, configure
from flash_mlx.train.data import collate
from flash_mlx.train.initial import drafter_config
from flash_mlx.train.pupil import pupil_of

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
        import study_numbers
        import study_peers
        import study_peers_report
        import study_variants
    finally:
        sys.path.remove(str(SCENES))
    report = study_numbers, study_peers_report, study_variants, study_peers
    model = load("demo", drafting="fixed")
    prompt = make_prompt(model.loaded, "Describe the image in detail.", [demo_pictures()[0]])
    answer = replay.record(model.target, prompt, 160, model.loaded.eos_ids)
    return model, prompt, answer, (one_layer, replay, study_data, study_measure), report


def test_a_replayed_answer_takes_the_same_rounds(study):
    model, prompt, answer, (_, replay, _, study_measure), _ = study
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
    model, prompt, answer, (one_layer, replay, study_data, _), _ = study
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
    pupil = pupil_of(weights)
    batch = pupil.collate([example], 1.0, (), 1)
    hidden = one_layer.with_embeddings(model.loaded, known).hidden(batch)
    outputs = pupil.outputs(batch.inputs, pupil.given(hidden), target.embed)[:, 0]
    drafter = StepwiseDrafter(weights, target.embed, target.lm_head, target.vocab_size, 2)
    end = len(prompt)
    state = drafter.prefill(prompt, wide[:end], answer[0])
    np.testing.assert_allclose(outputs[0], state.output[0], rtol=1e-3, atol=1e-3)
    state = drafter.extend(wide[end : end + 3], tuple(answer[1:4]), state)
    np.testing.assert_allclose(outputs[3], state.output[0], rtol=1e-3, atol=1e-3)
    assert len(outputs) == len(answer) - 1
    # What row 0 is taught is the state whose most likely token follows the first draft.
    taught = hidden[0, batch.inputs.teacher_rows[batch.inputs.teacher[:, 0]], -size:]
    said = mx.argmax(model.target.lm_head(taught), axis=-1)
    assert said.tolist() == list(answer[1:])


def test_taps_stand_before_the_states_that_are_known_without_them(study, tmp_path):
    model, _, _, (_, replay, data, _), _ = study
    scene, asked = 31_000_000, "Describe the image in detail."
    prompt = make_prompt(model.loaded, asked, [data.SCENES.pictures(scene)[0]])
    answers = [[37, 553, 396, 489, 2], [751, 381, 325, 2]]
    rows = [{"scene": scene, "prompt": asked, "answer": answer} for answer in answers]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = data.load_examples(model.loaded, file, tmp_path)
    for _ in range(2):  # computed, then read from the disk
        wide = data.with_taps(model.loaded, known, file, tmp_path, (2, 6))
        for number, answer in enumerate(answers):
            tapped = replay.states(TappedTarget(model.target, (2, 6)), prompt, answer).hidden
            np.testing.assert_allclose(wide.rows(number), tapped, rtol=1e-2, atol=1e-2)
            size = model.target.hidden_size
            last = wide.rows(number)[:, -size:]
            np.testing.assert_allclose(last, known.rows(number), rtol=2e-2, atol=2e-2)


def test_every_variant_is_a_drafter_and_a_training_of_its_own(study):
    model, *_, (_, _, variants, _) = study
    seen = {}
    for group, tried in variants.GROUPS.items():
        for name, variant in tried.items():
            settings = {**variants.DRAFTER, **variant.drafter}
            made = (
                drafter_config(model.loaded, variant.start, settings),
                configure("ours", {**variants.TRAIN, **variant.train}),
                variant.start,
                variant.answers,
            )
            assert seen.setdefault(repr(made), variant) == variant, f"{group}: {name}"
    assert len(seen) > 30


def test_every_method_trains_by_its_own_objective(study):
    *_, (*_, peers) = study
    made = {
        (name, recipe): configure("ours", peers.settings_of(peer, recipe, optimizer))
        for name, peer in peers.PEERS.items()
        for recipe, optimizer in peers.GRID
    }
    assert made["EAGLE", "published"].losses == PRESETS["msd"]["losses"]
    assert made["ViSpec", "published"].losses == PRESETS["vispec"]["losses"]
    assert made["EAGLE", "ours"].losses == made["ours", "published"].losses == LossWeights()
    assert made["HiViS-style", "ours"].rollout == 1
    assert made["MSD", "published"].hidden_noise == 0.1


def measured(tokens, rounds, draft_ms):
    """A run of two prompts of each family."""
    found = {"tokens": tokens, "rounds": rounds, "draft_ms": draft_ms}
    return dict.fromkeys(("caption t=0", "question t=0"), found)


def test_a_ratio_is_over_all_prompts_and_a_bound_counts_what_drafting_costs(study):
    *_, (numbers, *_) = study
    base = {"results": measured([30, 50], [10, 30], 2.0)}
    twice = {"results": measured([30, 50], [5, 15], 2.0)}
    assert numbers.length(base, numbers.GREEDY) == 2
    assert numbers.against([twice, twice], [base, base]) == {"ratio": 2, "low": 2, "high": 2}
    # Between 4 and 8 rows at 9 and 11 ms lie 7 rows at 10.5 ms; a plain pass takes 8.
    costs = {1: 8.0, 4: 9.0, 8: 11.0}
    assert numbers.bound(twice, 7, 2.0, costs) == 4 * 8 / (10.5 + 2)


def test_drafters_stand_together_by_budget_with_their_best_way_to_draft(study):
    *_, (_, peers, variants, _) = study
    ways = {
        "chain of 3": {"rows": 4, "results": measured([40, 40], [20, 20], 1.0)},
        "chain of 6": {"rows": 7, "results": measured([40, 40], [16, 24], 9.0)},
    }
    about = {"name": "EAGLE", "recipe": "published", "optimizer": "AdamW 5e-3", "ways": ways}
    rows = [
        about | {"key": f"EAGLE, seed {seed}{more}", "steps": steps, "train_seconds": 10.0 * seed}
        for seed in (1, 2, 3)
        for more, steps in (("", 120), (", 400 steps", 400), (", 400 steps, equal time", 260))
    ]
    ours = json.dumps({**asdict(variants.LONG), "seed": 1}, sort_keys=True)
    study_rows = {ours: {"results": measured([80, 80], [20, 20], 1.0), "train_seconds": 5.0}}
    found = peers.peer_rows(rows + peers.long_runs(study_rows), {1: 8.0, 4: 9.0, 8: 11.0})
    named = {(each["drafter"], each["budget"]): each for each in found}
    assert list(named) == [
        ("EAGLE", "120 steps"),
        ("EAGLE", "time of ours for 400 steps"),
        ("ours", "400 steps"),
        ("EAGLE", "400 steps"),
    ]
    assert {each["seeds"] for (name, _), each in named.items() if name == "EAGLE"} == {3}
    assert named["EAGLE", "400 steps"]["best_way"] == "chain of 3"
    assert named["EAGLE", "400 steps"]["train_seconds"] == 20
    assert named["ours", "400 steps"]["seeds"] == 1
    assert "ours" in peers.peer_table(found)


def test_each_example_about_a_clip_receives_the_pictures_of_its_own(study):
    model, _, _, (one_layer, _, study_data, _), _ = study
    spans, length, size = ((2, 4), (5, 7), (8, 10)), 14, model.target.hidden_size
    prompt = study_data.Prompt(tuple(range(4, 4 + length - 2)), spans)
    examples = [study_data.Example(prompt, (9, 2)) for _ in range(4)]
    visual = np.arange(6, dtype=np.float16)[:, None, None] + np.zeros((6, 2, size), np.float16)
    known = study_data.Examples(
        examples, length * np.arange(5), np.zeros((4 * length, size), np.float16), visual
    )
    teacher = one_layer.with_embeddings(model.loaded, known)
    batch = collate([examples[3], examples[0]], 4, 3)
    received = teacher.hidden(batch)[..., :size]
    for row, first in enumerate((3, 0)):
        for number, (start, stop) in enumerate(spans):
            assert mx.all(received[row, start:stop] == first + number)
    own = model.target.embed(batch.tokens[:, :2])
    assert mx.array_equal(received[:, :2], own)


def test_what_is_held_out_of_clips_has_three_pictures_and_asks_about_them(study, tmp_path):
    model, _, _, (_, _, study_data, _), _ = study
    rows = [{"clip": 7, "prompt": "b"}, {"clip": 3, "prompt": "a"}, {"clip": 7, "prompt": "b"}]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert study_data.are_clips(file)
    assert study_data.asked_of(file) == [(7, "b")]
    for family in study_data.CLIP_FAMILIES:
        prompts = study_data.held_out_prompts(model.loaded, family, 3, clips=True)
        assert [len(prompt.image_spans) for prompt in prompts] == [3, 3, 3]
        last = model.loaded.processor.tokenizer.decode(list(prompts[2].tokens))
        assert any(each in last for each in study_data.STEPS_PROMPTS) == (family == "question")


def test_answers_to_other_families_of_prompts_are_left_out(study, tmp_path):
    model, _, _, (_, _, study_data, _), _ = study
    of_family = {
        "captions": [study_data.CAPTION_PROMPTS[0], study_data.BRIEF_PROMPTS[0]],
        "questions": [study_data.LIST_PROMPTS[0], "How many objects are there?"],
    }
    rows = [
        {"scene": 31_000_000, "prompt": prompt, "answer": [37, 2]}
        for prompts in of_family.values()
        for prompt in prompts
    ]
    rows.append({"clip": 71_000_000, "prompt": study_data.VIDEO_PROMPTS[0], "answer": [37, 2]})
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    pictures = {
        family: sorted(
            len(group[0].prompt.image_spans)
            for group in study_data.read_examples(model.loaded, file, [family])
        )
        for family in of_family
    }
    assert pictures == {"captions": [1, 1, 3], "questions": [1, 1]}
