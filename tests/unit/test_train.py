from dataclasses import replace
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flash_mlx.draft import FlashDrafter, FlashModel
from flash_mlx.prompt import Prompt
from flash_mlx.train import Example, LossWeights, Teacher, collate
from flash_mlx.train.config import PRESETS, configure
from flash_mlx.train.data import fingerprint
from flash_mlx.train.losses import (
    argmax_cross_entropy,
    hybrid_acceptance,
    likeliest,
    list_mle,
    negative_log_acceptance,
    objective,
    overlap,
    smooth_l1,
    soft_cross_entropy,
    total_variation,
)
from flash_mlx.train.order import Epochs, TextFirst
from flash_mlx.train.teacher import rolled_out, slot_outputs
from flash_reference import SMALL, corrected, random_model, softmax
from toy import ToyTarget
from training import EXAMPLES, parameters

TARGET = ToyTarget()
TEACHER = Teacher.of(TARGET)
FULL = replace(SMALL, markov_rank=3, hydra_size=4)


def test_the_example_of_the_batch():
    batch = collate([Example(Prompt((9, 8, 7, 6)), (1, 2, 3))], num_latents=2, block_size=2)
    inputs = batch.inputs
    assert batch.tokens[0, :8].tolist() == [9, 8, 7, 6, 1, 2, 3, 0]
    assert inputs.base_rows[0, :2].tolist() == inputs.base[0, :2].tolist() == [3, 4]
    assert inputs.followers[0, :6].tolist() == [8, 7, 6, 1, 2, 3]
    assert inputs.weight[:3].tolist() == [[1, 1], [1, 0], [0, 0]]
    rows = inputs.teacher_rows[inputs.teacher]
    assert rows[0].tolist() == [4, 5]
    assert rows[1, 0].item() == 5
    assert inputs.said[0].tolist() == [1, 2]
    assert inputs.said[1, 0].item() == 2


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        FULL,
        replace(SMALL, recurrent_size=5),
        replace(SMALL, fuse_pre_image=False, norm_inputs=True),
        replace(SMALL, block_size=1),
    ],
    ids=["base", "hydra", "recurrent", "published text", "one slot"],
)
def test_training_sees_what_the_cached_drafter_computes(config):
    model = random_model(config)
    drafter = FlashDrafter(model, TARGET.embed, TARGET.lm_head)
    batch = collate(EXAMPLES, config.num_latents, config.block_size)
    hidden = TEACHER.hidden(batch)
    outputs = slot_outputs(model, batch.inputs, hidden, TARGET.embed)
    place = 0
    for b, one in enumerate(EXAMPLES):
        end, tokens = len(one.prompt), one.tokens
        state = drafter.prefill(one.prompt, hidden[b, :end], tokens[end])
        for row in range(end, len(tokens) - 1):
            wanted, root = state.slots, row - end
            tokens_before = mx.array([*one.answer[root + 1 :], 0, 0][:2])
            said = np.array(TARGET.embed(tokens_before), np.float64)
            wanted = corrected(model, np.array(wanted, np.float64), said)
            # Slots beyond the answer's end have no token to be corrected by, nor weight.
            used = int(batch.inputs.weight[place].sum().item())
            np.testing.assert_allclose(outputs[place, :used], wanted[:used], rtol=1e-5, atol=1e-5)
            state = drafter.extend(hidden[b, row : row + 1], (tokens[row + 1],), state)
            place += 1
    assert place == sum(len(e.answer) - 1 for e in EXAMPLES)
    assert batch.inputs.weight[place:].sum() == 0


def test_slots_are_taught_by_the_rows_that_say_their_tokens():
    batch = collate(EXAMPLES, 2, 3)
    hidden = TEACHER.hidden(batch)
    taught = hidden.reshape(-1, 16)[batch.inputs.teacher_rows][batch.inputs.teacher]
    place = 0
    for one in EXAMPLES:
        logits = TARGET.read(one.tokens)
        for root in range(len(one.prompt), len(one.tokens) - 1):
            for slot in range(3):
                inside = root + 1 + slot < len(one.tokens)
                assert batch.inputs.weight[place, slot].item() == inside
                if inside:  # row root + slot says token root + slot + 1
                    says = TARGET.lm_head(taught[place, slot])
                    np.testing.assert_allclose(says, logits[root + slot], atol=1e-4)
                    assert batch.inputs.said[place, slot].item() == one.tokens[root + slot]
            place += 1


