"""Images compressed otherwise than by learned queries: in training, in decoding, on the disk."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flash_mlx.checkpoint import load_model, save_drafter
from flash_mlx.decode import decode
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel
from flash_mlx.draft.compression import COMPRESSIONS, fixed_weights
from flash_mlx.loading import num_latents
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.train import Teacher, TrainConfig, Trainer, collate
from flash_mlx.train.teacher import slot_outputs as trained_outputs
from flash_reference import SMALL, compressed, random_model, slot_outputs
from toy import KEY, ToyTarget, greedy_oracle
from training import EXAMPLES

TARGET = ToyTarget()
TEACHER = Teacher.of(TARGET)
WAYS = [
    *({"compression": way, "num_latents": 2} for way in COMPRESSIONS[1:]),
    {"compression": "mean", "num_latents": 3},
    {"num_latents": 0},
    {"compression": "merge", "num_latents": 0},
    {"compression": "mean", "num_latents": 2, "fusion": "linear"},
]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
SPANS = [((0, 3),), ((2, 6),), ((1, 3), (3, 6)), ((3, 7),)]


def make(way: dict[str, object]) -> tuple[FlashModel, FlashDrafter]:
    model = random_model(replace(SMALL, **way))
    return model, FlashDrafter(model, TARGET.embed, TARGET.lm_head)


@ways
@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_prompt_is_read_as_defined_in_pieces_of_any_size(way, spans, chunk):
    model, drafter = make(way)
    rng = np.random.default_rng(0)
    tokens, hidden = rng.integers(0, 11, 8).tolist(), rng.normal(0, 1, (7, 16))
    prompt, rows, state = Prompt(tuple(tokens[:7]), spans), mx.array(hidden, mx.float32), None
    for start in range(0, 7, chunk):
        state = drafter.read(prompt, start, rows[start : start + chunk], state)
    state = drafter.extend(rows[-1:], (tokens[7],), state)
    embedding = np.array(TARGET.embedding, dtype=np.float64)
    sequence, places = compressed(model, embedding, tokens, hidden, spans, 7)
    wanted = slot_outputs(model, sequence, hidden[places])[-1]
    np.testing.assert_allclose(state.slots, wanted, atol=1e-5)
    assert state.length == len(sequence)


@ways
def test_training_sees_what_the_drafter_computes(way):
    """Images of different sizes stand side by side, so some are padded."""
    model, drafter = make(way)
    config = model.config
    most = None if config.reads_whole_images else config.num_latents
    batch = collate(EXAMPLES, most, config.block_size)
    hidden = TEACHER.hidden(batch)
    outputs = trained_outputs(model, batch.inputs, hidden, TARGET.embed)
    place = 0
    for b, one in enumerate(EXAMPLES):
        end, tokens = len(one.prompt), one.tokens
        state = drafter.prefill(one.prompt, hidden[b, :end], tokens[end])
        for row in range(end, len(tokens) - 1):
            np.testing.assert_allclose(outputs[place], state.slots, rtol=1e-5, atol=1e-5)
            state = drafter.extend(hidden[b, row : row + 1], (tokens[row + 1],), state)
            place += 1


@ways
def test_text_stays_the_targets_own(way):
    _, drafter = make(way)
    prompt = Prompt((4, 5, 6, 7, 8), ((1, 4),))
    rounds = decode(TARGET, drafter, prompt, sampler=Sampler(), key=KEY, max_tokens=12, stop_ids=())
    said = [token for each in rounds for token in each.tokens]
    assert said == greedy_oracle(TARGET, prompt.tokens, 12)


@ways
def test_a_trained_drafter_is_loaded_as_it_was_saved(way, tmp_path):
    model = FlashModel(replace(SMALL, **way))
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    trainer = Trainer(model, TEACHER, EXAMPLES, tmp_path, TrainConfig(iterations=2, batch_size=3))
    trainer.run()
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    after = dict(tree_flatten(loaded.parameters()))
    assert after.keys() == before.keys()
    assert "A" not in after
    assert not np.array_equal(after["fc_up.weight"], before["fc_up.weight"])


def test_the_weights_of_a_padded_image_are_those_of_the_image():
    rows = mx.array(np.random.default_rng(1).normal(0, 1, (2, 7, 4)), mx.float32)
    mask = mx.where(mx.arange(7) < mx.array([[7], [5]]), 0.0, -mx.inf)[:, None]
    for way in ("mean", "stride", "merge"):
        for count in (1, 2, 5, 6):
            padded = fixed_weights(way, count, rows, mask)
            for number, size in enumerate((7, 5)):
                alone = fixed_weights(way, count, rows[number, :size])
                assert mx.array_equal(padded[number, :, :size], alone), (way, count)
            np.testing.assert_allclose(padded.sum(axis=-1), 1, atol=1e-6)
            assert not padded[1, :, 5:].any()


def test_rows_that_are_alike_are_merged():
    kinds = mx.array([[1.0, 0], [0, 1]])
    rows = kinds[mx.array([0, 0, 1, 0, 1, 1])] * mx.array([[1.0], [2], [3], [4], [5], [6]])
    weights = fixed_weights("merge", 2, rows)  # starts at rows 1 and 4
    assert (weights > 0).tolist() == [
        [True, True, False, True, False, False],
        [False, False, True, False, True, True],
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compression": "median"}, "compression of a drafter must be one of queries, mean"),
        ({"fusion": "sum"}, "fusion of a drafter must be one of gated, linear"),
        ({"compression": 3}, "compression of a drafter must be one of"),
        ({"num_latents": -1}, "num_latents of a drafter must be a whole number"),
    ],
)
def test_settings_are_checked(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        FlashConfig.from_dict({"hidden_size": 16, "vocab_size": 11, **changes})
    save_drafter(FlashModel(SMALL), tmp_path, {})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path)


def test_what_is_read_of_images_is_counted():
    prompt = Prompt(tuple(range(9)), ((1, 4), (5, 8)))
    ways = ({}, {"num_latents": 0}, {"compression": "none"}, {"compression": "mean"})
    assert [num_latents(make(way)[1], prompt) for way in ways] == [4, 0, 6, 4]
