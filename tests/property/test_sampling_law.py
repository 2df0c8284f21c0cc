"""Sampling: the text has the law of plain sampling, whatever the drafter proposes.

Shapes:
    N: rows of a tree.    V: vocabulary.
"""

import mlx.core as mx
import numpy as np
import pytest

from flash_mlx import accept
from flash_mlx.decode import NoDrafter
from flash_mlx.draft import NgramDrafter
from flash_mlx.sampling import Sampler, draw
from flash_mlx.tree import DraftTree, Topology
from law import assert_law
from toy import OracleDrafter, RandomDrafter, ToyTarget, draw_tree, exact_law, generate

SAMPLERS = {
    "plain": Sampler(temperature=1.0),
    "cold": Sampler(temperature=0.5),
    "hot": Sampler(temperature=2.0),
    "top-k": Sampler(temperature=1.0, top_k=3),
    "top-p": Sampler(temperature=0.8, top_p=0.7),
    "min-p": Sampler(temperature=1.5, min_p=0.3),
}


def caterpillar(length: int, ranks: tuple[int, ...], width: int) -> tuple[Topology, np.ndarray]:
    """Return a spine whose rows have `width` children each, and the rows of the spine, [length].

    The spine goes on in the child of rank `ranks[i % len(ranks)]`.
    """
    parents, spine = [-1], [0]
    for step in range(length):
        children = range(len(parents), len(parents) + width)
        parents += [spine[-1]] * width
        spine.append(children[ranks[step % len(ranks)]])
    return Topology(tuple(parents)), np.array(spine[:-1])


def one_step(
    topology: Topology,
    spine: np.ndarray,
    p_logits: mx.array,
    q: mx.array,
    laws: bool,
    sampler: Sampler,
) -> np.ndarray:
    """Return [V] counts of what follows the rows of the spine, which all have one p and one q.

    Each row's draw is independent of the others', so one judgement gives as many draws as the
    spine is long.
    """
    num_rows, vocab_size = len(topology), q.shape[0]
    tree_key, coin_key, draw_key = mx.random.split(mx.random.key(7), 3)
    q = mx.broadcast_to(q, (num_rows, vocab_size))
    tree = DraftTree(topology, draw_tree(topology, q, tree_key), q if laws else None)
    p = sampler.probs(mx.broadcast_to(p_logits, q.shape))
    found, rest = accept._reject(tree, p, coin_key)
    tokens, holds = np.array(tree.tokens), np.array(found)
    next_tokens = np.array(draw(rest(mx.arange(num_rows)), draw_key))
    counts = np.zeros(vocab_size)
    for row in spine:
        held = [child for child in topology.children[row] if holds[child]]
        counts[tokens[held[0]] if held else next_tokens[row]] += 1
    return counts


P = mx.log(mx.array([0.05, 0.4, 0.25, 0.02, 0.2, 0.08]))
Q = {
    "far": mx.array([0.5, 0.05, 0.1, 0.15, 0.05, 0.15]),
    "near": mx.array([0.1, 0.45, 0.2, 0.03, 0.17, 0.05]),
    "few": mx.array([0.0, 0.6, 0.0, 0.4, 0.0, 0.0]),  # fewer tokens than siblings
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("q", Q.values(), ids=Q.keys())
@pytest.mark.parametrize("laws", [True, False], ids=["laws", "deterministic"])
@pytest.mark.parametrize("width", [1, 3])
def test_what_follows_a_row_has_the_targets_law(
    sampler: Sampler, q: mx.array, laws: bool, width: int
) -> None:
    topology, spine = caterpillar(8000, tuple(range(width)), width)
    counts = one_step(topology, spine, P, q, laws, sampler)
    assert_law(counts, np.array(sampler.probs(P), dtype=np.float64))


V = 4
TARGET = ToyTarget(V, seed=3)
PROMPT = (1, 2)
FORKED = Topology((-1, 0, 0, 1, 1, 2))
DRAFTERS = {
    "chain with laws": RandomDrafter(Topology.chain(2), V, laws=True, sharpness=2.0),
    "siblings with laws": RandomDrafter(FORKED, V, laws=True, sharpness=2.0),
    "deterministic tree": RandomDrafter(FORKED, V, laws=False, sharpness=2.0),
    "good chain with laws": OracleDrafter(Topology.chain(2), TARGET, laws=True, corruption=0.3),
    "n-gram": NgramDrafter(),
    "no drafter": NoDrafter(),
}
CASES = [
    ("chain with laws", "cold"),
    ("siblings with laws", "top-p"),
    ("deterministic tree", "hot"),
    ("good chain with laws", "top-k"),
    ("n-gram", "hot"),
    ("no drafter", "cold"),
]


@pytest.mark.parametrize(("drafter", "sampler"), CASES)
def test_three_tokens_in_a_row_have_the_targets_joint_law(drafter: str, sampler: str) -> None:
    # The first token is the prefill's; the others come from one round or from two.
    counts = np.zeros((V, V, V))
    for key in mx.random.split(mx.random.key(11), 1200):
        tokens = generate(TARGET, DRAFTERS[drafter], PROMPT, 3, sampler=SAMPLERS[sampler], key=key)
        counts[tuple(tokens)] += 1
    law = exact_law(TARGET, PROMPT, SAMPLERS[sampler], 3)
    assert_law(counts, law)
    assert_law(counts.sum(axis=0), law.sum(axis=0))
    assert_law(counts.sum(axis=2), law.sum(axis=2))
