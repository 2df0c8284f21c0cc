"""EAGLE, EAGLE-3, MSD and ViSpec: the authors' outputs, the tree that grows, and what is invariant.

Shapes:
    T: prompt rows.    D: hidden size.    V: vocabulary.
"""

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx.draft.stepwise import StepwiseDrafter, StepwiseState
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from peers_reference import Arrays, golden, kept, paths, paths_of, random_model

KEY = mx.random.key(0)
GREEDY = Sampler()


def read(kind: str) -> tuple[StepwiseDrafter, StepwiseState, Arrays, int]:
    """Read the golden prompt; returns the root as well."""
    model, arrays, weights = golden(kind)
    table = mx.array(weights["embed_tokens.weight"])
    hidden, spans = arrays["h"], ()
    if kind == "msd":
        start, rows = int(arrays["image_start"]), int(arrays["n_image"])
        spans = ((start, start + rows),)
        distance = ((arrays["E"][:, None] - weights["embed_tokens.weight"]) ** 2).sum(-1)
        ids = [*distance.argmin(-1).tolist(), int(arrays["last_token"])]
        text = [row for row in range(len(hidden)) if not start <= row < start + rows]
        assert distance.min(-1)[text].max() == 0
    else:
        ids = arrays["ids"].tolist()
    if kind == "vispec":
        rows = np.flatnonzero(arrays["image_mask"])
        spans = ((int(rows[0]), int(rows[-1]) + 1),)
        assert len(rows) == spans[0][1] - spans[0][0]
    if kind != "eagle3":
        received = arrays.get("E", np.zeros_like(hidden))
        hidden = np.concatenate([received, hidden], axis=1)
    head = mx.array(arrays["head"])
    drafter = StepwiseDrafter(model, lambda ids: table[ids], lambda x: x @ head.T, 97)
    *prompt, root = ids
    state = drafter.prefill(Prompt(tuple(prompt), spans), mx.array(hidden), root)
    return drafter, state, arrays, root


@pytest.mark.parametrize("kind", ["eagle1", "eagle3", "msd", "vispec"])
def test_prompts_and_trees_are_those_of_the_authors(kind: str) -> None:
    drafter, state, arrays, root = read(kind)
    for ours, theirs in zip(kept(state.past), (arrays["k"], arrays["v"]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    tree = drafter.draft(root, state, GREEDY, KEY)
    assert len(tree) == len(arrays["tokens"])
    theirs = paths([root, *arrays["tokens"].tolist()[1:]], arrays["tree_mask"])
    assert paths_of(tree) == theirs


def test_vispec_goes_on_with_its_global_vector_and_its_gap() -> None:
    drafter, state, arrays, _ = read("vispec")
    np.testing.assert_allclose(np.array(state.context), arrays["g"], atol=1e-4)
    assert state.position == int(arrays["real_length"])
    assert state.past.length < state.position
    tokens = arrays["acc"].tolist()
    hidden = np.concatenate([np.zeros_like(arrays["h2"]), arrays["h2"]], axis=1)
    later = drafter.extend(mx.array(hidden), tuple(tokens), state)
    assert later.position == state.position + len(tokens)
    tree = drafter.draft(tokens[-1], later, GREEDY, KEY)
    theirs = paths([tokens[-1], *arrays["tokens2"].tolist()[1:]], arrays["tree_mask2"])
    assert paths_of(tree) == theirs


def test_msd_for_qwen_reads_a_prompt_as_the_authors_do() -> None:
    from flash_mlx.draft.decoder import Past

    model, arrays, _ = golden("msdq")
    start, rows = int(arrays["image_start"]), int(arrays["n_image"])
    images = [(start - 1, start - 1 + rows)]
    reading = model.read_prompt(mx.array(arrays["S"]), mx.array(arrays["h"]), images)
    empty = Past.empty(model.config, mx.float32)
    out, past = model.read(reading.rows, mx.array(reading.positions), empty)
    np.testing.assert_allclose(np.array(out), arrays["out"], atol=1e-4)
    for ours, theirs in zip(kept(past), (arrays["k"], arrays["v"]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def near(ours: StepwiseState, theirs: StepwiseState) -> bool:
    """Whether two states are the same but for rounding."""
    pairs = [*zip(kept(ours.past), kept(theirs.past), strict=True)]
    pairs += [(ours.output, theirs.output)]
    if theirs.context is not None and ours.context is not None:
        pairs += [(ours.context, theirs.context)]
    same = (ours.position, ours.past.length) == (theirs.position, theirs.past.length)
    return same and all(np.allclose(np.array(a), np.array(b), atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("kind", ["eagle1", "eagle3", "msd", "vispec"])
def test_a_prompt_may_be_read_in_any_chunks_and_text_be_read_again(kind: str) -> None:
    model = random_model("eagle" if kind == "eagle1" else kind)
    size = model.config.hidden_size
    width = size * (3 if kind == "eagle3" else 2)
    rng = np.random.default_rng(0)
    table = mx.array(rng.normal(size=(400, size)).astype(np.float32))
    drafter = StepwiseDrafter(model, lambda ids: table[ids], lambda x: x @ table.T, 400)
    spans = ((0, 5), (9, 14), (14, 20), (23, 24))
    tokens = tuple(rng.integers(0, 400, 33).tolist())
    prompt, root = Prompt(tokens, spans), 7
    hidden = mx.array(rng.normal(size=(33, width)).astype(np.float32))
    whole = drafter.prefill(prompt, hidden, root)
    for chunk in (1, 2, 4, 7, 13, 32):
        state = None
        for start in range(0, 33, chunk):
            state = drafter.read(prompt, start, hidden[start : start + chunk], state)
            assert state.position + state.waiting.shape[0] == min(start + chunk, 33)
        assert near(drafter.extend(hidden[-1:], (root,), state), whole), chunk

    said = mx.array(rng.normal(size=(3, width)).astype(np.float32))
    later = drafter.extend(said, (1, 2, 3), whole)
    longer = Prompt((*tokens, root, 1, 9, 9), spans)  # parts from what was said after two rows
    more = mx.array(rng.normal(size=(4, width)).astype(np.float32))
    fresh = drafter.prefill(longer, mx.concatenate([hidden, said[:1], more[1:]]), root)
    for back in (2, 7, 12):
        state = drafter.rewind(later, back)
        first = 36 - back
        rows = mx.concatenate([hidden, said[:1], more[1:]])[first:]
        assert near(
            drafter.extend(more[-1:], (root,), drafter.read(longer, first, rows, state)), fresh
        )
    part = drafter.read(prompt, 0, hidden[:30], None)
    for back in (0, 3):  # rows that wait are given back first
        state = drafter.rewind(part, back)
        state = drafter.read(prompt, 30 - back, hidden[30 - back :], state)
        assert near(drafter.extend(hidden[-1:], (root,), state), whole)
