"""What training will take, from the configuration alone: memory, and a projection of the time.

Weights are counted, and so are the arrays of a step (see `memory`). Times are projected from the
chips' published figures; none was measured.

Shapes:
    n: base rows of a batch.    k: slots.    D: hidden size.    V: vocabulary.    T: rows of a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_mlx.draft import FlashConfig, FlashModel
from flash_mlx.draft.decoder import DecoderConfig
from flash_mlx.draft.model import NUM_TAPS
from flash_mlx.sizes import text_settings
from flash_mlx.train.config import TrainConfig
from flash_mlx.train.data import ROUND, round_up
from flash_mlx.train.memory import LOGITS, Sizes, step_arrays
from flash_mlx.train.state import flat

PROMPT_TEXT = 48  # rows of a prompt besides its picture
QWEN_ROWS = 1024  # visual rows of a picture of 896 x 896
# Of the weights' size, after a step's gradient: the gradient as it is and clipped, and the new
# weights, moments and averages beside the old ones.
UPDATED = 5
LOGITS_BYTES = 1 << 30
USABLE = 0.75  # of unified memory, which is what the GPU may take
# Chip: float16 [TFLOP/s], memory [GB/s], as published.
CHIPS = {"M1": (2.6, 68), "M2 Pro": (6.8, 200), "M4": (4.3, 120), "M4 Max": (17.0, 546)}
CHIPS |= {"M3 Ultra": (28.0, 819)}
EFFICIENCY = 0.4  # of the published arithmetic that training is assumed to reach
PER_PASS = 2.0  # tokens per pass that answering is assumed to reach


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        parts: What for -> bytes.
        grows: Those of them that shrink with the batch.
        update: Bytes of the step's end, when logits and activations have gone; what exceeds theirs
            is a part.
        step_flops: Floating-point operations of a step.
        answer_bytes: Bytes read to answer one question, by PER_PASS tokens a pass.
    """

    parts: Mapping[str, int]
    grows: tuple[str, ...]
    update: int
    step_flops: float
    answer_bytes: float

    @property
    def total(self) -> int:
        """Bytes of all parts at the same time."""
        return sum(self.parts.values())

    def hours(self, steps: int, answers: int) -> dict[str, float]:
        """Return chip -> projected hours of that many steps and answers."""
        return {
            chip: (
                steps * self.step_flops / (tera * 1e12 * EFFICIENCY)
                + answers * self.answer_bytes / (giga * 1e9)
            )
            / 3600
            for chip, (tera, giga) in CHIPS.items()
        }


def plan(
    target: Mapping[str, Any],
    drafter: FlashConfig,
    config: TrainConfig,
    *,
    answer_tokens: int,
    hidden_bytes: int,
    num_examples: int,
    float32: bool,
) -> Plan:
    """Estimate a run.

    Args:
        target: The target's `config.json`.
        drafter: Its sizes.
        config: How to train.
        answer_tokens: Tokens of an answer.
        hidden_bytes: Of the target's states that are kept at most [bytes].
        num_examples: Different examples that the run sees.
        float32: Whether the target computes in float32, as on a CPU; else as it is stored.

    Raises:
        ValueError: If the configuration lacks a size.
    """
    try:
        text, vision = _text_weights(target), _vision_weights(target)
        visual = _visual_rows(target)
    except KeyError as error:
        raise ValueError(f"The target's config.json must have {error} for a plan.") from error
    wide = 4.0 if float32 else _bytes_per_weight(target)
    size = 4 if float32 else 2
    weights = sum(w.size for w in flat(FlashModel(drafter).trainable_parameters()).values())
    proposed = drafter.hidden_size * drafter.num_proposed
    num_rows = PROMPT_TEXT + visual + answer_tokens
    taught = config.batch_size * (answer_tokens - 1)
    each = math.ceil((answer_tokens - 1) * config.base_share)
    sizes = Sizes(
        sequences=config.batch_size,
        text=PROMPT_TEXT + answer_tokens - 1,
        compressed=PROMPT_TEXT + drafter.latents_of(visual) + answer_tokens - 1,
        base=config.batch_size * round_up(each, 4),
        chosen=config.batch_size * each,
        taught=taught,
    )
    step = step_arrays(drafter, sizes, config)
    logits, update = step["logits"] + step["the line"], UPDATED * 4 * weights
    read = drafter.hidden_size * (1 + NUM_TAPS * drafter.taps) * size  # of a row of the target
    batch = config.batch_size * round_up(num_rows, ROUND) * read
    if config.hidden_noise:
        batch *= 2
    slots = sizes.chosen * drafter.block_size
    parts = {
        "target": int(text * wide + vision * (4 if float32 else 2)),
        "drafter": weights * (4 + (2 if config.dtype != "float32" else 0))
        + int(proposed * wide) * (drafter.draft_vocab_size > 0),  # copied from the LM head
        "optimiser": weights * (8 if config.optimizer == "adamw" else 4),
        "average": weights * 4,
        "hidden states": batch
        + taught * drafter.hidden_size * size
        + min(hidden_bytes, num_examples * num_rows * read),
        "logits": logits,
        "activations": sum(step.values()) - logits,
        "update": max(update - sum(step.values()), 0),
    }
    flops = 2 * config.batch_size * (num_rows * text + visual * vision)
    flops += 6 * slots * (weights + proposed) * (1 + config.rollout)
    answer = (text * wide) * (answer_tokens / PER_PASS + 1)
    grows = ("activations",) if sizes.chosen > config.chunk else ("activations", "logits")
    return Plan(parts, grows, update, flops * config.accumulate, answer)


