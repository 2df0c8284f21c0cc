"""What a target costs and what it says, measured: pass times, entropy, intervals.

Shapes:
    A: rows of an answer.    V: vocabulary.    D: hidden size.    m: rows of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_mlx.decode import Output, Target
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets import LoadedTarget
from flash_mlx.timing import seconds_in_turns
from flash_mlx.tree import DraftTree, Topology

ROWS = (1, 2, 4, 8, 16)


def bootstrap_interval(values: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the median.

    Args:
        values: One a prompt, at least one.
        share: Of the resampled medians that the interval holds.
    """
    from scipy.stats import bootstrap

    if len(values) == 1:
        return values[0], values[0]
    # Corrected intervals (BCa) are not defined where resampled medians are all equal.
    found = bootstrap(
        (np.array(values),),
        np.median,
        confidence_level=share,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def noise_floor(law: npt.NDArray[np.float64], draws: int, chance: float = 1e-3) -> float:
    """Return what the total variation between independent draws and their own law stays below.

    The mean absolute deviation of a cell's share is at most its standard deviation, and at most
    that of a single draw; half their sum bounds the mean of the distance. One draw moves the
    distance by 1 / draws at most, so by McDiarmid's inequality it exceeds its mean by t with
    probability exp(-2 draws t^2) at most.

    Args:
        law: Probabilities of the cells, of any shape.
        draws: Number of them.
        chance: Probability of a larger distance, at most.
    """
    spread = law * (1 - law)
    mean = np.minimum(np.sqrt(spread / draws), 2 * spread).sum() / 2
    return float(mean + np.sqrt(np.log(1 / chance) / (2 * draws)))


def read_answer(
    target: Target, prompt: Prompt, tokens: Sequence[int], rows: int | None = None
) -> Output:
    """Return the target's output about each token of an answer.

    Args:
        target: Reads it.
        prompt: What it answers.
        tokens: [A] ids.
        rows: Rows of a pass; 1 reads as plain decoding does. None: all in one pass.

    Returns:
        Logits [A, V] and hidden [A, D]; row i is what the target says before token i.
    """
    cache = target.make_cache()
    first = target.prefill(prompt, cache)
    logits, hidden = [first.logits], [first.hidden[-1:]]
    read = list(tokens[:-1])
    rows = max(1, len(read)) if rows is None else rows
    for start in range(0, len(read), rows):
        block = read[start : start + rows]
        chain = DraftTree(Topology.chain(len(block) - 1), mx.array(block, dtype=mx.int32))
        out = target.verify(chain, cache)
        mx.eval(out.logits, out.hidden)
        cache.commit(range(len(block)))
        logits.append(out.logits)
        hidden.append(out.hidden)
    return Output(mx.concatenate(logits), mx.concatenate(hidden))


def first_difference(ours: Sequence[int], plain: Sequence[int]) -> int:
    """Return the first place at which two texts differ; where the shorter ends, if nowhere."""
    both = enumerate(zip(ours, plain, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(ours), len(plain)))


def total_entropy(target: Target, prompt: Prompt, tokens: Sequence[int]) -> float:
    """Return the entropy of the target's laws at temperature 1 along an answer, summed [bits].

    Args:
        target: The model.
        prompt: What it answers.
        tokens: [A] ids of the answer.
    """
    laws = Sampler(temperature=1.0).probs(read_answer(target, prompt, tokens).logits)
    bits = -(laws * mx.log2(mx.where(laws > 0, laws, 1))).sum(axis=-1)
    return float(np.array(bits.sum()))


def verify_cost(
    loaded: LoadedTarget, prompt: Prompt, rows: Sequence[int] = ROWS, repeats: int = 25
) -> dict[int, float]:
    """Time passes over m rows after a prompt.

    Returns:
        m to the median time of a pass [s].
    """
    target = loaded.target
    cache = target.make_cache()
    token = mx.argmax(target.prefill(prompt, cache).logits, axis=-1).astype(mx.int32)

    def verify(tree: DraftTree) -> mx.array:
        return target.verify(tree, cache).logits

    trees = {m: DraftTree(Topology.chain(m - 1), mx.repeat(token, m)) for m in rows}
    return seconds_in_turns({m: partial(verify, tree) for m, tree in trees.items()}, repeats)
