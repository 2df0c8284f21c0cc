import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.checkpoint import load_model, read_config
from flash_mlx.decode import NoDrafter, decode
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.stats import GenerationStats
from flash_mlx.train import Example, Teacher, TrainConfig, Trainer, TrainingCallback, collate
from flash_mlx.train.card import Facts, write_card
from flash_mlx.train.folder import claim
from flash_mlx.train.state import METRICS, STATE, forget_metrics_after, log_metrics
from flash_mlx.train.step import with_noise
from flash_reference import SMALL
from toy import KEY, ToyTarget, generate
from training import EXAMPLES, parameters

TEACHER = Teacher.of(ToyTarget())
FULL = replace(SMALL, markov_rank=3, hydra_size=4)


SHORT = TrainConfig(
    iterations=6, batch_size=2, warmup=2, report_every=2, save_every=3, hidden_noise=0.01
)


class Recorder(TrainingCallback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_loss_report(self, train_info):
        self.train.append(train_info)

    def on_val_loss_report(self, val_info):
        self.val.append(val_info)


def make_trainer(folder, config=SHORT, teacher=TEACHER, **more) -> Trainer:
    mx.random.seed(0)
    return Trainer(FlashModel(FULL), teacher, EXAMPLES, folder, config, **more)


def test_a_run_leaves_a_drafter_with_the_averaged_weights(tmp_path):
    trainer = make_trainer(tmp_path / "run", target_info={"model_type": "toy"})
    assert trainer.run()
    saved = parameters(load_model(tmp_path / "run"))
    average, last = parameters(trainer.averaged()), parameters(trainer.model)
    assert all(np.array_equal(saved[name], average[name]) for name in saved)
    assert any(not np.array_equal(saved[name], last[name]) for name in saved)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["target"] == {"model_type": "toy"}
    assert config["training"]["steps"] == 6
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "model.safetensors",
        "training.safetensors",
        "metrics.jsonl",
    }


@pytest.mark.parametrize(("stop_at", "optimizer"), [(1, "muon"), (3, "adamw"), (5, "muon")])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, stop_at, optimizer):
    config = replace(SHORT, optimizer=optimizer)
    whole = make_trainer(tmp_path / "whole", config)
    whole.run()
    first = make_trainer(tmp_path / "parts", config)
    assert not first.run(lambda: first.step == stop_at)
    second = make_trainer(tmp_path / "parts", config)
    second.model.A = second.model.A * 0  # resuming replaces all weights
    assert second.resume() == stop_at
    assert second.run()
    for one, other in ((whole.model, second.model), (whole.averaged(), second.averaged())):
        before, after = parameters(one), parameters(other)
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    class Killed(TrainingCallback):
        def on_train_loss_report(self, train_info):
            if train_info["iteration"] == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "run", callback=Killed()).run()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "half')
    trainer = make_trainer(tmp_path / "run")
    assert trainer.resume() == 3
    trainer.run()
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    before, after = parameters(whole.averaged()), parameters(trainer.averaged())
    assert all(np.array_equal(before[name], after[name]) for name in before)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [2, 4, 6]


def test_reports_go_to_the_callback_and_to_the_metrics(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        replace(SHORT, validate_every=4),
        callback=recorder,
        validate=lambda model: {"size": float(model.A.size)},
    )
    trainer.run()
    assert [info["iteration"] for info in recorder.train] == [2, 4, 6]
    assert recorder.val == [{"iteration": 4, "size": 32.0}, {"iteration": 6, "size": 32.0}]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = ["training", "training", "validation", "training", "validation"]
    assert [line.pop("kind") for line in lines] == kinds
    assert lines[0] == recorder.train[0]
    shares = lines[0]["acceptance_by_position"]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    length = lines[0]["estimated_acceptance_length"]
    np.testing.assert_allclose(length, 1 + sum(shares), atol=1e-3)


def test_a_new_run_leaves_nothing_of_the_old_one_but_answers(tmp_path):
    old = (STATE, METRICS, "config.json", "model.safetensors", "README.md", "training.png")
    for name in (*old, "answers.jsonl", "skipped.jsonl"):
        (tmp_path / name).write_text("old")
    claim(tmp_path, {"iters": 1}, resume=True)
    assert all((tmp_path / name).read_text() == "old" for name in old)
    claim(tmp_path, {"iters": 1}, resume=False)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"run.json", "answers.jsonl", "skipped.jsonl"}


