"""A target and its drafter by name: the bundled demo, a folder, or a hub id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from flash_mlx import blas, registry
from flash_mlx.checkpoint import TargetFacts, load_drafter
from flash_mlx.decode import Drafter, Target
from flash_mlx.draft import AdaptiveDrafter, Calibrator, FlashDrafter, FlashModel, NgramDrafter
from flash_mlx.draft.adaptive import paced, unpaced
from flash_mlx.draft.kinds import kind_of
from flash_mlx.draft.offers import Memory
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.hub import resolve_path
from flash_mlx.prompt import Prompt
from flash_mlx.registry import Choice
from flash_mlx.targets import LoadedTarget, load_target
from flash_mlx.targets.scratch import scratch_cache
from flash_mlx.targets.taps import TappedTarget
from flash_mlx.targets.weights import num_bytes

DEMO = Path(__file__).parent / "demo"

Observer = Callable[[Prompt, tuple[int, ...]], None]

Drafting = Literal["tree", "chain", "fixed"]
"""How much is drafted: as much as pays, with siblings where they pay (`tree`) or without (`chain`),
or as much as the drafter's own settings say, always (`fixed`)."""


@dataclass(frozen=True, eq=False)
class Model:
    """A target, what came with its checkpoint, and its drafter.

    Attributes:
        loaded: The target with its processor and configuration.
        drafter: What drafts; None decodes plainly.
        name: The target as the caller named it.
        draft_name: The drafter as the caller named it, or what `auto` chose; `none` without one.
        draft_kind: `flash`, `eagle`, `eagle3`, `msd`, `vispec`, `ngram` or `none`.
        is_demo: Whether the target is the bundled demo, which only knows drawn scenes.
        draft_reason: Why `auto` chose this drafter; empty if it was named.
        observer: Given each prompt and the ids of its answer, once it ends; None: nobody is.
    """

    loaded: LoadedTarget = field(repr=False)
    drafter: Drafter[Any] | None
    name: str
    draft_name: str
    draft_kind: str
    is_demo: bool
    draft_reason: str = ""
    observer: Observer | None = field(default=None, repr=False)

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

    @property
    def target_bytes(self) -> int:
        """What the target's weights take [bytes]."""
        return num_bytes(untapped(self.loaded).target.model)

    @property
    def drafter_bytes(self) -> int:
        """What the drafter's own weights take, copies of the target's included [bytes]; or 0."""
        drafter = unpaced(self.drafter)
        if isinstance(drafter, FlashDrafter | StepwiseDrafter):
            gathered = drafter.head_bytes if isinstance(drafter, FlashDrafter) else 0
            return num_bytes(drafter.model) + gathered
        return 0

    def num_latents(self, prompt: Prompt) -> int:
        """Latents that the drafter reads in place of a prompt's visual tokens."""
        return num_latents(self.drafter, prompt)


def num_latents(drafter: Drafter[Any] | None, prompt: Prompt) -> int:
    """Return the rows that a drafter reads in place of a prompt's visual ones."""
    drafter = unpaced(drafter)
    if isinstance(drafter, StepwiseDrafter):
        return len(prompt.image_spans) * max(0, drafter.model.config.num_queries - 1)
    if not isinstance(drafter, FlashDrafter):
        return 0
    config = drafter.model.config
    if config.reads_whole_images:
        return prompt.num_visual_tokens
    return len(prompt.merged_spans(config.video_groups)) * config.num_latents


