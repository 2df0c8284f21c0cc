"""flash-mlx: vision-language models that answer faster and say the same.

A fast BLAS is bound first (see `flash_mlx.blas`), because that works only before `mlx.core` is
imported. Everything else is imported when it is first asked for, so `import flash_mlx` costs
milliseconds.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from flash_mlx import blas

blas.bind()

if TYPE_CHECKING:
    from flash_mlx.accept import Acceptance
    from flash_mlx.caption import Caption, caption
    from flash_mlx.decode import Drafter, NoDrafter, Output, Round, Target
    from flash_mlx.generate import GenerationResponse, Model, generate, load, stream_generate
    from flash_mlx.prompt import Prompt
    from flash_mlx.sampling import Sampler
    from flash_mlx.session import Session
    from flash_mlx.stats import GenerationStats
    from flash_mlx.tree import DraftTree, Topology
    from flash_mlx.video import Video

__version__ = "0.1.0"

_HOMES = {
    "caption": "caption",
    "Caption": "caption",
    "load": "generate",
    "generate": "generate",
    "stream_generate": "generate",
    "Model": "generate",
    "GenerationResponse": "generate",
    "Session": "session",
    "GenerationStats": "stats",
    "Target": "decode",
    "Drafter": "decode",
    "NoDrafter": "decode",
    "Output": "decode",
    "Round": "decode",
    "Acceptance": "accept",
    "Sampler": "sampling",
    "Prompt": "prompt",
    "DraftTree": "tree",
    "Topology": "tree",
    "Video": "video",
}

__all__ = [
    "Acceptance",
    "Caption",
    "DraftTree",
    "Drafter",
    "GenerationResponse",
    "GenerationStats",
    "Model",
    "NoDrafter",
    "Output",
    "Prompt",
    "Round",
    "Sampler",
    "Session",
    "Target",
    "Topology",
    "Video",
    "caption",
    "generate",
    "load",
    "stream_generate",
]


class _Package(ModuleType):
    """This package. Its `generate` and `caption` are functions, though modules are named so too."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system sets each submodule here once it is loaded.
        if name in ("generate", "caption") and isinstance(value, ModuleType):
            value = vars(value)[name]
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'flash_mlx' has no attribute {name!r}")
    return getattr(importlib.import_module(f"flash_mlx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
