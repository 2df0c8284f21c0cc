"""Published drafters: which kind a checkpoint is, and its settings, by its tensors.

Names of folders say nothing, and `config.json` of a drafter is often a copy of its target's, so
sizes are taken from the tensors wherever they follow from them.

Shapes: see `flash_mlx.draft.decoder` and `flash_mlx.draft.model`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import mlx.core as mx

from flash_mlx.draft import FlashConfig
from flash_mlx.draft.decoder import DecoderConfig

Tensors = Mapping[str, mx.array]
Settings = Mapping[str, object]

BUFFERS = ("rotary_emb.inv_freq",)  # recomputed
PREFIXES = ("module.", "model.")
DEFAULT_BASE = 10000.0
MSD_LLAVA = "LlavaLlamaForCausalLM"  # the class that MSD's LLaVA drafters name


def rename(names: Collection[str]) -> dict[str, str]:
    """Return the name in our layout of each tensor that is kept, by its published name."""
    wanted: dict[str, str] = {}
    eagle3 = any(bare(name) in ("d2t", "midlayer.hidden_norm.weight") for name in names)
    eagle3 = eagle3 or any(bare(name).endswith(".hidden_norm.weight") for name in names)
    for name in names:
        ours = bare(name)
        if ours.endswith(BUFFERS) or ours == "t2d":
            continue
        if eagle3 and ours.startswith("layers.0."):
            ours = "midlayer." + ours.removeprefix("layers.0.")
        wanted[name] = ours
    return wanted


def bare(name: str) -> str:
    """Return a tensor's name without what wrappers put before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def recognise(names: Collection[str], settings: Settings) -> str | None:
    """Return the kind of drafter, or None if it is none.

    Args:
        names: Of its tensors, as published.
        settings: Its `config.json`.
    """
    known = set(rename(names).values())
    if {"A", "residual_gate"} <= known:
        return "flash"
    if "imadpt.q" in known:
        return "vispec"
    if "d2t" in known or "midlayer.self_attn.q_proj.weight" in known:
        return "eagle3"
    if not {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= known:
        return None
    architectures = settings.get("architectures")
    by_name = isinstance(architectures, list) and MSD_LLAVA in architectures
    return "msd" if by_name or "layers.0.input_layernorm.weight" in known else "eagle"


def make_config(
    kind: str, tensors: Tensors, settings: Settings, *, own_embedding: bool
) -> FlashConfig | DecoderConfig:
    """Return a drafter's settings.

    Args:
        kind: From `recognise`.
        tensors: In our names.
        settings: Its `config.json`.
        own_embedding: Whether it keeps its own embedding table.

    Raises:
        ValueError: If something is missing or odd.
    """
    try:
        if kind == "flash":
            return _flash(tensors, settings)
        return _decoder(kind, tensors, settings, own_embedding=own_embedding)
    except KeyError as error:
        raise ValueError(
            f"A published drafter of the kind {kind} must have {error.args[0]}; it is missing."
        ) from error


def _flash(tensors: Tensors, settings: Settings) -> FlashConfig:
    """The authors' V-base and V-final."""
    num_slots, size = tensors["layers.slot_embeddings"].shape
    width = tensors["layers.q_proj.weight"].shape[0]
    head_dim = _whole(settings, "sar_head_dim", 128)
    hydra = tensors.get("hydra_projs.0.0.weight")
    table = tensors.get("embed_tokens.weight")
    return FlashConfig(
        hidden_size=size,
        vocab_size=_whole(settings, "vocab_size", 0 if table is None else table.shape[0]),
        block_size=num_slots,
        num_latents=tensors["A"].shape[0],
        num_heads=width // head_dim,
        head_dim=head_dim,
        intermediate_size=tensors["layers.gate_proj.weight"].shape[0],
        fusion_bias="fc_gate.bias" in tensors,
        attention_bias="layers.q_proj.bias" in tensors,
        fuse_pre_image=False,
        hydra_size=0 if hydra is None else hydra.shape[0],
    )


def _decoder(
    kind: str, tensors: Tensors, settings: Settings, *, own_embedding: bool
) -> DecoderConfig:
    _check_rotation(settings)
    prefix = "midlayer" if kind == "eagle3" else "layers.0"
    size, width = tensors["fc.weight"].shape
    queries = tensors[f"{prefix}.self_attn.q_proj.weight"].shape[0]
    keys = tensors[f"{prefix}.self_attn.k_proj.weight"].shape[0]
    num_heads = _whole(settings, "num_attention_heads", 0)
    if num_heads < 1 or queries % num_heads:
        raise ValueError(
            "A published drafter's config.json must have num_attention_heads that divide the "
            f"{queries} rows of its q_proj; it has {settings.get('num_attention_heads')!r}."
        )
    head_dim = queries // num_heads
    adaptor, offsets = tensors.get("imadpt.q"), tensors.get("d2t")
    base = settings.get("rope_theta")
    eps = settings.get("rms_norm_eps", 1e-6)
    table = tensors.get("embed_tokens.weight")
    return DecoderConfig(
        hidden_size=size,
        vocab_size=_whole(settings, "vocab_size", 0) if table is None else table.shape[0],
        intermediate_size=tensors[f"{prefix}.mlp.gate_proj.weight"].shape[0],
        num_heads=num_heads,
        num_kv_heads=keys // head_dim,
        head_dim=head_dim,
        rms_norm_eps=float(eps) if isinstance(eps, int | float) else 0.0,
        rope_base=float(base) if isinstance(base, int | float) else DEFAULT_BASE,
        attention_bias=f"{prefix}.self_attn.q_proj.bias" in tensors,
        fusion_bias="fc.bias" in tensors,
        input_norm=kind != "eagle3" and f"{prefix}.input_layernorm.weight" in tensors,
        own_embedding=own_embedding,
        num_queries=0 if adaptor is None else adaptor.shape[0],
        draft_vocab_size=0 if offsets is None else offsets.shape[0],
        feature_size=width // 3 if kind == "eagle3" else 0,
    )


def _check_rotation(settings: Settings) -> None:
    """Refuse rotations that are not plain; M-RoPE with one position for all axes is."""
    scaling = settings.get("rope_scaling")
    kind = None
    if isinstance(scaling, Mapping):
        kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in (None, "default", "mrope"):
        raise ValueError(
            f"A published drafter must have plain rotary positions; rope_scaling in its "
            f"config.json is of the type {kind!r}, which flash-mlx does not know for drafters."
        )


def _whole(settings: Settings, name: str, default: int) -> int:
    value = settings.get(name, default)
    return value if isinstance(value, int) else default