def test_some_base_rows_are_taught_as_they_are_among_all():
    model = random_model(replace(SMALL, recurrent_size=5))
    every, some = (collate(EXAMPLES, 2, 3, share, (7,), 4) for share in (1.0, 0.4))
    hidden = TEACHER.hidden(every)
    outputs = [slot_outputs(model, batch.inputs, hidden, TARGET.embed) for batch in (every, some)]
    rows = [
        batch.inputs.base_rows.flatten()[batch.inputs.chosen].tolist() for batch in (every, some)
    ]
    of = [(batch.inputs.chosen // batch.inputs.base.shape[1]).tolist() for batch in (every, some)]
    counts = [int(batch.inputs.weight[:, 0].sum().item()) for batch in (every, some)]
    assert counts == [sum(len(one.answer) - 1 for one in EXAMPLES), 2 + 1 + 1 + 3]
    whole = list(zip(of[0], rows[0], strict=True))[: counts[0]]
    for n, place in enumerate(list(zip(of[1], rows[1], strict=True))[: counts[1]]):
        i = whole.index(place)
        used = int(some.inputs.weight[n].sum().item())
        assert used == every.inputs.weight[i].sum().item()
        np.testing.assert_allclose(outputs[1][n, :used], outputs[0][i, :used], atol=1e-5)
        taught = [b.inputs.teacher_rows[b.inputs.teacher[j]] for b, j in ((some, n), (every, i))]
        assert taught[0][:used].tolist() == taught[1][:used].tolist()
        assert some.inputs.said[n, :used].tolist() == every.inputs.said[i, :used].tolist()
    drawn = [collate(EXAMPLES, 2, 3, 0.4, (seed,)).inputs.base_rows.tolist() for seed in range(9)]
    assert drawn[7] == collate(EXAMPLES, 2, 3, 0.4, (7,)).inputs.base_rows.tolist()
    assert any(other != drawn[0] for other in drawn)


def test_the_teacher_reads_prompt_and_answer():
    batch = collate(EXAMPLES, 2, 3)
    hidden = TEACHER.hidden(batch)
    for b, one in enumerate(EXAMPLES):
        logits = TARGET.lm_head(hidden[b, : len(one.tokens)])
        np.testing.assert_allclose(logits, TARGET.read(one.tokens), atol=1e-4)


def test_answers_to_one_prompt_are_read_at_once_and_alike(monkeypatch):
    one = EXAMPLES[3]
    other = Example(one.prompt, (*one.answer[::-1], 3, 1))
    again = Example(one.prompt, one.answer[:1])
    target, passes, answers = ToyTarget(), [], []
    for name, calls in (("prefill", passes), ("verify", answers)):
        own = getattr(target, name)
        monkeypatch.setattr(
            target, name, lambda *words, c=calls, f=own: c.append(words[0]) or f(*words)
        )
    alone = [Teacher.of(ToyTarget()).hidden(collate([each], 2, 3)) for each in (one, other, again)]
    examples = [one, other, again, EXAMPLES[0]]
    # Once memory is full, only what is asked for is read: after three answers at once, one by one.
    for memory, count, read in ((1 << 20, 1, 3), (0, 3, 3), (alone[0].nbytes, 3, 3 + 1 + 1)):
        passes.clear()
        answers.clear()
        teacher = Teacher.of(target, memory, examples=examples)
        for each, wanted in zip((one, other, again), alone, strict=True):
            got = teacher.hidden(collate([each], 2, 3))
            np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert (len(passes), len(answers)) == (count, read)
    passes.clear()
    Teacher.of(target, 0, lambda _: mx.zeros((12, 16)), examples).hidden(collate([one], 2, 3))
    assert not passes


def test_objectives_equal_their_formulas():
    rng = np.random.default_rng(0)
    output, feature = rng.normal(0, 2, (2, 5, 8))
    d = np.abs(output - feature)
    wanted = np.where(d < 1, d * d / 2, d - 0.5).mean(-1)
    got = smooth_l1(mx.array(output, mx.float32), mx.array(feature, mx.float32))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)

    logits, p = rng.normal(0, 2, (5, 8)), softmax(rng.normal(0, 2, (5, 8)))
    q, best = softmax(logits), p.argmax(-1)
    args = (mx.array(logits, mx.float32), mx.array(p, mx.float32))
    np.testing.assert_allclose(soft_cross_entropy(*args), -(p * np.log(q)).sum(-1), rtol=1e-5)
    overlap = -np.log(np.minimum(p, q).sum(-1))
    np.testing.assert_allclose(negative_log_acceptance(*args), overlap, rtol=1e-5)
    np.testing.assert_allclose(total_variation(*args), np.abs(p - q).sum(-1) / 2, rtol=1e-5)
    overlap = np.minimum(p, q).sum(-1)
    share, divergence = np.exp(-3 * overlap), (p * np.log(p / q)).sum(-1)
    hybrid = share * divergence + (1 - share) * (1 - overlap)
    np.testing.assert_allclose(hybrid_acceptance(*args), hybrid, rtol=1e-5)
    got = argmax_cross_entropy(args[0], mx.array(best))
    np.testing.assert_allclose(got, -np.log(q[np.arange(5), best]), rtol=1e-5)


def test_no_gradient_flows_through_the_share_of_the_hybrid():
    logits = mx.random.normal((4, 7), key=mx.random.key(0))
    p = mx.softmax(3 * mx.random.normal((4, 7), key=mx.random.key(1)), axis=-1)
    share = mx.exp(-3 * overlap(logits, p))

    def held(z):
        mixed = share * soft_cross_entropy(z, p) + (1 - share) * total_variation(z, p)
        return mixed.sum()

    got = mx.grad(lambda z: hybrid_acceptance(z, p).sum())(logits)
    np.testing.assert_allclose(got, mx.grad(held)(logits), atol=1e-6)


def test_list_mle_is_the_chance_to_draw_the_order():
    logits = np.random.default_rng(0).normal(0, 2, 6)
    order = likeliest(mx.array(np.random.default_rng(1).normal(0, 2, 6), mx.float32), 3)
    truth = np.random.default_rng(1).normal(0, 2, 6)
    assert order.tolist() == np.argsort(-truth)[:3].tolist()
    ranked = np.exp(logits[np.array(order)])
    chance = np.prod([ranked[i] / ranked[i:].sum() for i in range(3)])
    got = list_mle(mx.array(logits, mx.float32), order)
    np.testing.assert_allclose(got.item(), -np.log(chance), rtol=1e-5)


def test_a_second_block_starts_from_what_the_first_one_predicts():
    model = random_model()
    batch = collate(EXAMPLES, 2, 3)
    hidden = TEACHER.hidden(batch)
    outputs = slot_outputs(model, batch.inputs, hidden, TARGET.embed)
    after = rolled_out(batch.inputs, hidden, outputs)
    place = 0
    for b, one in enumerate(EXAMPLES):
        end = len(one.prompt)
        np.testing.assert_array_equal(after[b, :end], hidden[b, :end])
        for row in range(end, len(one.tokens) - 1):
            np.testing.assert_allclose(after[b, row], outputs[place, 0], atol=1e-6)
            place += 1
        # Nothing follows the last but one token that could have been predicted.
        np.testing.assert_array_equal(
            after[b, max(end, len(one.tokens) - 1) :], hidden[b, max(end, len(one.tokens) - 1) :]
        )

    def distance(read):
        again = slot_outputs(
            model, batch.inputs, rolled_out(batch.inputs, hidden, read), TARGET.embed
        )
        return mx.square(again).sum()

    assert mx.abs(mx.grad(distance)(outputs)).max().item() > 0


def test_text_comes_first_and_pictures_later():
    seen = [i % 2 == 0 for i in range(20)]
    order = TextFirst([5] * 20, seen, 2, 0, 200)
    shares = [all(seen[i] for i in order[step]) for step in range(200)]
    assert all(len({seen[i] for i in order[step]}) == 1 for step in range(200))
    assert not any(shares[:100])
    assert 10 < sum(shares[100:150]) < 40 > 0
    assert sum(shares[150:]) > 30
    again = TextFirst([5] * 20, seen, 2, 0, 200)
    assert [again[step] for step in (199, 3, 120)] == [order[step] for step in (199, 3, 120)]
    with pytest.raises(ValueError, match="with and without pictures; got 4 with and 0 without"):
        TextFirst([5] * 4, [True] * 4, 2, 0, 9)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_teaches(name):
    config = configure(name, {"iterations": 3})
    value, _, grads = loss_and_gradients(random_model(), config.losses)
    assert np.isfinite(value.item())
    assert mx.abs(grads["layers.q_proj.weight"]).max().item() > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"iterations": 0}, "iterations must be a whole number, at least 1"),
        ({"optimizer": "sgd"}, "optimizer must be one of muon, adamw"),
        ({"learning_rate": 0}, "learning_rate must be a number, above 0"),
        ({"losses.hidden": -1}, "losses.hidden must be a number, 0 or more"),
        ({"speed": 1}, "got speed"),
    ],
)
def test_settings_are_checked(changes, says):
    with pytest.raises(ValueError, match=says):
        configure("ours", changes)


