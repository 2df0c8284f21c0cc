"""A model's embedding, decoder layers and LM head, called alike for every family.

Shapes:
    T: prompt rows.    R: rows of any number.    D: hidden size.    V: vocabulary.
    N: visual rows among T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flash_mlx.prompt import Prompt
from flash_mlx.targets.families import Family
from flash_mlx.targets.head import Head
from flash_mlx.targets.hooks import outputs_of
from flash_mlx.targets.videos import merge_videos, merged_positions


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """An embedded prompt.

    Attributes:
        embeds: [1, T, D].
        positions: [3, 1, T] under M-RoPE; else None.
        rope_delta: Position of the row after the prompt minus T.
        visual: [1, T] which rows are visual; None unless `deepstack` is there.
        deepstack: [N, D] each: what the first layers add to the visual rows, in turn.
    """

    embeds: mx.array
    positions: mx.array | None = None
    rope_delta: int = 0
    visual: npt.NDArray[np.bool_] | None = None
    deepstack: tuple[mx.array, ...] = ()

    def of(self, rows: slice) -> dict[str, Any]:
        """Return the decoder's arguments besides ids and cache for these rows."""
        arguments: dict[str, Any] = {"embeds": self.embeds[:, rows]}
        if self.positions is not None:
            arguments["position_ids"] = self.positions[..., rows]
        if self.visual is not None:
            before = int(self.visual[:, : rows.start].sum())
            inside = int(self.visual[:, rows].sum())
            arguments["visual_pos_masks"] = self.visual[:, rows]
            arguments["deepstack_visual_embeds"] = [
                added[before : before + inside] for added in self.deepstack
            ]
        return arguments


class Decoder:
    """The language model of an mlx-vlm model.

    Attributes:
        stack: The module with the decoder layers.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        """Wrap a model's language model."""
        self._model: Any = model
        self._family = family
        self._language_model: Any = model.language_model
        self.stack: Any = model.language_model if family.flat else model.language_model.model

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers."""
        layers: Sequence[nn.Module] = self.stack.layers
        return layers

    def __call__(
        self, ids: mx.array, cache: Sequence[Any], embeds: mx.array | None = None, **more: Any
    ) -> mx.array:
        """Return hidden [R, D], the LM head's input, of ids [1, R]; lazy.

        Args:
            ids: [1, R] int32.
            cache: Each layer's; the rows are written to it.
            embeds: [1, R, D] to read instead of those of the ids.
            more: What the family's decoder takes besides (`position_ids`, ...).
        """
        arguments = {self._family.embeds: embeds, "cache": cache, **more}
        if not self._family.flat:
            hidden: mx.array = self.stack(ids, **arguments)[0]
            return hidden
        # The logits of all rows, which come along, are never computed: nothing reads them.
        with outputs_of(self.stack.norm) as outputs:
            self.stack(ids, **arguments)
        return outputs[-1][0]

    def make_layers(self) -> list[Any]:
        """Return a new cache for each layer."""
        from mlx_vlm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        layers: list[Any] = make_prompt_cache(self._language_model)
        if not self._family.sliding:
            return layers
        # A ring cannot give rows back. All rows are kept, and the layer's mask is the window.
        return [KVCache() if type(layer) is RotatingKVCache else layer for layer in layers]

    def embed(self, tokens: mx.array) -> mx.array:
        """Return [R, D], the embeddings of ids [R] as the layers receive them."""
        embedded: mx.array = self.stack.embed_tokens(tokens)
        if self._family.scale is not None:
            embedded = embedded * self._family.scale(embedded.shape[-1], embedded.dtype)
        return embedded

    @property
    def head(self) -> Head:
        """The LM head."""
        layer = self._language_model.get("lm_head", None)
        cap = self._family.softcap
        bound = None if cap is None else cap(self._language_model)
        if layer is None:
            return Head(self.stack.embed_tokens, tied=True, bound=bound)
        return Head(layer, bound=bound)

    def read(self, prompt: Prompt) -> PromptFeatures:
        """Embed the text and the images of a prompt."""
        # One sequence without padding needs no attention mask, whatever the processor returned.
        inputs = {name: x for name, x in prompt.inputs.items() if name != "attention_mask"}
        if "pixel_values_videos" in inputs and not self._family.timed:
            return self._read_videos(prompt.tokens, inputs)
        ids = mx.array(prompt.tokens, dtype=mx.int32)[None]
        if self._family.image_rows is not None and "pixel_values" in inputs:
            rows = self._family.image_rows(self._model, inputs)
            return PromptFeatures(self._place(ids, rows, prompt.image_spans))
        if self._family.attends_mask:
            inputs["mask"] = mx.ones_like(ids)
        pixel_values = inputs.pop("pixel_values", None)
        features = self._model.get_input_embeddings(ids, pixel_values, **inputs)
        mx.eval(features.inputs_embeds)
        deepstack = features.deepstack_visual_embeds
        if not self._family.mrope:
            return PromptFeatures(features.inputs_embeds)
        return PromptFeatures(
            features.inputs_embeds,
            mx.broadcast_to(features.position_ids, (3, *ids.shape)),
            int(features.rope_deltas.item()),
            None if deepstack is None else np.array(features.visual_pos_masks),
            tuple(() if deepstack is None else deepstack),
        )

    def _read_videos(self, tokens: tuple[int, ...], inputs: dict[str, mx.array]) -> PromptFeatures:
        """Embed a prompt with videos, to a model that reads them as its pictures."""
        config = self._model.config
        pictures = config.image_token_id, config.video_token_id
        tokens, inputs, rates = merge_videos(tokens, inputs, *pictures)
        ids = mx.array(tokens, dtype=mx.int32)[None]
        features = self._model.get_input_embeddings(ids, inputs.pop("pixel_values"), **inputs)
        mx.eval(features.inputs_embeds)
        placed = merged_positions(config, tokens, inputs["image_grid_thw"], rates)
        return PromptFeatures(features.inputs_embeds, *placed)

    def _place(self, ids: mx.array, rows: mx.array, spans: Sequence[tuple[int, int]]) -> mx.array:
        """Return [1, T, D], the embeddings of ids [1, T] with `rows` [N, D] at the spans."""
        embeds = self.stack.embed_tokens(ids)
        where = [row for start, stop in spans for row in range(start, stop)]
        if len(where) != rows.shape[0]:
            raise ValueError(
                f"The images must take the prompt's {len(where)} visual rows; the model makes "
                f"{rows.shape[0]} of them. The processor does not fit the model."
            )
        embeds[0, mx.array(where)] = rows.astype(embeds.dtype)
        mx.eval(embeds)
        return cast(mx.array, embeds)
