"""EAGLE-3: features of three of the target's layers, and a vocabulary of its own to propose from.

The inputs of a low, a middle and a high layer of the target, side by side, become one feature; the
layer reads the next token's embedding and that feature, each normed, and adds to the feature. Its
output serves as the feature of the next row. Draft id i stands for the target's id i + d2t[i]; the
target verifies over its whole vocabulary.

Rows of images are read with the embedding of the image's placeholder token. Rotary positions are
indices of rows, for targets with M-RoPE too.

Shapes:
    R: rows of a pass.    D: the drafter's hidden size.    Dt: the target's.
    V: vocabulary.    U: ids that the drafter proposes.

Source: Li et al., arXiv 2503.01840, and the weight names of its published code.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from flash_mlx.draft.decoder import DecoderConfig, DecoderLayer
from flash_mlx.draft.one_layer import OneLayerModel
from flash_mlx.draft.vocabulary import spread


class PairLayer(DecoderLayer):
    """The layer over embedding and feature side by side.

    Weights:
        See DecoderLayer, with W = 2D; input_layernorm of the embedding, hidden_norm of the feature.
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Draw initial weights."""
        super().__init__(config, 2 * config.hidden_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def inputs(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Return both halves of rows [R, 2D] normed, side by side, and the feature alone."""
        embeddings, features = mx.split(rows, 2, axis=-1)
        pair = [self.input_layernorm(embeddings), self.hidden_norm(features)]
        return mx.concatenate(pair, axis=-1), features


class Eagle3Model(OneLayerModel):
    """The weights, and what each row is made of.

    Weights:
        See OneLayerModel; fc [D, 3 * Dt]; midlayer (see PairLayer); norm [D]; lm_head [U, D];
        d2t [U] int32 where U < V.
    """

    needs_hidden = False

    def __init__(self, config: DecoderConfig) -> None:
        """Draw initial weights.

        Raises:
            ValueError: If it reads the embeddings of a target of another width.
        """
        super().__init__(config)
        if config.hidden_size != self.target_size and not config.own_embedding:
            raise ValueError(
                "A drafter that is narrower or wider than its target must bring its own "
                f"embedding; hidden_size is {config.hidden_size}, feature_size "
                f"{config.feature_size}."
            )
        size, num_ids = config.hidden_size, config.draft_vocab_size or config.vocab_size
        self.fc = nn.Linear(3 * self.target_size, size, bias=config.fusion_bias)
        self.midlayer = PairLayer(config)
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, num_ids, bias=False)
        if config.draft_vocab_size:
            self.d2t = mx.zeros(num_ids, dtype=mx.int32)

    @property
    def proposed_ids(self) -> mx.array | None:
        """Tokens that it may propose, [U] int32; None: all."""
        if not self.config.draft_vocab_size:
            return None
        return mx.arange(self.config.draft_vocab_size, dtype=mx.int32) + self.d2t

    @property
    def target_size(self) -> int:
        """The target's hidden size."""
        return self.config.feature_size or self.config.hidden_size

    @property
    def layer(self) -> DecoderLayer:
        """The decoder layer."""
        return self.midlayer

    def taps(self, num_layers: int) -> tuple[int, ...]:
        """Return the target's layers whose inputs are read, low to high.

        Raises:
            ValueError: If the target does not have them.
        """
        config = self.config
        wanted = (
            config.feature_low or 2,
            config.feature_mid or num_layers // 2,
            config.feature_high or num_layers - 3,
        )
        if not all(0 <= layer < num_layers for layer in wanted):
            raise ValueError(
                "A drafter's features must be inputs of its target's layers: the drafter reads "
                f"those of layers {', '.join(map(str, wanted))}, the target has {num_layers} "
                "layers. Use the drafter of this target."
            )
        return wanted

    def split(self, hidden: mx.array) -> tuple[mx.array | None, mx.array]:
        """Turn what the target gives, [R, 3 * Dt], into features [R, D]."""
        return None, self.fc(hidden)

    def fuse(self, embeddings: mx.array, features: mx.array, context: mx.array | None) -> mx.array:  # noqa: ARG002
        """Return [R, 2D]: embedding and feature side by side."""
        return mx.concatenate([embeddings, features], axis=-1)

    def logits(
        self,
        outputs: mx.array,
        lm_head: Callable[[mx.array], mx.array],  # noqa: ARG002
        vocab_size: int,
    ) -> mx.array:
        """Return [R, V] of the drafter's own LM head, spread over the target's ids."""
        own: mx.array = self.lm_head(self.norm(outputs))
        ids = self.proposed_ids
        if ids is None:
            beyond = mx.full((own.shape[0], vocab_size - own.shape[-1]), -mx.inf, dtype=own.dtype)
            return mx.concatenate([own, beyond], axis=-1)
        return spread(own, ids, vocab_size, -mx.inf)
