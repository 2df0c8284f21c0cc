"""Training of EAGLE, MSD and ViSpec: what is read and taught is what drafting reads and predicts.

Shapes: those of `train.data`. D: hidden size.    V: vocabulary.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flash_mlx.checkpoint import load_network
from flash_mlx.draft.decoder import Past
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.train import Example, LossWeights, Teacher, TrainConfig, Trainer
from flash_mlx.train.config import PRESET_OF, configure
from flash_mlx.train.losses import objective
from flash_mlx.train.pupil import pupil_of
from flash_mlx.train.step import with_noise
from flash_mlx.train.validate import BEST_BY, validator
from peers_reference import network, random_model
from toy import WideToy, continuation
from training import EXAMPLES, example, parameters

KINDS = ("eagle", "msd", "vispec")


TARGET = WideToy()
TEACHER = Teacher.of(TARGET)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("kind", [*KINDS, "own embedding"])
def test_training_reads_and_teaches_what_drafting_reads_and_predicts(kind, share):
    own = kind == "own embedding"
    model = network("eagle", own_embedding=True, vocab_size=9) if own else network(kind)
    pupil = pupil_of(model)
    batch = pupil.collate(EXAMPLES, share, (3,), 4)
    inputs, hidden = batch.inputs, TEACHER.hidden(batch)
    outputs = pupil.outputs(inputs, pupil.given(hidden), TARGET.embed)
    taught = hidden[..., -16:].reshape(-1, 16)[inputs.teacher_rows][inputs.teacher]
    drafter = StepwiseDrafter(model, TARGET.embed, TARGET.lm_head, 11)
    places = inputs.base_rows.flatten()[inputs.chosen].tolist()
    of = (inputs.chosen // inputs.base_rows.shape[1]).tolist()
    seen = 0
    for b, one in enumerate(EXAMPLES):
        end, tokens = len(one.prompt), one.tokens
        state = drafter.prefill(one.prompt, hidden[b, :end], tokens[end])
        for row in range(end - 1, len(tokens) - 2):
            if row >= end:
                state = drafter.extend(hidden[b, row : row + 1], (tokens[row + 1],), state)
            if (b, row) in zip(of[seen:], places[seen:], strict=True):
                np.testing.assert_allclose(outputs[seen, 0], state.output[0], rtol=1e-4, atol=1e-4)
                # The output at a row stands for the target's state at the row after it.
                np.testing.assert_array_equal(taught[seen, 0], hidden[b, row + 1, -16:])
                assert inputs.said[seen].tolist() == [tokens[row + 1]]
                assert inputs.weight[seen].tolist() == [1]
                seen += 1
    assert seen == sum(max(int(np.ceil((len(e.answer) - 1) * share)), 0) for e in EXAMPLES)
    assert inputs.weight[seen:].sum() == 0


def loss_of_texts(model, weights, rollout, all_hidden):
    """The mean over rows and passes, from whole texts one by one."""
    total, count = mx.zeros(()), 0
    for one, wide in zip(EXAMPLES, all_hidden, strict=False):
        first, end = len(one.prompt), len(one.tokens) - 2
        images = [(start - 1, stop - 1) for start, stop in one.prompt.image_spans]
        pieces = [[*TARGET.embed(mx.array(one.tokens))][row + 1] for row in range(end)]
        for start, stop in images:
            pieces[start:stop] = [wide[row + 1, :16] for row in range(start, stop)]
        given, taught = wide[:end, 16:], wide[first : end + 1, 16:]
        p, features = mx.softmax(TARGET.lm_head(taught), axis=-1), given
        for _ in range(1 + rollout):
            reading = model.read_prompt(mx.stack(pieces), features, images)
            empty = Past.empty(model.config, mx.float32)
            outputs, _ = model.read(reading.rows, mx.array(reading.positions), empty)
            predicted = outputs[-len(taught) :]
            d = mx.abs(predicted - taught)
            near = mx.where(d < 1, d * d / 2, d - 0.5).mean(axis=-1)
            said = -(p * nn.log_softmax(TARGET.lm_head(predicted), axis=-1)).sum(axis=-1)
            total += (weights.hidden * near + weights.distribution * said).sum()
            count += len(taught)
            # Each row of the answer but the first is read as it was predicted.
            features = mx.concatenate([given[:first], predicted[:-1]])
    return total / count


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_texts_that_are_drafted_row_by_row(kind, tmp_path):
    weights = LossWeights(hidden=1.0, distribution=0.1)
    config = TrainConfig(batch_size=4, losses=weights, rollout=1, iterations=1)
    model = network(kind)
    trainer = Trainer(model, TEACHER, EXAMPLES, tmp_path, config)
    batch = trainer._pupil.collate(EXAMPLES[:4], 1.0, (), 4)
    hidden = TEACHER.hidden(batch)
    taught = hidden[..., -16:].reshape(-1, 16)[batch.inputs.teacher_rows]
    loss, agreed, gradient = trainer._step.gradient(vars(batch.inputs), hidden, taught)
    wanted, expected = nn.value_and_grad(
        model, lambda: loss_of_texts(model, weights, 1, hidden[:4])
    )()
    np.testing.assert_allclose(loss.item(), wanted.item(), rtol=1e-4)
    assert agreed[-1].item() == 14
    ours, theirs = (dict(tree_flatten(each)) for each in (gradient, expected))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=2e-3, atol=2e-5, err_msg=name)


SHORT = TrainConfig(
    iterations=6,
    batch_size=2,
    warmup=2,
    save_every=3,
    hidden_noise=0.01,
    rollout=1,
    base_share=0.5,
    optimizer="adamw",
)


@pytest.mark.parametrize("kind", [*KINDS, "own embedding"])
def test_a_stopped_run_goes_on_to_the_same_weights(kind, tmp_path):
    own = kind == "own embedding"

    def begin(folder):
        model = network("eagle", own_embedding=True) if own else network(kind)
        return Trainer(model, TEACHER, EXAMPLES, tmp_path / folder, SHORT)

    whole = begin("whole")
    before = parameters(whole.model)
    whole.run()
    first = begin("parts")
    assert not first.run(lambda: first.step == 4)
    second = begin("parts")
    second.model.update({"fc": {"weight": mx.zeros((16, 32))}})
    assert second.resume() == 4
    assert second.run()
    wanted, got = parameters(whole.averaged()), parameters(load_network(tmp_path / "parts")[0])
    assert wanted.keys() == got.keys() == before.keys()
    assert all(np.array_equal(wanted[name], got[name]) for name in wanted)
    moved = {name for name in wanted if not np.array_equal(wanted[name], before[name])}
    # ViSpec's queries and all else learn; an embedding that is the target's stays.
    assert wanted.keys() - moved == ({"embed_tokens.weight"} if own else set())


def test_ids_that_only_the_target_has_are_left_out():
    model = network("eagle", vocab_size=9)
    pupil = pupil_of(model)
    batch = pupil.collate(EXAMPLES, 1.0, (), 4)
    hidden = TEACHER.hidden(batch)
    outputs = pupil.outputs(batch.inputs, pupil.given(hidden), TARGET.embed)
    taught = hidden[..., -16:].reshape(-1, 16)[batch.inputs.teacher_rows]

    def head(rows):
        """The target's, which prefers the two ids that the drafter lacks."""
        return TARGET.lm_head(rows) + 50 * (mx.arange(11) >= 9)

    weights = LossWeights(hidden=0, distribution=1)
    batch_of = model, batch.inputs, outputs, taught
    loss, agreed = objective(*batch_of, pupil.head(head), weights)
    fewer, _ = objective(*batch_of, lambda rows: TARGET.lm_head(rows)[:, :9], weights)
    assert loss.item() == fewer.item()
    drafts = model.logits(outputs[:14, 0], head, 11).argmax(axis=-1)
    says = TARGET.lm_head(taught[batch.inputs.teacher[:14, 0]])[:, :9].argmax(axis=-1)
    assert agreed.tolist() == [(drafts == says).sum().item(), 14]


