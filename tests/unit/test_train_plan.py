"""What a run is said to take, held against what it takes."""

import gc
import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from flash_mlx.cli import run
from flash_mlx.draft import FlashModel
from flash_mlx.loading import DEMO, load
from flash_mlx.targets.head import Head
from flash_mlx.train import Example, Teacher, TrainConfig, Trainer
from flash_mlx.train.answers import PromptMaker
from flash_mlx.train.config import GOING_ON, PRESETS, configure, rate_for_going_on
from flash_mlx.train.initial import STARTS, default_config, drafter_config, new_model
from flash_mlx.train.memory import Sizes, step_arrays
from flash_mlx.train.plan import advice, chunk_for, plan, text_sizes
from flash_mlx.train.source import find_questions
from flash_mlx.train.traffic import TRAFFIC
from flash_reference import SMALL
from tiny import random_image
from toy import ToyTarget
from training import EXAMPLES, parameters

LLAVA_7B = {
    "text_config": {"model_type": "llama", "vocab_size": 32064},  # as published
    "vision_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 4096,
        "patch_size": 14,
        "image_size": 336,
    },
}


def estimate(target, config, float32=False, tokens=256, examples=100, sizes=None):
    return plan(
        target,
        default_config(*text_sizes(target), sizes or {}),
        config,
        answer_tokens=tokens,
        hidden_bytes=1 << 30,
        num_examples=examples,
        float32=float32,
    )


def test_weights_are_counted():
    assert estimate(LLAVA_7B, TrainConfig()).parts["target"] == pytest.approx(2 * 7.06e9, rel=0.01)
    quantised = LLAVA_7B | {"quantization": {"bits": 4, "group_size": 64}}
    # 4 bits, and a scale and a bias of 16 bits for 64 weights; the vision tower stays wide.
    expected = 6.74e9 * 0.5625 + 2 * 0.33e9
    assert estimate(quantised, TrainConfig()).parts["target"] == pytest.approx(expected, rel=0.01)


def test_tiny_and_demo_weights_are_counted(llava, qwen):
    for loaded in (llava, qwen):
        have = sum(w.size for _, w in tree_flatten(loaded.target.model.parameters()))
        told = estimate(loaded.config, TrainConfig(), float32=True).parts["target"] / 4
        assert told == pytest.approx(have, rel=0.1), loaded.model_type


def test_further_passes_and_batches_are_counted():
    plain, further, more = (
        estimate(LLAVA_7B, TrainConfig(**changes))
        for changes in ({}, {"rollout": 1}, {"accumulate": 3})
    )
    assert further.parts["activations"] > 1.7 * plain.parts["activations"]
    assert plain.parts["logits"] <= further.parts["logits"]
    assert further.step_flops > plain.step_flops
    assert more.parts == plain.parts  # one batch after the other
    assert more.step_flops == pytest.approx(3 * plain.step_flops)


def test_what_does_not_fit_is_told_with_what_does():
    config = TrainConfig(batch_size=12)
    whole = estimate(LLAVA_7B, config)
    assert advice(whole, config, 128e9) == "It fits."
    words = advice(whole, config, 48e9).split()
    size, times = int(words[words.index("--batch-size") + 1]), int(words[-2])
    assert size * times >= 12 > size
    smaller = replace(config, batch_size=size, accumulate=times)
    assert advice(estimate(LLAVA_7B, smaller), smaller, 48e9) == "It fits."
    assert "fewer bits" in advice(whole, config, 16e9)


