"""What a target costs and what it says, measured: pass times, entropy, intervals.

Shapes:
    A: rows of an answer.    V: vocabulary.    D: hidden size.    m: rows of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from flash_mlx.decode import Output
from flash_mlx.prompt import Prompt
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
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(np.array(values), (2000, len(values))), axis=1)
    low, high = np.percentile(medians, [50 * (1 - share), 50 * (1 + share)])
    return float(low), float(high)


def read_answer(loaded: LoadedTarget, prompt: Prompt, tokens: Sequence[int]) -> Output:
    """Return the target's output about each token of an answer, from one pass.

    Returns:
        Logits [A, V] and hidden [A, D]; row i is what the target says before token i.
    """
    target = loaded.target
    cache = target.make_cache()
    first = target.prefill(prompt, cache)
    if len(tokens) == 1:
        return Output(first.logits, first.hidden[-1:])
    chain = Topology.chain(len(tokens) - 2)
    rest = target.verify(DraftTree(chain, mx.array(list(tokens[:-1]), dtype=mx.int32)), cache)
    return Output(
        mx.concatenate([first.logits, rest.logits]),
        mx.concatenate([first.hidden[-1:], rest.hidden]),
    )


def mean_entropy(loaded: LoadedTarget, answers: Sequence[tuple[Prompt, Sequence[int]]]) -> float:
    """Return the mean entropy of the target's law at temperature 1 along answers [bits].

    Args:
        loaded: The target.
        answers: Prompts, each with the ids of its answer.
    """
    total, count = 0.0, 0
    for prompt, tokens in answers:
        logits = read_answer(loaded, prompt, tokens).logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        entropy = -(mx.exp(logprobs) * logprobs).sum(axis=-1)
        total, count = total + float(np.array(entropy.sum())), count + len(tokens)
    return total / count / float(np.log(2))


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
