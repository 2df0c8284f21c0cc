from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_mlx.prompt import Prompt
from flash_mlx.tree import DraftTree, Topology
from toy import steady, topologies

#   0 -- 1 -- 3 -- 5
#     \- 2 -- 4
TREE = Topology((-1, 0, 0, 1, 2, 3))


def test_a_chain_follows_one_after_the_other() -> None:
    chain = Topology.chain(3)
    assert chain.parents == (-1, 0, 1, 2)
    assert chain.depth == (0, 1, 2, 3)
    assert chain.children == ((1,), (2,), (3,), ())
    assert chain.is_chain
    np.testing.assert_array_equal(chain.mask, np.tri(4, dtype=bool))


def test_the_root_alone_is_a_chain_without_families() -> None:
    root = Topology.chain(0)
    assert len(root) == 1
    assert root.is_chain
    assert root.families == ()


def test_a_tree_knows_its_family() -> None:
    assert TREE.depth == (0, 1, 1, 2, 2, 3)
    assert TREE.children == ((1, 2), (3,), (4,), (5,), (), ())
    assert TREE.ranks == (0, 0, 1, 0, 0, 0)
    assert TREE.families == (((0, 1, 2, 3), (1, 3, 4, 5)), ((0,), (2,)))
    assert not TREE.is_chain
    assert TREE.mask.tolist()[5] == [True, True, False, True, False, True]


def test_paths_are_sibling_ranks() -> None:
    paths = [(1, 0), (0,), (0, 0), (1,), (0, 0, 0)]
    assert Topology.from_paths(paths) == TREE
    assert Topology.from_paths([]) == Topology.chain(0)
    assert Topology.from_paths([(0,), (0, 0)]) == Topology.chain(2)


@pytest.mark.parametrize("paths", [[(0, 0)], [(1,)], [(0,), (0, 1)]])
def test_paths_need_parents_and_elder_siblings(paths: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="elder siblings"):
        Topology.from_paths(paths)


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, 0, -1), (-1, 0, 2)])
def test_parents_come_first(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Topology(parents)


def test_a_chain_has_no_negative_length() -> None:
    with pytest.raises(ValueError, match="0 or more; got -1"):
        Topology.chain(-1)


@steady
@given(topologies())
def test_a_row_sees_itself_and_its_ancestors(topology: Topology) -> None:
    for row in range(len(topology)):
        seen, ancestor = {row}, row
        while ancestor:
            ancestor = topology.parents[ancestor]
            seen.add(ancestor)
        assert set(np.flatnonzero(topology.mask[row])) == seen
        assert topology.depth[row] == len(seen) - 1


@steady
@given(topologies())
def test_families_hold_every_draft_once_eldest_first(topology: Topology) -> None:
    held = [child for _, children in topology.families for child in children]
    assert sorted(held) == list(range(1, len(topology)))
    for rank, (parents, children) in enumerate(topology.families):
        assert [topology.parents[child] for child in children] == list(parents)
        assert all(topology.ranks[child] == rank for child in children)
    for siblings in topology.children:
        assert all(a < b for a, b in pairwise(siblings))


@steady
@given(topologies(), st.integers(1, 12))
def test_leading_rows_are_a_tree(topology: Topology, num_rows: int) -> None:
    tree = DraftTree(topology, mx.arange(len(topology)), mx.zeros((len(topology), 3)))
    head = tree.head(num_rows)
    kept = min(num_rows, len(tree))
    assert head.topology.parents == topology.parents[:kept]
    assert head.tokens.tolist() == list(range(kept))
    assert head.probs is not None
    assert head.probs.shape == (kept, 3)


def test_a_cut_tree_without_laws_stays_without_and_keeps_its_hint() -> None:
    head = DraftTree(TREE, mx.arange(6), lookahead=True).head(1)
    assert head.probs is None
    assert head.lookahead


def test_a_tree_needs_a_token_and_a_law_for_each_row() -> None:
    with pytest.raises(ValueError, match=r"tokens of shape \(6,\); got \(5,\)"):
        DraftTree(TREE, mx.arange(5))
    with pytest.raises(ValueError, match=r"probs of shape \(6, V\); got \(5, 7\)"):
        DraftTree(TREE, mx.arange(6), mx.zeros((5, 7)))


def test_a_prompt_counts_its_visual_tokens() -> None:
    prompt = Prompt((1, 9, 9, 9, 9, 2), ((1, 3), (3, 5)))
    assert len(prompt) == 6
    assert prompt.num_visual_tokens == 4
    assert Prompt((1,)).num_visual_tokens == 0


@pytest.mark.parametrize("spans", [((0, 0),), ((2, 7),), ((2, 4), (1, 2)), ((0, 3), (2, 4))])
def test_image_spans_lie_in_the_prompt_in_order(spans: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="inside the prompt's 6 rows"):
        Prompt((1, 2, 3, 4, 5, 6), spans)


def test_a_prompt_is_not_empty() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Prompt(())
