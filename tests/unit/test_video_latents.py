"""Videos as few latents: which frames share them, and what that costs."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mlx.draft import FlashDrafter
from flash_mlx.prompt import Prompt
from flash_mlx.train import Example, collate
from flash_reference import SMALL, compressed, random_model, slot_outputs
from toy import ToyTarget

TARGET = ToyTarget()
FRAME, EXAMPLES = 3, Path(__file__).parents[2] / "examples"


def video(frames: int, apart: int = 0, before: int = 1) -> Prompt:
    """A picture, then a video whose frames stand `apart` rows apart, then two rows of text."""
    starts = [before + 3 + i * (FRAME + apart) for i in range(frames)]
    spans = ((before, before + 2), *((start, start + FRAME) for start in starts))
    rng = np.random.default_rng(frames)
    tokens = rng.integers(0, 11, spans[-1][1] + 2).tolist()
    return Prompt(tuple(tokens), spans, videos=((1, frames + 1),))


@given(frames=st.integers(1, 20), apart=st.integers(0, 2), most=st.integers(0, 9))
def test_neighbours_are_joined_evenly(frames: int, apart: int, most: int) -> None:
    prompt = video(frames, apart)
    spans = prompt.merged_spans(most)
    assert spans[0] == prompt.image_spans[0]  # a picture stays alone
    joined = spans[1:]
    assert len(joined) == (min(most, frames) or frames)
    assert (joined[0][0], joined[-1][1]) == (prompt.image_spans[1][0], prompt.image_spans[-1][1])
    held = [sum(start <= a and b <= stop for a, b in prompt.image_spans) for start, stop in joined]
    assert sum(held) == frames
    assert max(held) - min(held) <= 1
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def test_each_video_is_joined_on_its_own() -> None:
    spans = tuple((i, i + 1) for i in range(0, 20, 2))
    prompt = Prompt((1,) * 20, spans, videos=((0, 4), (5, 9)))
    assert prompt.merged_spans(2) == ((0, 3), (4, 7), (8, 9), (10, 13), (14, 17), (18, 19))
    assert prompt.merged_spans(1) == ((0, 7), (8, 9), (10, 17), (18, 19))
    assert replace(prompt, videos=()).merged_spans(1) == spans


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(1, 7),
    apart=st.integers(0, 1),
    groups=st.integers(0, 3),
    cuts=st.lists(st.integers(1, 20), max_size=4),
)
def test_drafting_and_training_read_the_joined_frames(
    frames: int, apart: int, groups: int, cuts: list[int]
) -> None:
    """The reference compresses rows of all frames of a group together."""
    config = replace(SMALL, video_groups=groups)
    model, prompt = random_model(config), video(frames, apart)
    rows, root = len(prompt), 7
    rng = np.random.default_rng(frames)
    hidden = rng.normal(0, 1, (rows, 16))
    drafter = FlashDrafter(model, TARGET.embed, TARGET.lm_head)
    state, edges = None, [0, *sorted({cut for cut in cuts if cut < rows}), rows]
    for start, stop in pairwise(edges):
        state = drafter.read(prompt, start, mx.array(hidden[start:stop], mx.float32), state)
    state = drafter.extend(mx.array(hidden[-1:], mx.float32), (root,), state)
    embedding, spans = np.array(TARGET.embedding, dtype=np.float64), prompt.merged_spans(groups)
    tokens = [*prompt.tokens, root]
    sequence, kept = compressed(model, embedding, tokens, hidden, list(spans), rows)
    np.testing.assert_allclose(
        state.slots, slot_outputs(model, sequence, hidden[kept])[-1], atol=1e-5
    )
    text = rows - sum(stop - start for start, stop in spans)
    assert state.length == len(sequence) == text + len(spans) * config.num_latents

    batch = collate([Example(prompt, (root, 1))], config.num_latents, 2, video_groups=groups)
    assert batch.inputs.image_rows.shape[1] == len(spans)
    assert int((batch.inputs.image_mask == 0).sum()) == sum(b - a for a, b in spans)


def test_long_videos_cost_no_more_than_short_ones() -> None:
    rows = {}
    for groups in (0, 4):
        model = random_model(replace(SMALL, video_groups=groups))
        drafter = FlashDrafter(model, TARGET.embed, TARGET.lm_head)
        for frames in (1, 4, 16, 64):
            prompt = video(frames, apart=1)
            state = drafter.prefill(prompt, mx.zeros((len(prompt), 16)), 1)
            rows[groups, frames] = state.length
    assert rows[4, 4] == rows[4, 16] == rows[4, 64] == rows[0, 4]
    assert rows[4, 1] == rows[0, 1] < rows[0, 4] < rows[0, 16] < rows[0, 64]


@pytest.mark.slow
def test_the_example_measures_it() -> None:
    words = [sys.executable, EXAMPLES / "video_cost.py", "--frames", "8", "64", "--repeats", "1"]
    out = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["rows"] for line in found] == [151, 1103, 151, 151]
