"""ViSpec: EAGLE that reads a few rows in place of an image, and a vector of it everywhere after.

A cross-attention with learned queries reads the target's embeddings of an image. All of its rows
but the last enter the decoder layer in place of the image, at the image's last positions, so that
positions keep a gap. The last row is the image's global vector g: until the next image, each row's
hidden is mixed with it before the fusion. Before the first image g is 0.

Shapes:
    T: rows of the prompt.    N: rows of an image.    Q: queries.    D: hidden size.
    H: heads.    Dh: width of a head.    R: rows of a pass.

Source: ViSpec, arXiv 2509.15235, and the weight names of its published code.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_mlx.draft.decoder import DecoderConfig
from flash_mlx.draft.eagle import EagleModel
from flash_mlx.draft.one_layer import Reading, Spans


class ImageAdaptor(nn.Module):
    """One cross-attention; neither norm, residual nor positions.

    Weights:
        q [Q, H, Dh]; k_proj, v_proj [D, D]; o_proj [D, D].
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Draw initial weights."""
        super().__init__()
        size, bias = config.hidden_size, config.attention_bias
        self.q = mx.random.normal((config.num_queries, config.num_heads, config.head_dim))
        self.k_proj = nn.Linear(size, size, bias=bias)
        self.v_proj = nn.Linear(size, size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=False)

    def __call__(self, image: mx.array) -> mx.array:
        """Return [Q, D] of an image's embeddings [N, D]."""
        num_queries, num_heads, size = self.q.shape
        keys, values = (
            project(image).reshape(1, -1, num_heads, size).swapaxes(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        attended = mx.fast.scaled_dot_product_attention(
            self.q.swapaxes(0, 1)[None], keys, values, scale=size**-0.5
        )
        out: mx.array = self.o_proj(attended[0].swapaxes(0, 1).reshape(num_queries, -1))
        return out


class ViSpecModel(EagleModel):
    """The weights of EAGLE and of what reads images.

    Weights:
        See EagleModel; imadpt (see ImageAdaptor); img_fc [D, 2D], whose columns read the hidden
        first, then g.
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Draw initial weights.

        Raises:
            ValueError: If the settings lack queries or heads do not fill D.
        """
        super().__init__(config)
        if not config.num_queries or config.num_heads * config.head_dim != config.hidden_size:
            raise ValueError(
                "A ViSpec drafter must have num_queries of 1 or more and num_heads * head_dim of "
                f"hidden_size; got {config.num_queries}, and {config.num_heads} * "
                f"{config.head_dim} for {config.hidden_size}."
            )
        self.imadpt = ImageAdaptor(config)
        self.img_fc = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def read_prompt(
        self,
        embeddings: mx.array,
        features: mx.array,
        images: Spans,
        context: mx.array | None = None,
    ) -> Reading:
        """Return what is read of a prompt; see `OneLayerModel.read_prompt`."""
        num_rows, num_compressed = embeddings.shape[0], self.config.num_queries - 1
        context = mx.zeros_like(embeddings[0]) if context is None else context
        rows: list[mx.array] = []
        positions: list[range] = []
        done = 0
        for start, stop in (*images, (num_rows, num_rows)):
            if done < start:
                text = slice(done, start)
                rows.append(self.fuse(embeddings[text], features[text], context))
                positions.append(range(done, start))
            if start < stop:
                seen = self.imadpt(embeddings[start:stop])
                rows.append(seen[:-1])
                positions.append(range(stop - num_compressed, stop))
                context = seen[-1]
            done = stop
        places = np.concatenate([np.array(p, dtype=np.int32) for p in positions])
        return Reading(mx.concatenate(rows), places, context)

    def fuse(self, embeddings: mx.array, features: mx.array, context: mx.array | None) -> mx.array:
        """Return the layer's input, [R, D]; see `OneLayerModel.fuse`. `context` [D] is g."""
        seen = mx.zeros_like(features)
        if context is not None:
            seen = mx.broadcast_to(context, features.shape)
        mixed = self.img_fc(mx.concatenate([features, seen], axis=-1))
        return super().fuse(embeddings, mixed, None)