@pytest.mark.parametrize(
    ("batch_size", "slots", "tokens", "changes"),
    [
        (1, 10, 64, {}),
        (4, 6, 64, {"base_share": 0.33}),
        pytest.param(4, 10, 128, {"base_share": 0.33, "rollout": 1}, marks=pytest.mark.slow),
        pytest.param(12, 10, 128, {"base_share": 0.33}, marks=pytest.mark.slow),
        pytest.param(12, 16, 96, {"base_share": 0.33}, marks=pytest.mark.slow),
        pytest.param(12, 16, 96, {"base_share": 0.33, "chunk": 64}, marks=pytest.mark.slow),
        pytest.param(3, 10, 128, {"optimizer": "adamw"}, marks=pytest.mark.slow),
        pytest.param(3, 10, 128, {"accumulate": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_plan_of_the_demo_is_near_its_measured_peak(
    tmp_path: Path, batch_size, slots, tokens, changes
):
    if not (DEMO / "target" / "config.json").is_file():
        pytest.skip("this tree has no demo")
    random_image(128, 128).save(tmp_path / "a.png")
    model = load(draft="none")
    gc.collect()  # what other tests had
    before = mx.get_active_memory()  # the target is in it
    asked = PromptMaker(model.loaded, "").ask_all(find_questions(str(tmp_path)))
    examples = [
        Example(asked[0].prompt, tuple(range(5 + i, 5 + i + tokens))) for i in range(batch_size)
    ]
    config = TrainConfig(iterations=2, batch_size=batch_size, **changes)
    shape = drafter_config(model.loaded, "random", {"block_size": slots})
    drafter = new_model(model.loaded, shape, "random", 0)
    trainer = Trainer(
        drafter, Teacher.of(model.target, 1 << 30), examples, tmp_path / "run", config
    )
    mx.reset_peak_memory()
    trainer.run()
    peak = mx.get_peak_memory() - before
    told = plan(
        model.config,
        shape,
        config,
        answer_tokens=tokens,
        hidden_bytes=1 << 30,
        num_examples=batch_size,
        float32=True,
    )
    weights = sum(w.nbytes for _, w in tree_flatten(model.target.model.parameters()))
    assert told.parts["target"] == pytest.approx(weights, rel=0.02)
    assert told.total - told.parts["target"] == pytest.approx(peak, rel=0.12)


@pytest.mark.parametrize("size", [0, 64, 20000])
def test_a_step_is_counted_whatever_may_be_proposed(tmp_path: Path, size: int):
    target = ToyTarget(vocab_size=60000)
    layer = nn.Linear(16, 60000, bias=False)
    layer.weight = mx.contiguous(target.head.T)
    teacher = replace(Teacher.of(target), lm_head=Head(layer))
    shape = replace(SMALL, vocab_size=60000, draft_vocab_size=size)
    config = configure("ours", {"iterations": 2, "batch_size": 4})
    trainer = Trainer(FlashModel(shape), teacher, EXAMPLES, tmp_path, config)
    (batch,) = trainer._batches(0)
    mx.eval(layer.parameters(), teacher.hidden(batch))
    counted = sum(step_arrays(shape, Sizes.of(batch.inputs), config).values())
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    trainer._train_step()
    assert counted == pytest.approx(mx.get_peak_memory() - before, rel=0.12)


def test_rows_that_are_copied_for_a_draft_vocabulary_are_counted():
    plain, some = (
        estimate(LLAVA_7B, TrainConfig(), float32=True, sizes={"draft_vocab_size": size})
        for size in (0, 8000)
    )
    assert some.parts["drafter"] - plain.parts["drafter"] == 4 * 8000 * 4096
    assert some.total < plain.total


def test_a_large_vocabulary_is_read_in_pieces():
    small, large = (default_config(2048, size, {}) for size in (32000, 150000))
    assert (
        32 <= chunk_for(large) < chunk_for(small) < chunk_for(default_config(64, 400, {})) == 4096
    )


def test_a_plan_needs_the_configuration_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(LLAVA_7B))
    assert run(["train", "--plan", "--model", str(tmp_path), "--set", "dtype=bfloat16"]) == 0
    out = capfd.readouterr().out
    assert "target" in out
    assert "M4 Max" in out
    (tmp_path / "config.json").write_text("{}")
    assert run(["train", "--plan", "--model", str(tmp_path)]) == 1
    assert "hidden_size" in capfd.readouterr().err


def test_a_plan_counts_what_a_run_would_learn_from(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    pictures, use = tmp_path / "pictures", tmp_path / "use"
    for folder in (pictures, use):
        folder.mkdir()
    for number in range(3):
        random_image(40, 30, number).save(pictures / f"{number}.png")
    turns = [{"role": "user", "content": "Why?"}]
    image = str(pictures / "0.png")
    rows = [{"messages": turns}, {"messages": turns}, {"image": image, "messages": turns}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (use / TRAFFIC).write_text("{}\n" * 5)

    def count(*words: object) -> int:
        assert run(["train", "--plan", *map(str, words)]) == 0
        return int(re.search(r"with (\d+) answers", capfd.readouterr().out)[1])

    at_one = ("--temperature", 0)
    asked = ("--data", pictures, "--prompts-per-image", 2)
    assert count(*asked) == 3 * 2 * 2  # two temperatures
    assert count(*asked, "--limit", 2, *at_one) == 2 * 2
    assert count(*asked, "--prompt", "Why?", *at_one) == 3
    rows = ("--data", tmp_path / "rows.json", "--prompts-per-image", 2, *at_one)
    assert count(*rows) == 1
    assert count(*rows, "--set", "order=text_first") == 3
    assert count(*rows, "--answers", "dataset", "--temperature", 0, 1) == 1
    assert count("--from-traffic", use) == 5
    assert count(*rows, "--from-traffic", use) == 6


@pytest.mark.parametrize("start", STARTS)
def test_a_new_drafter_begins_where_it_is_told(start, loaded):
    config = drafter_config(loaded, start, {"num_latents": 3})
    model = new_model(loaded, config, start, 0)
    again = new_model(loaded, config, start, 0)
    assert all((v == parameters(again)[n]).all() for n, v in parameters(model).items())
    other = parameters(new_model(loaded, config, start, 1))
    layer = loaded.target.model.language_model.model.layers[-1]
    same = {name for name, value in parameters(model).items() if (value == other[name]).all()}
    copied = start == "last-layer"
    assert ("layers.q_proj.weight" in same) == copied
    assert (model.layers.down_proj.weight.shape == layer.mlp.down_proj.weight.shape) == copied
    if copied:
        # Two heads of queries share one of keys in the tiny targets, or each has its own.
        width = layer.self_attn.k_proj.weight.shape[0]
        times = model.layers.k_proj.weight.shape[0] // width
        heads = model.layers.k_proj.weight.reshape(-1, times, config.head_dim, config.hidden_size)
        for each in range(times):
            own = heads[:, each].reshape(width, -1)
            assert mx.array_equal(own, layer.self_attn.k_proj.weight)
    if start == "embeddings":
        embedding = mx.random.normal((4, config.hidden_size))
        z = model.fuse(embedding, mx.random.normal((4, config.hidden_size)))
        if config.norm_inputs:
            embedding = model.norm_embedding(embedding)
        cosine = (z * embedding).sum(-1) / mx.linalg.norm(z, axis=-1)
        assert (cosine / mx.linalg.norm(embedding, axis=-1)).min().item() > 0.9


def test_settings_of_methods_differ():
    assert len({repr(configure(name)) for name in ("ours", "flash", "msd", "vispec")}) == 4


def test_each_preset_has_a_rate_for_going_on():
    assert GOING_ON.keys() == PRESETS.keys()
    assert rate_for_going_on("eagle", 4096) == configure("eagle").learning_rate
    assert rate_for_going_on("eagle", 192) > 20 * configure("eagle").learning_rate
    assert rate_for_going_on("ours", 192) == rate_for_going_on("ours", 4096)
