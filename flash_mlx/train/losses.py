"""Objectives, each a function of one slot's output and what the target said there.

Shapes:
    n: base rows.    k: slots.    D: hidden size.    V: vocabulary.    m: tokens in order.
    U: tokens that the drafter may propose.
    ...: any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flash_mlx.draft import FlashModel
from flash_mlx.draft.activations import trained_cross_entropy, trained_softmax
from flash_mlx.draft.kinds import DraftModel
from flash_mlx.train.data import Taught
from flash_mlx.train.pieces import one_after_another

RANKED = 10  # tokens that `list_mle` puts in order


@dataclass(frozen=True)
class LossWeights:
    """The share of each objective; those of weight 0 are not computed.

    Attributes:
        hidden: Of `smooth_l1`.
        distribution: Of `soft_cross_entropy`.
        argmax: Of `argmax_cross_entropy`.
        acceptance: Of `negative_log_acceptance`.
        variation: Of `total_variation`.
        hybrid: Of `hybrid_acceptance`.
        ranking: Of `list_mle`.
        slot_decay: Slot i counts `slot_decay ** i`.
        until_fail: Whether a slot counts only if the target agrees with all slots before it,
            because only then is it looked at.
    """

    hidden: float = 0.1
    distribution: float = 1.0
    argmax: float = 0.0
    acceptance: float = 0.0
    variation: float = 0.0
    hybrid: float = 0.0
    ranking: float = 0.0
    slot_decay: float = 0.9
    until_fail: bool = False


def smooth_l1(output: mx.array, taught: mx.array) -> mx.array:
    """Return the mean over D of d^2 / 2 where d = |output - taught| < 1, else d - 1/2.

    Args:
        output: [..., D] the drafter's.
        taught: [..., D] the target's hidden at the row that output stands for.

    Source: FLASH, arXiv 2505.12728, L_reg (as EAGLE, arXiv 2401.15077).
    """
    distance = mx.abs(output.astype(mx.float32) - taught.astype(mx.float32))
    return mx.where(distance < 1, 0.5 * distance * distance, distance - 0.5).mean(axis=-1)


def soft_cross_entropy(logits: mx.array, p: mx.array) -> mx.array:
    """Return -sum_x p(x) log q(x): the divergence KL(p || q), but for the entropy of p.

    Args:
        logits: [..., V] the drafter's, of q.
        p: [..., V] the target's distribution.

    Source: FLASH, arXiv 2505.12728, L_cls.
    """
    return trained_cross_entropy(logits, p)


def argmax_cross_entropy(logits: mx.array, best: mx.array) -> mx.array:
    """Return -log q(best), where `best` [...] is the target's most likely token."""
    chosen = mx.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
    return mx.logsumexp(logits, axis=-1) - chosen


def overlap(logits: mx.array, p: mx.array) -> mx.array:
    """Return sum_x min(p(x), q(x)), the chance that a draft drawn from q is accepted.

    Args, shapes: see `soft_cross_entropy`.

    Source: Leviathan et al. 2023, corollary 3.6.
    """
    return mx.minimum(p, trained_softmax(logits)).sum(axis=-1)


def negative_log_acceptance(logits: mx.array, p: mx.array) -> mx.array:
    """Return -log sum_x min(p(x), q(x)), by the chance that a draft drawn from q is accepted.

    Args, shapes: see `soft_cross_entropy`.

    Source: LK losses, arXiv 2602.23881.
    """
    return -mx.log(mx.maximum(overlap(logits, p), 1e-6))


def total_variation(logits: mx.array, p: mx.array) -> mx.array:
    """Return sum_x |p(x) - q(x)| / 2, the chance that a draft drawn from q is refused.

    Args, shapes: see `soft_cross_entropy`.

    Source: ViSpec, arXiv 2509.15235 (twice this, with weight 10).
    """
    return 0.5 * mx.abs(trained_softmax(logits) - p).sum(axis=-1)