def test_names_cannot_write_into_a_card(tmp_path):
    target = {"name": "a|b\n<c>`", "on_hub": True}
    facts = Facts(target, {"x|": "y"}, SHORT, 1.0, 0.5, SMALL, "random", None, [], "here")
    write_card(facts, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# A drafter for a\\|b &lt;c>'\n" in text
    assert 'base_model: "a|b\\n<c>`"\n' in text
    assert "| x\\| | y |" in text


def test_reports_after_the_checkpoint_are_dropped(tmp_path):
    forget_metrics_after(tmp_path, 1)
    assert not list(tmp_path.iterdir())
    for step in (2, 3, 3, 4):
        log_metrics(tmp_path, {"iteration": step})
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"iteration": 1, "kind')
    forget_metrics_after(tmp_path, 3)
    kept = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["iteration"] for row in kept] == [2, 3, 3]


def test_the_learning_rate_rises_and_falls(tmp_path):
    recorder = Recorder()
    config = replace(
        SHORT, iterations=20, learning_rate=1e-3, warmup=4, report_every=1, save_every=20
    )
    make_trainer(tmp_path, config, callback=recorder).run()
    rates = [info["learning_rate"] for info in recorder.train]
    assert np.argmax(rates) in (3, 4)
    np.testing.assert_allclose(rates[:4], np.array([1, 2, 3, 4]) * 1e-3 / 5, rtol=0.06)
    np.testing.assert_allclose(max(rates), 1e-3, rtol=0.05)
    assert 0.05e-3 <= rates[-1] < 0.1e-3
    assert rates[0] < 0.5e-3


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_muon_moves_matrices_and_nothing_else(tmp_path, optimizer):
    config = replace(
        SHORT, iterations=1, batch_size=5, warmup=0, weight_decay=0, optimizer=optimizer
    )
    trainer = make_trainer(tmp_path, config)
    before = parameters(trainer.model)
    trainer.run()
    steps = {name: after - before[name] for name, after in parameters(trainer.model).items()}
    for name in ("fc_gate", "layers.q_proj", "layers.k_proj", "layers.v_proj"):
        values = np.linalg.svd(steps[f"{name}.weight"], compute_uv=False)
        # Muon's step is orthogonal as far as the gradient's rank goes; AdamW's is not.
        assert (values[5] > 0.6 * values[0]) == (optimizer == "muon"), name
    for name in ("A", "layers.slot_embeddings", "markov.next", "residual_gate", "fc_up.bias"):
        # AdamW's first step is as long for every gradient; there is no bias correction.
        length = 2e-3 * 0.1 / 0.05**0.5
        np.testing.assert_allclose(np.abs(steps[name]).max(), length, rtol=0.01, err_msg=name)


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"seed": 1}, {"iterations": 9}])
def test_a_run_does_not_go_on_with_other_settings(tmp_path, change):
    make_trainer(tmp_path, replace(SHORT, iterations=1)).run()
    config = replace(SHORT, iterations=1, **change) if "iterations" not in change else SHORT
    with pytest.raises(ValueError, match=f"began with other {next(iter(change))}"):
        make_trainer(tmp_path, config).resume()


def test_a_run_does_not_go_on_with_other_examples(tmp_path):
    make_trainer(tmp_path, replace(SHORT, iterations=1)).run()
    mx.random.seed(0)
    other = Trainer(FlashModel(FULL), TEACHER, EXAMPLES[1:], tmp_path, replace(SHORT, iterations=1))
    with pytest.raises(ValueError, match="other examples"):
        other.resume()


def test_there_must_be_a_run_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        make_trainer(tmp_path).resume()
    make_trainer(tmp_path, replace(SHORT, iterations=1)).run()
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        make_trainer(tmp_path, replace(SHORT, iterations=1)).resume()


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_checkpoint(tmp_path):
    calls = []

    def read(batch):
        calls.append(batch)
        hidden = TEACHER.hidden(batch)
        return hidden * mx.nan if len(calls) == 5 else hidden

    trainer = make_trainer(tmp_path, teacher=replace(TEACHER, hidden=read))
    with pytest.raises(ValueError, match="loss must be a number; it is nan at step 4"):
        trainer.run()
    load_model(tmp_path)
    assert make_trainer(tmp_path).resume() == 3


