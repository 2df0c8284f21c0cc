"""What a target's `config.json` says of its language model, where only that file is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LLAMA = {  # what configurations of LLaVA-1.5 leave to the defaults of their language model
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the language model, which some configurations keep at the top."""
    text = {**config, **(config.get("text_config") or {})}
    return LLAMA | text if text.get("model_type") == "llama" else text
