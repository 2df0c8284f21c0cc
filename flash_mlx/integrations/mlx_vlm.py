"""A FLASH drafter for mlx-vlm's own speculative loop (`--draft-model` of its commands and server).

mlx-vlm loads a drafter through a Python file in its folder, asks its target for
`capture_layer_ids` and calls the drafter once a round. The families that flash-mlx drafts for do
not know that request. So a loaded target is taught it: its language model answers with the LM
head's inputs, and notes the prompt's ids, from which the drafter finds the images. An image's rows
are one run of the target's image token; two images without text between them are read as one.

mlx-vlm counts the target's own token in its block size: it is k + 1.

Shapes:
    T: rows of the prompt.    A: rows accepted in a round.    D: hidden size.    k: tokens drafted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_vlm.models.base import BaseModelConfig

from flash_mlx.checkpoint import load_model
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel, FlashState
from flash_mlx.files import read_json, replacing
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.targets.head import Head
from flash_mlx.targets.hooks import outputs_of

PLUGIN = "flash_drafter.py"
PLUGIN_TEXT = '''"""Found by mlx-vlm through config.json; flash-mlx does the rest."""

from flash_mlx.integrations.mlx_vlm import Model, ModelConfig

__all__ = ["Model", "ModelConfig"]
'''
IMAGE_TOKENS = ("image_token_index", "image_token_id", "video_token_id")


@dataclass
class ModelConfig(BaseModelConfig):
    """What mlx-vlm reads of `config.json`.

    Attributes:
        model_type: Of the plug-in.
        block_size: k + 1.
        target_layer_ids: What the target is asked for; it answers with the LM head's inputs.
        flash: The drafter's own settings.
    """

    model_type: str = "flash_mlx"
    block_size: int = 2
    target_layer_ids: list[int] = field(default_factory=lambda: [0])
    flash: Mapping[str, Any] = field(default_factory=dict)


class Model(nn.Module):
    """The drafter as mlx-vlm calls it: one text at a time.

    Weights:
        network (see FlashModel).
    """

    def __init__(self, config: ModelConfig) -> None:
        """Draw initial weights, which mlx-vlm then replaces."""
        super().__init__()
        self.config = config
        self.network = FlashModel(FlashConfig.from_dict(config.flash))
        self.accept_lens: list[int] = []
        self.draft_lens: list[int] = []
        self._rounds: _Rounds | None = None

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Put the weights of the drafter's folder in their place."""
        return {f"network.{name}": value for name, value in weights.items()}

    def validate_target_compatibility(self, target: nn.Module) -> None:
        """Require a target of the drafter's sizes, and teach it what it is asked for.

        Raises:
            ValueError: If the sizes differ.
        """
        text, ours = target.config.text_config, self.network.config
        for name in ("hidden_size", "vocab_size"):
            if getattr(text, name) != getattr(ours, name):
                raise ValueError(
                    f"A drafter must be made for its target: this one has a {name} of "
                    f"{getattr(ours, name)}, the target's is {getattr(text, name)}."
                )
        _teach(target.language_model)

    def make_cache(self) -> list[Any]:
        """Return nothing: the drafter's state is its own."""
        return []

    def reset(self, target: nn.Module) -> list[Any]:
        """Begin a text."""
        self.accept_lens, self.draft_lens = [], []
        self._rounds = _Rounds(self.network, target)
        return []

    def draft_block(
        self,
        last_bonus: int,
        hidden: mx.array,
        cache: list[Any],  # noqa: ARG002
        block_size: int,
        sampler: Callable[[mx.array], mx.array],  # noqa: ARG002  mlx-vlm accepts equal tokens
        token_dtype: mx.Dtype = mx.int32,
        **_more: Any,
    ) -> mx.array:
        """Return the drafts after the newest token, [1, block_size - 1].

        Args:
            last_bonus: The newest token.
            hidden: [1, T, D] of the prompt in the first round; then [1, A, D].
            cache: Not used.
            block_size: Rows that the target will read, the newest token's included.
            sampler: Not used: the likeliest tokens are drafted.
            token_dtype: Of the result.
        """
        if self._rounds is None:
            raise ValueError("A text must begin with reset(target).")
        drafts = self._rounds.draft(int(last_bonus), hidden[0], block_size - 1)
        return drafts.astype(token_dtype)[None]