def hybrid_acceptance(logits: mx.array, p: mx.array) -> mx.array:
    """Return w KL(p || q) + (1 - w) TV(p, q) with w = exp(-3 a), a = sum_x min(p(x), q(x)).

    While few drafts are accepted this is the divergence, whose gradient does not vanish; later it
    is the chance of a refusal. No gradient flows through w.

    Args, shapes: see `soft_cross_entropy`.

    Source: LK losses, arXiv 2602.23881.
    """
    share = mx.stop_gradient(mx.exp(-3 * overlap(logits, p)))
    entropy = -(p * mx.log(mx.maximum(p, 1e-30))).sum(axis=-1)
    divergence = soft_cross_entropy(logits, p) - entropy
    return share * divergence + (1 - share) * total_variation(logits, p)


def list_mle(logits: mx.array, order: mx.array) -> mx.array:
    """Return -sum_i (z_i - log sum_{j >= i} exp z_j), z the drafter's logits in the given order.

    That is the negative log-likelihood of the order when tokens are drawn one by one.

    Args:
        logits: [..., V] the drafter's.
        order: [..., m] the target's m most likely tokens, the likeliest first.

    Source: ListMLE, Xia et al. 2008; with m = 10 in ViSpec, arXiv 2509.15235.
    """
    z = mx.take_along_axis(logits, order, axis=-1)
    return (mx.logcumsumexp(z, axis=-1, reverse=True) - z).sum(axis=-1)


def likeliest(logits: mx.array, count: int) -> mx.array:
    """Return the `count` most likely tokens of each row, [..., count], the likeliest first."""
    count = min(count, logits.shape[-1])
    some = mx.argpartition(-logits, count - 1, axis=-1)[..., :count]
    rank = mx.argsort(-mx.take_along_axis(logits, some, axis=-1), axis=-1)
    return mx.take_along_axis(some, rank, axis=-1)


def said_by_target(target_logits: mx.array, weights: LossWeights) -> tuple[mx.array, mx.array]:
    """Return p and order, as `weighted` takes them, of the target's logits [n, V]."""
    p = mx.softmax(target_logits, axis=-1)
    if weights.ranking:
        return p, likeliest(target_logits, RANKED)
    return p, mx.argmax(target_logits, axis=-1)[:, None]


def of_proposed(target_logits: mx.array, ids: mx.array | None) -> tuple[mx.array, ...]:
    """Return what a drafter that proposes some tokens alone can learn of the target.

    Let s be the chance that the target says one of them. No such drafter is accepted more often
    than that, and q = p / s is. So it is taught p / s, and a row counts s times: with chance 1 - s
    nothing that it learns there is of use. `soft_cross_entropy` then is that to p as it is.

    Args:
        target_logits: [n, V].
        ids: [U] the tokens; None: all.

    Returns:
        [n, U] logits; [n] s; [n] bool, whether the target's most likely token is one of them.
    """
    if ids is None:
        return target_logits, (ones := mx.ones(target_logits.shape[:1])), ones > 0
    own = target_logits[:, ids]
    share = mx.logsumexp(own, axis=-1) - mx.logsumexp(target_logits, axis=-1)
    known = ids[mx.argmax(own, axis=-1)] == mx.argmax(target_logits, axis=-1)
    return own, mx.exp(share), known


