import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_mlx import accept as accept_module
from flash_mlx.accept import Acceptance, Verdict, accept
from flash_mlx.sampling import Sampler
from flash_mlx.tree import DraftTree, Topology
from toy import GREEDY, KEY, draw_tree, steady, topologies

VECTORS = Path(__file__).parents[3] / "shared" / "data" / "golden_vectors" / "vectors.json"
PLAIN = Sampler(temperature=1)


def chain(*tokens: int, probs: mx.array | None = None) -> DraftTree:
    return DraftTree(Topology.chain(len(tokens) - 1), mx.array(tokens, dtype=mx.int32), probs)


def says(*tokens: int, vocab_size: int = 10) -> mx.array:
    """Logits [N, V] of a target that is sure of one token after each row."""
    return 100.0 * (mx.arange(vocab_size) == mx.array(tokens)[:, None])


def logits_of(*laws: list[float]) -> mx.array:
    with np.errstate(divide="ignore"):
        return mx.array(np.log(np.array(laws, dtype=np.float32)))


def test_a_draft_is_checked_against_its_parents_row() -> None:
    # Root 3; after it the target says 5, after 5 it says 7, and after 7 it says 8.
    assert accept(chain(3, 5, 7), says(5, 7, 8), GREEDY, KEY) == Acceptance((0, 1, 2), (5, 7, 8))


def test_the_first_wrong_draft_ends_the_round_with_the_targets_token() -> None:
    found = accept(chain(3, 5, 6, 8), says(5, 7, 8, 9), GREEDY, KEY)
    assert found == Acceptance((0, 1), (5, 7))


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2), (0, 2, 5), (0, 1, 2, 3, 4, 5)])
def test_accepted_rows_are_taken_of_what_the_target_returned(rows: tuple[int, ...]) -> None:
    hidden = mx.arange(12).reshape(6, 2)
    taken = Acceptance(rows, (7,) * len(rows)).of(hidden)
    assert taken.tolist() == [[2 * row, 2 * row + 1] for row in rows]


def test_a_root_alone_brings_one_token() -> None:
    assert accept(chain(3), says(5), GREEDY, KEY) == Acceptance((0,), (5,))


def test_the_walk_takes_the_sibling_that_is_right() -> None:
    #   3 -- 1 -- 7        After 3 the target says 2, after 2 it says 7, after that 7 it says 0.
    #     \- 2 -- 6
    #          \- 7
    topology = Topology((-1, 0, 0, 1, 2, 2))
    tree = DraftTree(topology, mx.array([3, 1, 2, 7, 6, 7]))
    found = accept(tree, says(2, 9, 7, 9, 9, 0), GREEDY, KEY)
    assert found == Acceptance((0, 2, 5), (2, 7, 0))