def loss_and_gradients(model, weights, chunk=4096):
    batch = collate(EXAMPLES, 2, 3)
    hidden = TEACHER.hidden(batch)
    features = hidden.reshape(-1, 16)[batch.inputs.teacher_rows]

    def loss(inputs):
        outputs = slot_outputs(model, inputs, hidden, TARGET.embed)
        return objective(model, inputs, outputs, features, TARGET.lm_head, weights, chunk)

    (value, agreed), grads = nn.value_and_grad(model, loss)(batch.inputs)
    return value, agreed, dict(tree_flatten(grads))


def test_the_loss_is_the_weighted_mean_over_slots_that_have_a_token():
    model = random_model(replace(SMALL, markov_rank=3))
    weights = LossWeights(0.3, 0.7, 0.2, 0.1, slot_decay=0.5)
    value, agreed, _ = loss_and_gradients(model, weights)
    batch = collate(EXAMPLES, 2, 3)
    hidden = TEACHER.hidden(batch)
    outputs = slot_outputs(model, batch.inputs, hidden, TARGET.embed)
    total, share, matches = 0.0, 0.0, np.zeros(3)
    place = 0
    for b, one in enumerate(EXAMPLES):
        for root in range(len(one.prompt), len(one.tokens) - 1):
            agrees = True
            for slot in range(min(3, len(one.tokens) - root - 1)):
                feature, output = hidden[b, root + slot], outputs[place, slot]
                logits = TARGET.lm_head(output)
                if slot:
                    logits = logits + model.markov(mx.array(one.tokens[root + slot]))
                p = mx.softmax(TARGET.lm_head(feature))
                parts = (
                    smooth_l1(output, feature),
                    soft_cross_entropy(logits, p),
                    argmax_cross_entropy(logits, mx.argmax(p)),
                    negative_log_acceptance(logits, p),
                )
                loss = sum(w * x.item() for w, x in zip((0.3, 0.7, 0.2, 0.1), parts, strict=True))
                total, share = total + 0.5**slot * loss, share + 0.5**slot
                agrees &= mx.argmax(logits).item() == mx.argmax(p).item()
                matches[slot] += agrees
            place += 1
    np.testing.assert_allclose(value.item(), total / share, rtol=1e-5)
    assert agreed.tolist() == [*matches, place]