def objective(
    model: DraftModel,
    inputs: Taught,
    outputs: mx.array,
    taught: mx.array,
    lm_head: Callable[[mx.array], mx.array],
    weights: LossWeights,
    chunk: int = 4096,
    head: Callable[[mx.array], mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the loss and how often each slot agrees with the target.

    The LM head sees only rows that count, `chunk` base rows at a time; see `one_after_another`.

    Args:
        model: The drafter.
        inputs: The batch.
        outputs: [n, k, D] from `Pupil.outputs`.
        taught: [m, D] the target's hidden at `inputs.teacher_rows`.
        lm_head: The target's.
        weights: Shares of the objectives.
        chunk: Most base rows at a time.
        head: The target's LM head over the tokens that the drafter proposes; None: these are all.

    Returns:
        Scalar loss, a weighted mean over slots; [k + 1] float32 sums over base rows: how often
        all slots up to i agree, and last the number of base rows.
    """
    taught = mx.stop_gradient(taught)
    target_logits = mx.stop_gradient(lm_head(taught).astype(mx.float32))
    target_logits, counted, known = of_proposed(target_logits, model.proposed_ids)
    head = lm_head if head is None else head
    p, order = said_by_target(target_logits, weights)
    best = mx.where(known, order[:, 0].astype(mx.int32), -1)  # what cannot be drafted is missed
    decay = mx.power(weights.slot_decay, mx.arange(outputs.shape[1]))

    # Whatever gradients flow to is an argument: `one_after_another` sees nothing else.
    def part(
        rows: mx.array, teacher: mx.array, mask: mx.array, *markov: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return the sum of the losses, that of their shares, and of agreement."""
        teacher, mask = mx.stop_gradient(teacher), mx.stop_gradient(mask)
        logits = _slot_logits(rows.astype(taught.dtype), head, *markov)
        so_far = mx.cumprod((mx.argmax(logits, axis=-1) == best[teacher]) * mask, axis=1)
        share = mask * decay * counted[teacher]
        if weights.until_fail:
            share = mx.concatenate([share[:, :1], share[:, 1:] * so_far[:, :-1]], axis=1)
        share = mx.stop_gradient(share)
        loss = weighted(rows, logits, taught[teacher], p[teacher], order[teacher], weights)
        return (loss * share).sum(), share.sum(), mx.stop_gradient(so_far.sum(axis=0))

    markov = []
    if isinstance(model, FlashModel) and model.config.markov_rank:
        markov = [model.markov.previous[inputs.said[:, 1:]], model.markov.next]
    whole = part if outputs.shape[0] <= chunk else one_after_another(part, chunk)
    loss, share, agreed = whole(outputs, inputs.teacher, inputs.weight, *markov)
    count = inputs.weight[:, :1].sum(axis=0)
    return loss / mx.maximum(share, 1e-6), mx.concatenate([agreed, count])


def _slot_logits(
    rows: mx.array, lm_head: Callable[[mx.array], mx.array], *markov: mx.array
) -> mx.array:
    """Return the logits [n, k, V] float32 of LM head inputs [n, k, D].

    Args:
        rows: [n, k, D].
        lm_head: The target's.
        markov: None, or what the tokens before slots 1 to k - 1 say, [n, k - 1, r], and who
            listens, [V, r].
    """
    logits = lm_head(rows.reshape(-1, rows.shape[-1])).astype(mx.float32)
    logits = logits.reshape(*rows.shape[:2], -1)
    if not markov:
        return logits
    previous, following = markov
    return mx.concatenate([logits[:, :1], logits[:, 1:] + previous @ following.T], axis=1)


def weighted(
    rows: mx.array,
    logits: mx.array,
    taught: mx.array,
    p: mx.array,
    order: mx.array,
    weights: LossWeights,
) -> mx.array:
    """Return the weighted sum of the objectives of each row, [...] float32.

    Args:
        rows: [..., D] the drafter's.
        logits: [..., V] of these rows.
        taught: [..., D] the target's hidden at the rows that they stand for.
        p: [..., V] the target's distribution there.
        order: [..., m] its most likely tokens, the likeliest first.
        weights: Shares of the objectives.
    """
    loss = mx.zeros(order.shape[:-1])
    if weights.hidden:
        loss = loss + weights.hidden * smooth_l1(rows, taught)
    if weights.distribution:
        loss = loss + weights.distribution * soft_cross_entropy(logits, p)
    if weights.argmax:
        loss = loss + weights.argmax * argmax_cross_entropy(logits, order[..., 0])
    if weights.acceptance:
        loss = loss + weights.acceptance * negative_log_acceptance(logits, p)
    if weights.variation:
        loss = loss + weights.variation * total_variation(logits, p)
    if weights.hybrid:
        loss = loss + weights.hybrid * hybrid_acceptance(logits, p)
    if weights.ranking:
        loss = loss + weights.ranking * list_mle(logits, order)
    return loss
