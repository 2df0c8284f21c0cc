"""How a slot comes to know the tokens chosen before it.

The slots of a block are computed at once, so none knows which tokens the others end up with. These
small networks tell it afterwards, at a fraction of a pass each. All start from, and add to, what
the slots already say.

Shapes:
    k: slots.    D: hidden size.    V: vocabulary.    U: tokens that may be proposed.
    W: width of the recurrence.    r: rank.    n: rows corrected at once.    ...: leading axes.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.draft.activations import bounded
from flash_mlx.draft.config import FlashConfig


class Markov(nn.Module):
    """Corrects a slot's logits by the token before it, through r dimensions.

    Weights:
        previous [V, r]: what a token says about its successor; next [U, r]: who listens.
    """

    def __init__(self, vocab_size: int, num_proposed: int, rank: int) -> None:
        """Start without any correction."""
        super().__init__()
        self.previous = mx.random.normal((vocab_size, rank), scale=rank**-0.5)
        self.next = mx.zeros((num_proposed, rank))

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return [..., U], to be added to the logits of what follows `tokens` [...]."""
        return self.previous[tokens] @ self.next.T


class Recurrence(nn.Module):
    """Corrects a slot's output by the tokens before it, read one after the other.

    With y_i the output of slot i >= 1, e_i the embedding of the token of slot i - 1, h_0 = 0:

        z_i = of_embedding(norm(e_i)) + of_output(norm(y_i)) + slot_bias_i + of_state(h_{i-1})
        h_i = sigmoid(first half of z_i) * tanh(second half of z_i)
        y_i <- y_i + up(h_i)

    The norms matter: embeddings are often far smaller than hidden states. So does the bounded
    state: with SiLU, which has no bound, training over nine slots overflowed.

    Weights:
        norm_embedding, norm_output [D]; of_embedding, of_output [2W, D]; of_state [2W, W];
        slot_bias [k - 1, 2W]; up [D, W].
    """

    def __init__(self, config: FlashConfig) -> None:
        """Draw initial weights."""
        super().__init__()
        size, width = config.hidden_size, config.recurrent_size
        self.norm_embedding = nn.RMSNorm(size, config.rms_norm_eps)
        self.norm_output = nn.RMSNorm(size, config.rms_norm_eps)
        self.of_embedding = nn.Linear(size, 2 * width, bias=False)
        self.of_output = nn.Linear(size, 2 * width, bias=False)
        self.of_state = nn.Linear(width, 2 * width, bias=False)
        self.slot_bias = mx.zeros((config.block_size - 1, 2 * width))
        self.up = nn.Linear(width, size, bias=False)

    def heard(self, embedding: mx.array) -> mx.array:
        """Return the share of tokens in z, [..., 2W] from their embeddings [..., D]."""
        share: mx.array = self.of_embedding(self.norm_embedding(embedding))
        return share

    def own(self, outputs: mx.array) -> mx.array:
        """Return the share of slots 1 to m in z, [..., m, 2W] from their outputs [..., m, D]."""
        share: mx.array = self.of_output(self.norm_output(outputs))
        return share + self.slot_bias[: outputs.shape[-2]]

    def step(
        self,
        share: mx.array,
        state: mx.array | None,
        bound: Callable[[mx.array, mx.array], mx.array] = bounded,
    ) -> mx.array:
        """Return h_i, [n, W].

        Args:
            share: [n, 2W] of token and slot in z_i.
            state: [n, W] h_{i-1}; None at slot 1.
            bound: What makes h_i of the halves of z_i.
        """
        if state is not None:
            share = mx.addmm(share, state, self.of_state.weight.T)
        return bound(*mx.split(share, 2, axis=-1))


def hydra_layers(config: FlashConfig) -> list[list[nn.Module]]:
    """Return the published corrections of slots 1 to k - 1.

    Each is a two-layer MLP without biases. It reads the sum of the embeddings of the tokens of all
    slots before, then the slot's output, and what it returns is added to that output.

    Source: the published weights' `hydra_projs`; they were trained with the tokens one row earlier,
    which inference cannot reproduce. Here both use those that precede slot i's.
    """
    size, width = config.hidden_size, config.hydra_size
    return [
        [nn.Linear(2 * size, width, bias=False), nn.ReLU(), nn.Linear(width, size, bias=False)]
        for _ in range(config.block_size - 1)
    ]