def test_noise_is_added_to_states_alone():
    pupil = pupil_of(network("eagle"))
    batch = pupil.collate(EXAMPLES, 1.0, (), 4)
    hidden = TEACHER.hidden(batch)
    noisy = with_noise(hidden, batch, SHORT, pupil.clean, 7)
    np.testing.assert_array_equal(noisy[..., :16], hidden[..., :16])
    assert (noisy[..., 16:] != hidden[..., 16:]).mean() > 0.99


def test_kinds_that_predict_no_states_are_refused():
    model = random_model("eagle3")
    with pytest.raises(ValueError, match="Eagle3Model does not"):
        pupil_of(model)
    assert set(PRESET_OF) == {"flash", *KINDS}
    assert all(configure(preset).iterations for preset in PRESET_OF.values())


def test_a_drafter_learns_what_decoding_measures(tmp_path):
    prompts = [example(seed, 4, 2).prompt for seed in range(6)]
    answers = [Example(one, tuple(continuation(TARGET, one.tokens, 12))) for one in prompts]
    model = network("eagle")
    config = TrainConfig(iterations=30, batch_size=6, warmup=5, learning_rate=1e-2)
    measure = validator(TARGET, prompts[:3], 12, ())
    before = measure(model)[BEST_BY]
    trainer = Trainer(model, TEACHER, answers, tmp_path, config)
    trainer.run()
    assert measure(trainer.averaged())[BEST_BY] > before + 0.5
