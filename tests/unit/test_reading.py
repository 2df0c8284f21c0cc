"""Prompts read in chunks: by the drafters, by the target, and on top of what a cache holds."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mlx.decode import NoDrafter, ReadingDrafter
from flash_mlx.draft import FlashDrafter, NgramDrafter
from flash_mlx.draft.model import pool
from flash_mlx.draft.reading import PartPool, pieces
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import LoadedTarget, MlxVlmTarget
from flash_reference import SMALL, compressed, random_model, slot_outputs
from tiny import random_image
from toy import KEY, ToyTarget

TARGET = ToyTarget()
SPANS = [(), ((0, 3),), ((2, 6),), ((1, 3), (3, 6)), ((0, 2), (4, 6)), ((3, 7),), ((1, 5), (6, 7))]
cuts = st.lists(st.integers(1, 6), max_size=4)


def read_in_chunks(drafter, prompt: Prompt, hidden: mx.array, root: int, borders):
    state, edges = None, [0, *sorted({b for b in borders if b < len(prompt)}), len(prompt)]
    for start, stop in pairwise(edges):
        state = drafter.read(prompt, start, hidden[start:stop], state)
    return drafter.extend(hidden[-1:], (root,), state)


@settings(max_examples=40, deadline=None)
@given(spans=st.sampled_from(SPANS), borders=cuts, raw=st.booleans(), seed=st.integers(0, 99))
def test_a_prompt_in_chunks_is_the_prompt(spans, borders, raw, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 11, 8).tolist()
    hidden = rng.normal(0, 1, (7, 16))
    model = random_model(replace(SMALL, fuse_pre_image=not raw))
    drafter = FlashDrafter(model, TARGET.embed, TARGET.lm_head)
    prompt = Prompt(tuple(tokens[:7]), spans)
    state = read_in_chunks(drafter, prompt, mx.array(hidden, mx.float32), tokens[7], borders)
    embedding = np.array(TARGET.embedding, dtype=np.float64)
    sequence, rows = compressed(model, embedding, tokens, hidden, list(spans), 7)
    wanted = slot_outputs(model, sequence, hidden[rows])[-1]
    np.testing.assert_allclose(state.slots, wanted, atol=1e-5)
    assert state.length == len(sequence)


@settings(max_examples=40, deadline=None)
@given(spans=st.sampled_from(SPANS), borders=cuts, seed=st.integers(0, 99))
def test_ngrams_of_a_prompt_in_chunks_are_those_of_the_prompt(spans, borders, seed):
    tokens = np.random.default_rng(seed).integers(0, 3, 7).tolist()
    prompt, hidden = Prompt(tuple(tokens), spans), mx.zeros((7, 1))
    drafter = NgramDrafter()
    one = read_in_chunks(drafter, prompt, hidden, 1, borders)
    other = drafter.prefill(prompt, hidden, 1)
    assert (one.drafts, one.length, one.misses) == (other.drafts, other.length, other.misses)


@pytest.mark.parametrize("drafter", [FlashDrafter(random_model(), TARGET.embed, TARGET.lm_head)])
def test_a_state_is_a_beginning_that_several_prompts_may_go_on_from(drafter):
    hidden = mx.random.normal((9, 16), key=KEY)
    prompts = [Prompt((4, 5, 6, 7, 8, *rest), ((1, 4),)) for rest in ((1, 2, 3, 4), (9, 8, 7, 6))]
    # Row 3 is followed by row 4, on which both agree: the state stands for four rows of either.
    begin = drafter.read(prompts[0], 0, hidden[:4], None)
    for prompt in prompts:
        state = drafter.read(prompt, 4, hidden[4:], begin)
        state = drafter.extend(hidden[-1:], (2,), state)
        np.testing.assert_allclose(state.slots, drafter.prefill(prompt, hidden, 2).slots, atol=1e-5)
        assert begin.length == 1 + drafter.model.config.num_latents


def test_all_drafters_of_the_package_read_as_they_go():
    flash = FlashDrafter(random_model(), TARGET.embed, TARGET.lm_head)
    for drafter in (flash, NgramDrafter(), NoDrafter()):
        assert isinstance(drafter, ReadingDrafter)


@pytest.mark.parametrize("spread", [1.0, 60.0, 1e4])  # the last: exp(score) alone overflows
def test_parts_of_an_image_pool_to_the_image(spread):
    queries = spread * mx.random.normal((3, 8), key=KEY)
    rows = mx.random.normal((10, 8), key=mx.random.key(1))
    for parts in ((10,), (1, 9), (4, 3, 3), (1,) * 10):
        edges = np.cumsum((0, *parts)).tolist()
        part = None
        for start, stop in pairwise(edges):
            more = PartPool.of(queries, rows[start:stop])
            part = more if part is None else part.join(more)
        np.testing.assert_allclose(part.latents(), pool(queries, rows), atol=1e-5)


@given(borders=st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True))
def test_pieces_are_all_rows_in_order(borders):
    start, stop = sorted(borders)
    for spans in SPANS:
        rows = []
        for piece in pieces(spans, start, stop):
            assert piece.start < piece.stop
            rows += range(piece.start, piece.stop)
            inside = [span for span in spans if span[0] <= piece.start and piece.stop <= span[1]]
            assert piece.image == (inside[0] if inside else None)
        assert rows == list(range(start, stop))


def halves(prompt: Prompt) -> tuple[Prompt, Prompt]:
    """The prompt up to its last image's end, and the whole."""
    end = prompt.image_spans[-1][1]
    return replace(prompt, tokens=prompt.tokens[:end]), prompt


