"""A target and its drafter by name: the bundled demo, a folder, or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from flash_mlx import blas
from flash_mlx.checkpoint import load_drafter, resolve_path
from flash_mlx.decode import Drafter, Target
from flash_mlx.draft import FlashDrafter, NgramDrafter
from flash_mlx.targets import LoadedTarget, load_target

DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True, eq=False)
class Model:
    """A target, what came with its checkpoint, and its drafter.

    Attributes:
        loaded: The target with its processor and configuration.
        drafter: What drafts; None decodes plainly.
        name: The target as the caller named it.
        draft_name: The drafter as the caller named it, or what `auto` chose; `none` without one.
        draft_kind: `flash`, `ngram` or `none`.
        is_demo: Whether the target is the bundled demo, which only knows drawn scenes.
    """

    loaded: LoadedTarget = field(repr=False)
    drafter: Drafter[Any] | None
    name: str
    draft_name: str
    draft_kind: Literal["flash", "ngram", "none"]
    is_demo: bool

    @property
    def target(self) -> Target:
        """The model whose text is reproduced."""
        return self.loaded.target

    @property
    def processor(self) -> Any:
        """The Hugging Face processor: `tokenizer` and `image_processor`."""
        return self.loaded.processor

    @property
    def config(self) -> Mapping[str, Any]:
        """The target's `config.json`."""
        return self.loaded.config

    def num_latents(self, num_images: int) -> int:
        """Latents that the drafter reads in place of the visual tokens of `num_images` images."""
        if not isinstance(self.drafter, FlashDrafter):
            return 0
        return num_images * self.drafter.model.config.num_latents


def load(
    model: str | Path = "demo",
    draft: str | Path = "auto",
    *,
    draft_block_size: int | None = None,
    dtype: mx.Dtype | None = None,
    revision: str | None = None,
) -> Model:
    """Load a target and its drafter.

    Args:
        model: `demo`, a folder or a hub id.
        draft: `auto` takes the demo's drafter for the demo and `ngram` otherwise; `ngram` looks
            drafts up in the text so far; `none` decodes plainly; else a folder or a hub id.
        draft_block_size: Tokens to draft in one pass; the drafter's own number if None.
        dtype: What the target computes in; None chooses what is fast here.
        revision: Branch, tag or commit of the target's hub id.

    Returns:
        The model.

    Raises:
        OSError: A folder or file is missing, or `FLASH_MLX_BLAS` names no usable library.
        ValueError: A checkpoint is damaged, or the drafter was trained for another target.
    """
    blas.require()
    name = str(model)
    is_demo = name == "demo"
    path = _demo("target") if is_demo else resolve_path(name, revision)
    draft_name = _draft_name(draft, is_demo=is_demo)
    folder = _draft_folder(draft_name)  # a name that leads nowhere is known before the target loads
    bare = Model(load_target(path, dtype=dtype), None, name, "none", "none", is_demo)
    return _attach(bare, draft_name, folder, draft_block_size)


def demo_pictures() -> tuple[Path, ...]:
    """Return the bundled pictures: scenes that the demo was not trained on."""
    return tuple(sorted((DEMO / "pictures").glob("*.png")))


def with_drafter(
    model: Model, draft: str | Path = "auto", *, draft_block_size: int | None = None
) -> Model:
    """Return the same target with another drafter.

    Args:
        model: From `load`; it stays as it is.
        draft: As for `load`.
        draft_block_size: As for `load`.

    Raises:
        OSError: A folder or file is missing.
        ValueError: The drafter is damaged or was trained for another target.
    """
    name = _draft_name(draft, is_demo=model.is_demo)
    return _attach(model, name, _draft_folder(name), draft_block_size)


def _draft_name(draft: str | Path, *, is_demo: bool) -> str:
    if str(draft) != "auto":
        return str(draft)
    return "demo" if is_demo else "ngram"


def _draft_folder(name: str) -> Path | None:
    if name in ("none", "ngram"):
        return None
    return _demo("drafter") if name == "demo" else resolve_path(name)


def _attach(model: Model, name: str, folder: Path | None, block_size: int | None) -> Model:
    if folder is not None:
        model_type = model.loaded.model_type
        drafter = load_drafter(folder, model.target, block_size, model_type=model_type)
        return replace(model, drafter=drafter, draft_name=name, draft_kind="flash")
    if name == "ngram":
        lookup = NgramDrafter(block_size)
        return replace(model, drafter=lookup, draft_name=name, draft_kind="ngram")
    return replace(model, drafter=None, draft_name=name, draft_kind="none")


def _demo(part: str) -> Path:
    folder = DEMO / part
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The bundled demo must be in {folder}, and it is not. "
            "Install flash-mlx again, or name a model."
        )
    return folder