def test_there_must_be_something_to_draft(tmp_path):
    with pytest.raises(ValueError, match="two tokens or more"):
        Trainer(FlashModel(SMALL), TEACHER, EXAMPLES[4:], tmp_path, SHORT)


def test_a_trained_drafter_is_accepted_more_often(tmp_path):
    target = ToyTarget(vocab_size=24, hidden_size=32, seed=3)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 24, rng.integers(3, 8)).tolist()) for _ in range(72)]
    answers = [generate(target, NoDrafter(), prompt, 16) for prompt in prompts]
    examples = [Example(Prompt(p), tuple(a)) for p, a in zip(prompts, answers, strict=True)]

    def acceptance(model: FlashModel) -> float:
        drafter, stats = FlashDrafter(model, target.embed, target.lm_head), GenerationStats()
        for one in examples[64:]:
            rounds = decode(
                target,
                drafter,
                one.prompt,
                sampler=Sampler(),
                key=KEY,
                max_tokens=16,
                stop_ids=(),
            )
            tokens = [token for r in stats.watch(rounds) for token in r.tokens]
            assert tokens == list(one.answer)
        return stats.mean_acceptance_length

    mx.random.seed(0)
    config = FlashConfig(
        32, 24, 3, num_latents=2, num_heads=2, head_dim=16, intermediate_size=64, recurrent_size=16
    )
    settings = TrainConfig(iterations=100, batch_size=16, learning_rate=5e-3, warmup=10)
    trainer = Trainer(FlashModel(config), Teacher.of(target), examples[:64], tmp_path, settings)
    before = acceptance(trainer.model)
    trainer.run()
    after = acceptance(FlashDrafter(load_model(tmp_path), target.embed, target.lm_head).model)
    assert before < 1.15
    assert after > 1.6


def test_a_compiled_step_does_the_same_and_resumes(tmp_path):
    plain = make_trainer(tmp_path / "plain")
    plain.run()
    compiled = replace(SHORT, compile=True)
    first = make_trainer(tmp_path / "compiled", compiled)
    first.run(lambda: first.step == 3)
    second = make_trainer(tmp_path / "compiled", compiled)
    second.resume()
    assert second.run()
    before, after = parameters(plain.averaged()), parameters(second.averaged())
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=1e-4, err_msg=name)


def test_gradients_of_several_batches_are_averaged(tmp_path):
    config = replace(SHORT, iterations=1, batch_size=1, warmup=0, accumulate=4, hidden_noise=0.0)
    together = make_trainer(tmp_path / "four", config)
    seen, gradient = [], together._step.gradient
    together._step.gradient = lambda *each: seen.append(gradient(*each)) or seen[-1]
    taken, update = [], together._step.update
    together._step.update = lambda mean, number: taken.append(mean) or update(mean, number)
    together.run()
    parts = [np.array(one[2]["A"]) for one in seen]
    assert len(parts) == 4
    np.testing.assert_allclose(taken[0]["A"], np.mean(parts, axis=0), rtol=1e-5, atol=1e-9)
    assert any(not np.array_equal(parts[0], part) for part in parts)


def test_a_narrow_step_moves_float32_weights_nearly_alike(tmp_path):
    config = replace(SHORT, iterations=4, warmup=0, optimizer="adamw")
    wide, narrow = (
        make_trainer(tmp_path / name, replace(config, dtype=name))
        for name in ("float32", "bfloat16")
    )
    before = parameters(wide.model)
    wide.run()
    narrow.run()
    assert {value.dtype for value in parameters(narrow.model).values()} == {np.dtype(np.float32)}
    one, other = (
        {n: v - before[n] for n, v in parameters(t.model).items()} for t in (wide, narrow)
    )
    # bfloat16 weights of this size could not even hold such small steps.
    steps = [np.concatenate([each[name].ravel() for name in sorted(each)]) for each in (one, other)]
    assert np.corrcoef(*steps)[0, 1] > 0.8
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_a_narrow_step_does_not_round_the_weights(tmp_path):
    config = replace(SHORT, iterations=3, learning_rate=1e-6, optimizer="adamw", weight_decay=0)
    trainer = make_trainer(tmp_path, replace(config, dtype="bfloat16"))
    before = parameters(trainer.model)
    trainer.run()
    moved = max(np.abs(v - before[n]).max() for n, v in parameters(trainer.model).items())
    assert 0 < moved < 1e-5