def test_slots_after_a_wrong_one_can_be_left_out():
    model = random_model()
    weights = LossWeights(until_fail=True)
    _, _, grads = loss_and_gradients(model, weights)
    _, _, others = loss_and_gradients(model, replace(weights, until_fail=False))
    # A random drafter fails at once nearly everywhere, so later slots teach nearly nothing.
    slots, all_slots = (np.abs(np.array(g["residual_gate"])) for g in (grads, others))
    assert slots[2] < all_slots[2] * 0.5
    assert slots[0] > all_slots[0]


@pytest.mark.parametrize("config", [FULL, replace(SMALL, recurrent_size=5, norm_inputs=True)])
def test_gradients_reach_every_weight(config):
    _, _, grads = loss_and_gradients(random_model(config), LossWeights())
    assert grads.keys() == parameters(random_model(config)).keys()
    # A key's bias adds the same to all scores of a query, nearly: rotation makes it matter.
    assert all(mx.abs(grad).max().item() > 1e-7 for grad in grads.values())


def test_chunks_change_neither_loss_nor_gradients():
    model = random_model(FULL)
    value, agreed, grads = loss_and_gradients(model, LossWeights(acceptance=0.5))
    other, also, pieces = loss_and_gradients(model, LossWeights(acceptance=0.5), chunk=5)
    np.testing.assert_allclose(value.item(), other.item(), rtol=1e-5)
    assert agreed.tolist() == also.tolist()
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, pieces[name], atol=1e-6, err_msg=name)