@pytest.mark.parametrize("chunk_size", [7, 512])
def test_a_cache_with_the_images_in_it_reads_the_rest(
    loaded: LoadedTarget, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [random_image(seed=1), random_image(60, 120, seed=2)]
    prompt = make_prompt(loaded, "Compare the two, if you can.", images)
    target = MlxVlmTarget(loaded.target.model, loaded.family, chunk_size=chunk_size)
    whole = target.prefill(prompt, target.make_cache())
    cache, taken = target.make_cache(), []
    first, whole_prompt = halves(prompt)
    target.prefill(first, cache, lambda start, hidden: taken.append((start, hidden)))
    with monkeypatch.context() as patch:  # no image is looked at again
        patch.setattr(type(target.model), "get_input_embeddings", lambda *_, **__: 1 / 0)
        rest = target.prefill(whole_prompt, cache, lambda *rows: taken.append(rows))
    assert [start for start, _ in taken] == [
        *range(0, len(first), chunk_size),
        *range(len(first), len(prompt), chunk_size),
    ]
    assert rest.hidden.shape == (1, target.hidden_size)
    assert mx.allclose(rest.logits, whole.logits, atol=1e-4)
    hidden = mx.concatenate([rows for _, rows in taken])
    assert mx.allclose(hidden, whole.hidden, atol=1e-4)


def test_a_cache_goes_back_to_an_earlier_row(loaded: LoadedTarget) -> None:
    target = loaded.target
    one, two = (
        make_prompt(loaded, text, [random_image()]) for text in ("What is it?", "How many?")
    )
    first, _ = halves(one)
    cache = target.make_cache()
    target.prefill(one, cache)
    cache.rewind(len(first))
    assert cache.length == len(first)
    again = target.prefill(two, cache).logits
    assert mx.allclose(again, target.prefill(two, target.make_cache()).logits, atol=1e-4)
    for length in (-1, len(two) + 1):
        with pytest.raises(ValueError, match=f"at most its {len(two)} rows; got {length}"):
            cache.rewind(length)


def test_a_cache_knows_its_bytes(llava: LoadedTarget) -> None:
    cache = llava.target.make_cache()
    assert cache.nbytes == 0
    llava.target.prefill(Prompt((1, 2, 3)), cache)
    # 4 layers, keys and values, 2 heads of 16 in float32, room for 256 rows
    assert cache.nbytes == 4 * 2 * 2 * 16 * 4 * 256


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 8), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", ["flash", "ngram"])
def test_a_state_goes_back_to_an_earlier_row(kind, rows, seed):
    rng = np.random.default_rng(seed)
    flash = FlashDrafter(random_model(), TARGET.embed, TARGET.lm_head)
    drafter = flash if kind == "flash" else NgramDrafter()
    tokens, spans = tuple(rng.integers(0, 4, 11).tolist()), ((0, 2),)
    hidden = mx.array(rng.normal(0, 1, (11, 16)), mx.float32)
    state = drafter.prefill(Prompt(tokens[:5], spans), hidden[:5], tokens[5])
    state = drafter.extend(hidden[5:8], tokens[6:9], state)
    state = drafter.extend(hidden[8:10], tokens[9:11], state)
    prompt, kept = Prompt(tokens, spans), 10 - rows
    went_on = drafter.read(prompt, kept, hidden[kept:], drafter.rewind(state, rows))
    actual = drafter.extend(hidden[-1:], (3,), went_on)
    wanted = drafter.prefill(prompt, hidden, 3)
    assert actual.length == wanted.length
    if kind == "flash":
        np.testing.assert_allclose(actual.slots, wanted.slots, atol=1e-5)
    else:
        assert actual.drafts == wanted.drafts