def test_among_equal_logits_greedy_takes_the_lowest_id() -> None:
    tied = mx.array([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert accept(chain(0, 2), tied, GREEDY, KEY) == Acceptance((0,), (1,))
    assert accept(chain(0, 1), tied, GREEDY, KEY) == Acceptance((0, 1), (1, 0))


@pytest.mark.skipif(not VECTORS.exists(), reason="third-party vectors are not here")
def test_greedy_rejection_cases_of_vllm() -> None:
    cases = json.loads(VECTORS.read_text())["vllm_greedy_rejection"]["cases"]
    assert len(cases) == 11
    for case in cases:
        logits = says(*case["target_argmax"])
        found = accept(chain(0, *case["draft"]), logits, GREEDY, KEY)
        assert list(found.tokens) == case["expect"]
        assert found.rows == tuple(range(len(case["expect"])))


def test_a_draft_from_the_targets_own_law_is_always_accepted() -> None:
    law = [0.1, 0.2, 0.3, 0.4]
    q = mx.array([law] * 2)
    for seed in range(100):
        tree = chain(0, seed % 4, probs=q)
        assert len(accept(tree, logits_of(law, law), PLAIN, mx.random.key(seed)).rows) == 2


def test_what_the_target_never_says_is_rejected_and_the_residual_speaks() -> None:
    # max(p - q, 0) is positive at token 3 alone.
    p, q = logits_of([0, 0.2, 0.3, 0.5], [0.25] * 4), mx.array([[0.3, 0.4, 0.3, 0.0]] * 2)
    for seed in range(50):
        found = accept(chain(1, 0, probs=q), p, PLAIN, mx.random.key(seed))
        assert found == Acceptance((0,), (3,))


def test_a_deterministic_draft_is_accepted_with_its_probability_and_else_ruled_out() -> None:
    p = logits_of([0.75, 0.25], [1, 0])
    found = [accept(chain(1, 0), p, PLAIN, mx.random.key(seed)) for seed in range(400)]
    assert set(found) == {Acceptance((0, 1), (0, 0)), Acceptance((0,), (1,))}
    # Three standard deviations of a share of 400: 0.065.
    assert np.mean([len(a.rows) == 2 for a in found]) == pytest.approx(0.75, abs=0.065)


def test_siblings_may_use_up_the_law_they_come_from() -> None:
    # Three children and a law with two tokens: the third child says nothing.
    topology = Topology((-1, 0, 0, 0))
    q = mx.array([[0.5, 0.5, 0, 0]] * 4)
    tree = DraftTree(topology, mx.array([0, 0, 1, 2]), q)
    law = [0.0, 0.0, 0.5, 0.5]
    found = [accept(tree, logits_of(*[law] * 4), PLAIN, mx.random.key(s)) for s in range(400)]
    assert {a.rows for a in found} == {(0,)}
    assert np.mean([a.tokens == (2,) for a in found]) == pytest.approx(0.5, abs=0.075)


def test_a_residual_that_vanishes_gives_way_to_the_law() -> None:
    # A law that sums to 1 - 1e-7 may reject its own token; then there is no residual.
    p = mx.array([[0.0, -1e-6, -30.0]] * 2)
    q = PLAIN.probs(p)
    _, rest = accept_module._reject(chain(0, 0, probs=q), PLAIN.probs(p), KEY)
    np.testing.assert_array_equal(np.array(rest(mx.array(0))), np.array(q[0]))


@steady
@given(topologies(), st.integers(0, 10**6))
def test_the_device_finds_the_end_of_the_walk(topology: Topology, seed: int) -> None:
    holds = mx.random.uniform(shape=(len(topology),), key=mx.random.key(seed)) < 0.6
    table = mx.stack([mx.zeros(holds.shape, mx.int32), holds, mx.arange(len(topology))])
    end = accept_module._end(topology, holds).item()
    assert Verdict(topology, table).walk().rows[-1] == end


def test_judging_leaves_the_tree_as_it_was() -> None:
    q = mx.softmax(mx.random.normal((3, 5), key=KEY), axis=-1)
    before = np.array(q)
    tree = DraftTree(Topology((-1, 0, 0)), mx.array([0, 1, 2]), q)
    accept(tree, mx.zeros((3, 5)), PLAIN, KEY)
    np.testing.assert_array_equal(np.array(q), before)
    assert tree.tokens.tolist() == [0, 1, 2]


def test_the_processed_law_decides() -> None:
    # Top-k 1 makes sampling greedy, at accepted drafts, at corrections and after the last draft.
    sampler = Sampler(temperature=5.0, top_k=1)
    logits = mx.array([[0.0, 1.0, 0.5], [0.9, 1.0, 1.1], [1.0, 0.5, 0.9]])
    q = mx.full((3, 3), 1 / 3)
    for seed in range(50):
        key = mx.random.key(seed)
        assert accept(chain(0, 1, 2), logits, sampler, key).tokens == (1, 2, 0)
        assert accept(chain(0, 1, 1, probs=q), logits, sampler, key).tokens == (1, 2)


@steady
@given(topologies(), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_a_walk_is_a_path_of_held_drafts(
    topology: Topology, seed: int, laws: bool, sparse: bool
) -> None:
    keys = mx.random.split(mx.random.key(seed), 4)
    shape = (len(topology), 7)
    q = mx.softmax(3 * mx.random.normal(shape, key=keys[0]), axis=-1)
    if sparse:  # tokens that one law has and the other has not
        q = mx.where(mx.random.uniform(shape=shape, key=keys[1]) < 0.5, 0, q) + 1e-30
        q = q / q.sum(axis=-1, keepdims=True)
    tree = DraftTree(topology, draw_tree(topology, q, keys[2]), q if laws else None)
    logits = 3 * mx.random.normal(shape, key=keys[3])
    for sampler in (GREEDY, PLAIN, Sampler(0.5, top_k=2)):
        found = accept(tree, logits, sampler, keys[1])
        assert found.rows[0] == 0
        assert len(found.rows) == len(found.tokens)
        tokens, law = tree.tokens.tolist(), np.array(sampler.probs(logits))
        for above, row, token in zip(found.rows, found.rows[1:], found.tokens, strict=False):
            assert topology.parents[row] == above
            assert tokens[row] == token
        for row, token in zip(found.rows, found.tokens, strict=True):
            assert law[row, token] > 0


def test_logits_must_fit_the_tree() -> None:
    with pytest.raises(ValueError, match=r"tree of 2 rows needs logits of shape \(2, V\)"):
        accept(chain(0, 1), mx.zeros((3, 5)), GREEDY, KEY)


def test_the_drafters_vocabulary_is_the_targets() -> None:
    for sampler in (GREEDY, PLAIN):
        with pytest.raises(ValueError, match="target's 5 tokens; got 4"):
            accept(chain(0, 1, probs=mx.full((2, 4), 0.25)), mx.zeros((2, 5)), sampler, KEY)