def load(
    model: str | Path = "demo",
    draft: str | Path = "auto",
    *,
    draft_block_size: int | None = None,
    drafting: Drafting = "tree",
    dtype: mx.Dtype | None = None,
    keep_quantized: bool = False,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    max_pixels: int | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Model:
    """Load a target and its drafter.

    Args:
        model: `demo`, a folder or a hub id.
        draft: `auto` takes the demo's drafter for the demo, else the registered one of the target
            (see `registry`), else `ngram`; `ngram` looks
            drafts up in the text so far; `none` decodes plainly; else a folder or a hub id.
        draft_block_size: Tokens to draft in each pass; None: as many as pay.
        drafting: How much is drafted if `draft_block_size` is None.
        dtype: What the target computes in; None chooses what is fast here.
        keep_quantized: Leave the quantised weights of both quantised on a CPU too, where they are
            slow and would become float32.
        kv_bits: Bits of a number in the target's cache, from its first row on; None keeps the type
            that the target computes in.
        kv_group_size: Numbers of the cache that share a scale.
        max_pixels: Most pixels of a picture after the processor has resized it; for families whose
            processor can be told.
        revision: Branch, tag or commit of the target's hub id.
        force: Download even if disk or memory seem too small.

    Returns:
        The model.

    Raises:
        OSError: A folder or file is missing, or `FLASH_MLX_BLAS` names no usable library.
        ValueError: A checkpoint is damaged, or the drafter was trained for another target.
    """
    blas.require()
    name = str(model)
    is_demo = name == "demo"
    path = _demo("target") if is_demo else resolve_path(name, revision, force=force)
    chosen = _choose(
        draft, name, path, is_demo=is_demo, force=force
    )  # before the target loads: fails soon
    loaded = load_target(
        path,
        dtype=dtype,
        keep_quantized=keep_quantized,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        max_pixels=max_pixels,
    )
    bare = Model(loaded, None, name, "none", "none", is_demo)
    return _attach(bare, chosen, draft_block_size, drafting)


def demo_pictures() -> tuple[Path, ...]:
    """Return the bundled pictures: scenes that the demo was not trained on."""
    return tuple(sorted((DEMO / "pictures").glob("*.png")))


def with_drafter(
    model: Model,
    draft: str | Path = "auto",
    *,
    draft_block_size: int | None = None,
    drafting: Drafting = "tree",
) -> Model:
    """Return the same target with another drafter.

    Args:
        model: From `load`; it stays as it is.
        draft: As for `load`.
        draft_block_size: As for `load`.
        drafting: As for `load`.

    Raises:
        OSError: A folder or file is missing.
        ValueError: The drafter is damaged or was trained for another target.
    """
    chosen = _choose(draft, model.name, model.loaded.path, is_demo=model.is_demo)
    return _attach(model, chosen, draft_block_size, drafting)


def _choose(
    draft: str | Path, target: str, path: Path, *, is_demo: bool, force: bool = False
) -> Choice:
    """Find the drafter that is asked for.

    Args:
        draft: As for `load`.
        target: The target's name.
        path: Its folder.
        is_demo: Whether it is the demo.
        force: As for `load`.
    """
    name = str(draft)
    if name in ("none", "ngram"):
        return Choice(name)
    if name == "demo" or (name == "auto" and is_demo):
        return Choice("demo", _demo("drafter"), "the bundled demo has its own drafter")
    if name != "auto":
        return Choice(name, resolve_path(name, force=force))
    return registry.choose(target, path, force=force)


def _attach(model: Model, chosen: Choice, block_size: int | None, drafting: Drafting) -> Model:
    name, folder = chosen.name, chosen.folder
    plain = untapped(model.loaded)
    drafter: Drafter[Any] | None = None
    kind = name if folder is None else ""
    if folder is not None:
        facts = facts_of(plain)
        trained = load_drafter(
            folder,
            plain.target,
            block_size,
            replace(facts, trees=facts.trees and drafting != "chain"),
            keep_quantized=plain.keep_quantized,
        )
        drafter, kind = trained, kind_of(trained.model)
    elif name == "ngram":
        drafter = NgramDrafter(block_size)
    loaded = read_by(drafter, plain)
    if block_size is None and drafting != "fixed" and drafter is not None:
        drafter = _paced(loaded, None if name == "ngram" else drafter, trees=drafting == "tree")
    return replace(
        model,
        loaded=loaded,
        drafter=drafter,
        draft_name=name,
        draft_kind=kind,
        draft_reason=chosen.reason,
    )


def _paced(loaded: LoadedTarget, drafter: Drafter[Any] | None, *, trees: bool) -> AdaptiveDrafter:
    """Return a drafter that drafts as much as pays on this machine."""
    target = loaded.target
    scratch = partial(scratch_cache, target)
    calibrator = Calibrator(target, scratch, target.model, drafter, more=target.costs_key)
    trees = trees and target.supports_tree
    return paced(drafter, calibrator.costs, lookup=NgramDrafter(), trees=trees, memory=Memory())


def read_by(drafter: Drafter[Any] | None, loaded: LoadedTarget) -> LoadedTarget:
    """Return a target that hands out what a drafter reads of it.

    Args:
        drafter: Some drafters read more than the last hidden states.
        loaded: The target; it stays as it is, and shares its weights.

    Raises:
        ValueError: If the target lacks the layers that the drafter reads.
    """
    plain, drafter = untapped(loaded), unpaced(drafter)
    if not isinstance(drafter, FlashDrafter | StepwiseDrafter):
        return plain
    model = drafter.model
    if isinstance(model, FlashModel) and not model.config.taps:
        return plain
    taps = model.taps(plain.target.num_layers)
    return replace(plain, target=TappedTarget(plain.target, taps, hidden=model.needs_hidden))


def untapped(loaded: LoadedTarget) -> LoadedTarget:
    """Return the target as it was loaded."""
    target = loaded.target
    return replace(loaded, target=target.plain) if isinstance(target, TappedTarget) else loaded


def facts_of(loaded: LoadedTarget) -> TargetFacts:
    """Return what drafters' notes about their target are held against."""
    text = loaded.config.get("text_config")
    text = text if isinstance(text, Mapping) else {}
    base = text.get("rope_theta", loaded.config.get("rope_theta"))
    return TargetFacts(
        model_type=loaded.model_type,
        rope_base=float(base) if isinstance(base, int | float) else None,
        num_layers=loaded.target.num_layers,
        trees=loaded.target.supports_tree,
    )


def _demo(part: str) -> Path:
    folder = DEMO / part
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The bundled demo must be in {folder}, and it is not. "
            "Install flash-mlx again, or name a model."
        )
    return folder