class _Rounds:
    """One text: what has been drafted, and the drafter's state."""

    def __init__(self, network: FlashModel, target: nn.Module) -> None:
        language, config = target.language_model, target.config
        stack = language.model
        layer = language.get("lm_head", None)
        head = Head(stack.embed_tokens, tied=True) if layer is None else Head(layer)
        self._drafter = FlashDrafter(network, stack.embed_tokens, head)
        self._language = language
        self._image_ids = {getattr(config, name, None) for name in IMAGE_TOKENS} - {None}
        self._state: FlashState | None = None
        self._drafted: list[int] = []

    def draft(self, root: int, hidden: mx.array, num_drafts: int) -> mx.array:
        """Return [k] drafts after `root`, k being what is asked for or the drafter's own number."""
        if self._state is None:
            tokens = self._language.flash_prompt
            prompt = Prompt(tokens, _runs(tokens, self._image_ids))
            self._state = self._drafter.prefill(prompt, hidden, root)
        else:
            accepted = self._drafted[: hidden.shape[0] - 1]
            self._state = self._drafter.extend(hidden, (*accepted, root), self._state)
        tree = self._drafter.draft(root, self._state, Sampler(), mx.random.key(0))
        drafts = tree.tokens[1 : num_drafts + 1]
        if drafts.shape[0] < num_drafts:  # more were asked for than there are slots
            drafts = mx.concatenate([drafts, mx.repeat(drafts[-1:], num_drafts - drafts.shape[0])])
        self._drafted = np.asarray(drafts).tolist()
        return drafts


def _runs(tokens: tuple[int, ...], ids: set[Any]) -> tuple[tuple[int, int], ...]:
    """Return the half-open ranges of rows with these ids."""
    spans: list[tuple[int, int]] = []
    for row, token in enumerate(tokens):
        if token in ids:
            start = spans.pop()[0] if spans and spans[-1][1] == row else row
            spans.append((start, row + 1))
    return tuple(spans)


def _teach(language: nn.Module) -> None:
    """Let an mlx-vlm language model answer `capture_layer_ids` with the LM head's inputs."""
    base = language.__class__
    if base.__name__.startswith("Taught"):
        return

    def call(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("capture_layer_ids", None) is None:
            return base.__call__(self, inputs, *args, **kwargs)
        if kwargs.get("inputs_embeds") is not None:  # the prompt
            object.__setattr__(self, "flash_prompt", tuple(np.asarray(inputs[0]).tolist()))
        with outputs_of(self.model.norm) as outputs:
            out = base.__call__(self, inputs, *args, **kwargs)
        out.hidden_states = [outputs[-1]]
        return out

    taught = {"__call__": call, "__module__": __name__}
    language.__class__ = type(f"Taught{base.__name__}", (base,), taught)


def export(source: Path, folder: Path) -> None:
    """Write a FLASH drafter's folder for mlx-vlm.

    Args:
        source: The drafter's folder in flash-mlx's layout.
        folder: An empty folder.

    Raises:
        OSError: If a file is missing or cannot be written.
        ValueError: If it is no FLASH drafter, or damaged.
    """
    model = load_model(source)
    if "quantization" in read_json(source / "config.json"):
        raise ValueError(
            f"A drafter must not be quantised to be exported to mlx-vlm; {source} is. Export the "
            "one that it was made from."
        )
    if model.config.taps:
        raise ValueError(
            f"A drafter must read the last hidden states alone to be exported to mlx-vlm; {source} "
            "has taps. Train one without."
        )
    settings = model.config.to_dict()
    config = {
        "model_type": "flash_mlx",
        "model_file": PLUGIN,
        "block_size": model.config.block_size + 1,
        "target_layer_ids": [0],
        "flash": settings,
    }
    with replacing(folder / "model.safetensors") as file:
        file.write_bytes((source / "model.safetensors").read_bytes())
    with replacing(folder / PLUGIN) as file:
        file.write_text(PLUGIN_TEXT, encoding="utf-8")
    with replacing(folder / "config.json") as file:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