def test_a_full_disk_ends_the_run_and_spares_the_checkpoint(tmp_path, monkeypatch):
    save, written = mx.save_safetensors, []

    def fill(file, *more, **settings):
        written.append(file)
        if len(written) > 3:  # the state of the second checkpoint
            Path(file).write_bytes(b"half")
            raise RuntimeError("[save] No space left on device")
        save(file, *more, **settings)

    monkeypatch.setattr(mx, "save_safetensors", fill)
    with pytest.raises(OSError, match=r"could not be written: .*No space"):
        make_trainer(tmp_path / "run").run()
    monkeypatch.undo()
    load_model(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir())[0] == "config.json"
    second = make_trainer(tmp_path / "run")
    assert second.resume() == 3
    second.run()
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    before, after = (parameters(load_model(tmp_path / name)) for name in ("whole", "run"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_noise_is_new_at_each_step_and_narrower_for_long_texts():
    config = replace(SHORT, hidden_noise=0.1)
    batch = collate(EXAMPLES[:2], 2, 3)
    hidden = TEACHER.hidden(batch)
    first, again, other = (
        np.array(with_noise(hidden, batch, config, 0, n) - hidden) for n in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    for row, one in zip(first, EXAMPLES[:2], strict=True):
        width = 0.1 * 512 / len(one.tokens)
        assert 0.9 * width < np.abs(row).max() <= width * 1.0001


def test_a_rollout_trains_otherwise(tmp_path):
    config = replace(SHORT, iterations=2)
    plain = make_trainer(tmp_path / "plain", config)
    rolled = make_trainer(tmp_path / "rolled", replace(config, rollout=2))
    plain.run()
    rolled.run()
    assert not np.array_equal(np.array(plain.model.A), np.array(rolled.model.A))


def test_the_best_weights_are_kept_and_the_run_ends_when_none_are_better(tmp_path):
    config = replace(SHORT, iterations=20, validate_every=2, best_by="score", patience=3)
    scores = {0: 1.0, 2: 3.0, 4: 5.0, 6: 4.0, 8: 5.0, 10: 4.5}

    def run(folder, stop_at):
        trainer = make_trainer(folder, config, validate=lambda _: {"score": scores[trainer.step]})
        if not trainer.run(lambda: trainer.step == stop_at):
            trainer = make_trainer(
                folder, config, validate=lambda _: {"score": scores[trainer.step]}
            )
            trainer.resume()
            assert trainer.run()
        return trainer

    whole, parts = run(tmp_path / "whole", None), run(tmp_path / "parts", 7)
    assert (whole.step, whole.best) == (parts.step, parts.best) == (10, 5.0)
    for folder in ("whole", "parts"):
        kept = json.loads((tmp_path / folder / "config.json").read_text())
        assert kept["training"]["steps"] == 4
    before, after = (parameters(load_model(tmp_path / name)) for name in ("whole", "parts"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert make_trainer(tmp_path / "parts", config, validate=lambda _: {}).resume() == 10


def test_states_that_stay_in_memory_are_the_same_and_read_once(tmp_path):
    reads = []

    class Counting(ToyTarget):
        def prefill(self, prompt, cache):
            reads.append(prompt)
            return super().prefill(prompt, cache)

    plain = make_trainer(tmp_path / "plain")
    kept = make_trainer(tmp_path / "kept", teacher=Teacher.of(Counting(), 1 << 20))
    plain.run()
    kept.run()
    assert len(reads) == 4
    before, after = parameters(plain.model), parameters(kept.model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_drafter_says_how_often_it_was_accepted(tmp_path):
    measured = {"mean_acceptance_length": 1 + 0.5 + 0.25 + 0.125}
    trainer = make_trainer(tmp_path, replace(SHORT, iterations=2), validate=lambda _: measured)
    assert trainer.run()
    assert SMALL.block_size == 3
    assert read_config(tmp_path).expected_acceptance == pytest.approx(0.5, abs=1e-3)