def chunk_for(drafter: FlashConfig | DecoderConfig) -> int:
    """Return the base rows whose logits are alive at a time, so that they take about 1 GB."""
    slots = drafter.block_size if isinstance(drafter, FlashConfig) else 1
    num_ids = drafter.num_proposed if isinstance(drafter, FlashConfig) else drafter.vocab_size
    at_once = LOGITS["distribution"] + 1  # and the next one
    rows = LOGITS_BYTES // (4 * at_once * slots * num_ids)
    return max(32, min(TrainConfig.chunk, rows))


def advice(plan: Plan, config: TrainConfig, memory_bytes: float) -> str:
    """Return whether it fits in a machine's memory, and what to change if not."""
    room = memory_bytes * USABLE
    if plan.total <= room:
        return "It fits."
    growing = sum(plan.parts[name] for name in plan.grows)
    step = sum(plan.parts[name] for name in ("logits", "activations", "update"))
    fixed = plan.total - step
    if fixed + plan.update > room:
        return "The target and the drafter alone do not fit: use a target of fewer bits."
    constant = fixed + ("logits" not in plan.grows) * plan.parts["logits"]
    size = math.floor(config.batch_size * (room - constant) / growing)
    if size < 1:
        return "It does not fit even one example at a time: use a target of fewer bits."
    times = math.ceil(config.batch_size * config.accumulate / size)
    return f"It does not fit; --batch-size {size} --accumulate {times} does."


def text_sizes(target: Mapping[str, Any]) -> tuple[int, int]:
    """Return D and V of a target.

    Args:
        target: Its `config.json`.

    Raises:
        ValueError: If it does not say.
    """
    text = text_settings(target)
    try:
        return int(text["hidden_size"]), int(text["vocab_size"])
    except KeyError as error:
        raise ValueError(f"The target's config.json must have {error} for a plan.") from error


def _bytes_per_weight(target: Mapping[str, Any]) -> float:
    quantised = target.get("quantization") or {}
    if "bits" not in quantised:
        return 2.0
    return float(quantised["bits"]) / 8 + 4 / float(quantised["group_size"])


def _text_weights(target: Mapping[str, Any]) -> int:
    text = text_settings(target)
    size, heads = text["hidden_size"], text["num_attention_heads"]
    kv = text.get("num_key_value_heads", heads) * (size // heads)
    layer = 2 * size * size + 2 * size * kv + 3 * size * text["intermediate_size"] + 2 * size
    tables = 1 if text.get("tie_word_embeddings", False) else 2
    return int(text["num_hidden_layers"] * layer + tables * text["vocab_size"] * size)


def _vision_weights(target: Mapping[str, Any]) -> int:
    vision = target["vision_config"]
    text_size = text_settings(target)["hidden_size"]
    if "depth" in vision:  # Qwen: gated MLP, patches of two frames, four of them merged
        size = vision["hidden_size"]
        layer = 4 * size * size + 3 * size * vision["intermediate_size"]
        patch = 6 * vision.get("patch_size", 14) ** 2 * size
        merged = size * vision.get("spatial_merge_size", 2) ** 2
        return int(vision["depth"] * layer + patch + merged * (merged + text_size))
    size = vision["hidden_size"]
    layer = 4 * size * size + 2 * size * vision["intermediate_size"]
    patch = 3 * vision["patch_size"] ** 2 * size
    places = (vision["image_size"] // vision["patch_size"]) ** 2 * size
    projector = size * text_size + text_size * text_size
    return int(vision["num_hidden_layers"] * layer + patch + places + projector)


def _visual_rows(target: Mapping[str, Any]) -> int:
    vision = target["vision_config"]
    if "image_size" not in vision:
        return QWEN_ROWS
    return int((vision["image_size"] // vision["patch_size"]) ** 2)