def test_every_epoch_shows_each_example_once_and_depends_on_the_step_alone():
    lengths = np.random.default_rng(0).integers(5, 50, 24).tolist()
    epochs, again = (Epochs(lengths, 4, seed=1) for _ in range(2))
    order = [epochs[step] for step in range(12)]
    assert sorted(chain(*order[:6])) == sorted(chain(*order[6:])) == list(range(24))
    assert order[:6] != order[6:]
    assert [again[step] for step in (11, 2, 7)] == [order[11], order[2], order[7]]
    spread = np.mean([np.ptp([lengths[i] for i in batch]) for batch in order])
    assert spread < np.ptp(lengths) / 3
    assert sorted(Epochs([3, 4], 8, seed=0)[5]) == [0, 1]


def test_other_examples_have_another_fingerprint():
    prints = {fingerprint(EXAMPLES), fingerprint(EXAMPLES[::-1]), fingerprint(EXAMPLES[:3])}
    moved = Example(Prompt(EXAMPLES[0].prompt.tokens[:3]), EXAMPLES[0].tokens[3:])
    prints.add(fingerprint([moved, *EXAMPLES[1:]]))
    assert len(prints) == 4


class Tapped:
    """A toy target that hands out made-up taps besides its hidden states."""

    def __init__(self, target: ToyTarget) -> None:
        self._target = target
        self.embed, self.lm_head = target.embed, target.lm_head

    def widen(self, hidden: mx.array) -> mx.array:
        return mx.concatenate([mx.sin(3 * hidden), hidden[:, ::-1], hidden * 2, hidden], axis=-1)


def test_taps_are_read_alike_in_training_and_decoding():
    model = random_model(replace(SMALL, taps=True))
    tapped = Tapped(TARGET)
    assert model.width == 64
    assert (model.taps(12), model.taps(3)) == ((2, 6, 9), (2, 1, 0))
    drafter = FlashDrafter(model, TARGET.embed, TARGET.lm_head)
    batch = collate(EXAMPLES, SMALL.num_latents, SMALL.block_size)
    plain = TEACHER.hidden(batch)
    wide = mx.stack([tapped.widen(rows) for rows in plain])
    outputs = slot_outputs(model, batch.inputs, wide, TARGET.embed)
    place = 0
    for b, one in enumerate(EXAMPLES[:4]):
        end = len(one.prompt)
        state = drafter.prefill(one.prompt, wide[b, :end], one.tokens[end])
        np.testing.assert_allclose(outputs[place], state.slots, rtol=1e-4, atol=2e-5)
        state = drafter.extend(wide[b, end : end + 1], (one.tokens[end + 1],), state)
        if len(one.answer) > 2:
            np.testing.assert_allclose(outputs[place + 1], state.slots, rtol=1e-4, atol=2e-5)
        place += len(one.answer) - 1
    rolled = rolled_out(batch.inputs, wide, outputs)
    assert mx.array_equal(rolled[..., :48], wide[..., :48])
    assert not mx.array_equal(rolled, wide)
    with pytest.raises(ValueError, match="hidden states of shape"):
        drafter.prefill(EXAMPLES[0].prompt, plain[0, :4], 1)


def test_a_new_drafter_with_taps_begins_as_one_without():
    plain, tapped = FlashModel(SMALL), FlashModel(replace(SMALL, taps=True))
    tapped.update(plain.parameters())
    hidden = mx.random.normal((5, 16), key=mx.random.key(0))
    wide = mx.concatenate([hidden * 2, hidden + 1, -hidden, hidden], axis=-1)
    assert mx.array_equal(tapped.features(wide), plain.features(hidden))
