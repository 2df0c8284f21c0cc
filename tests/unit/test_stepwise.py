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
from peers_reference import Arrays, golden, kept, paths, paths_of

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
