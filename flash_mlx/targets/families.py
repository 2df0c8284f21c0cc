"""What differs between the model families that flash-mlx has been verified on.

A family is a row of a table, not a class: the forward passes are mlx-vlm's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flash_mlx.targets import anyres, fastvlm
from flash_mlx.targets.rows import (
    Inputs,
    Read,
    fixed_rows,
    llava_rows,
    patch_rows,
    piece_rows,
    qwen_frame_rows,
    qwen_rows,
    tiled_rows,
)

QWEN_PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>", "<|placeholder|>")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` of mlx-vlm is read.

    Attributes:
        model_type: As in `config.json`.
        image_token: Keys in `config.json` of the id that stands for one visual row, and what is
            taken where all are missing: an id, one counted from the end of the vocabulary (below
            0), or a token of the tokenizer.
        placeholders: Strings that the processor or tokenizer turns into visual rows.
        rows_per_image: From what the processor returned to [I] visual rows.
        mrope: Whether positions are three-dimensional (M-RoPE) and passed as `position_ids`;
            otherwise rows are rotated by the cache's offset.
        marks: Whether other rows stand between the visual rows of one image: tiles are announced,
            or rows of patches end with a mark. They belong to the image's span.
        template_as: The model type whose message format mlx-vlm's chat template code takes.
        embeds: Name of the decoder's argument for embeddings.
        flat: Whether the language model is the decoder and its LM head in one.
        sliding: Whether some layers see a window of the last rows only.
        num_images: Fewest and most images of a prompt; None: no limit.
        system: Whether prompts can start with a system message.
        prefix: Whether all rows of the prompt may attend to one another, so that it has to be read
            at once.
        chains_only: Model types of text models whose tree pass may differ from single passes where
            the self-test does not look.
        softcap: From the language model to the bound that its LM head bends logits to, or None.
        placed: The id that the processor returns once an image, for all its rows; None: it
            returns one for each row.
        attends_mask: Whether embedding the prompt needs an attention mask.
        scale: What the decoder multiplies embeddings [..., D] with, itself.
        takes_max_pixels: Whether the processor can be told the most pixels of a picture.
        prepare: From `config.json` and the processor's arrays to arrays that `image_rows` needs.
        image_rows: From the model and the prompt's arrays to visual rows [rows, D], where
            mlx-vlm's own way is not that of the family's authors.
        video_token: As `image_token`, for a visual row of a video; None: the family reads videos
            as pictures, one a frame.
        frame_rows: From what the processor returned to the visual rows of each frame (or of
            frames that the model sees as one) of each video.
        timed: Whether the processor writes down when each frame is seen, and is told it.
    """

    model_type: str
    image_token: tuple[tuple[str, ...], int | str]
    placeholders: tuple[str, ...]
    rows_per_image: Callable[[Read], tuple[int, ...]]
    mrope: bool = False
    marks: bool = False
    template_as: str = ""
    embeds: str = "inputs_embeds"
    flat: bool = False
    sliding: bool = False
    num_images: tuple[int, int | None] = (0, None)
    system: bool = True
    prefix: bool = False
    chains_only: tuple[str, ...] = ()
    softcap: Callable[[Any], float | None] | None = None
    placed: int | None = None
    attends_mask: bool = False
    takes_max_pixels: bool = False
    scale: Callable[[int, mx.Dtype], mx.array] | None = None
    prepare: Callable[[Mapping[str, Any], Inputs], Inputs] | None = None
    image_rows: Callable[[Any, Inputs], mx.array] | None = None
    video_token: tuple[tuple[str, ...], int] | None = None
    frame_rows: Callable[[Read], tuple[tuple[int, ...], ...]] | None = None
    timed: bool = False

    def video_token_id(self, config: Mapping[str, Any], tokenizer: Any) -> int | None:
        """Return the id that stands for one visual row of a video; None if there is none."""
        if self.video_token is None:
            return None
        return _token_id(self.video_token, config, tokenizer)

    def image_token_id(self, config: Mapping[str, Any], tokenizer: Any) -> int:
        """Return the id that stands for one visual row."""
        return _token_id(self.image_token, config, tokenizer)


def _token_id(
    token: tuple[tuple[str, ...], int | str], config: Mapping[str, Any], tokenizer: Any
) -> int:
    keys, default = token
    if isinstance(default, str):
        return int(tokenizer.convert_tokens_to_ids(default))
    if default < 0:
        default += int(config["vocab_size"])
    found = (config[key] for key in keys if config.get(key) is not None)
    return int(next(found, default))


# Families that people will ask for, and why they are refused.
RECURRENT = "has recurrent layers, and their state cannot forget the drafts that are rejected"
REFUSED = {
    "qwen3_5": RECURRENT,
    "qwen3_5_moe": RECURRENT,
    "lfm2_vl": RECURRENT,
    "gemma4": "lets the rows of an image see one another and feeds each layer the ids again, "
    "which chunks and trees do not do yet",
}


def family_of(model_type: object) -> Family:
    """Return the family of a `model_type`.

    Raises:
        ValueError: If flash-mlx does not support it.
    """
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ValueError(
            f"{model_type} {REFUSED[model_type]}. flash-mlx does not support it; use mlx-vlm, or "
            f"one of {', '.join(sorted(FAMILIES))}."
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"The model type must be one of {', '.join(sorted(FAMILIES))}; config.json says "
            f"{model_type!r}. Other families of mlx-vlm are not supported yet."
        )
    return FAMILIES[model_type]


def gemma1_scale(hidden_size: int, dtype: mx.Dtype) -> mx.array:
    """Return the square root of D."""
    return mx.array(hidden_size**0.5, dtype)


def gemma2_softcap(language_model: Any) -> float | None:
    """Return the bound of Gemma 2's logits; Gemma's have none."""
    bound: float | None = language_model.final_logit_softcapping
    return bound if language_model.model_type == "gemma2" else None


def gemma_scale(hidden_size: int, dtype: mx.Dtype) -> mx.array:
    """Return the square root of D, rounded to bfloat16 first as Gemma 3 does."""
    return mx.array(hidden_size**0.5, mx.bfloat16).astype(dtype)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llava",
            image_token=(("image_token_index",), 32000),
            placeholders=("<image>",),
            rows_per_image=llava_rows,
        ),
        Family(
            model_type="llava_next",
            image_token=(("image_token_index",), 32000),
            placeholders=("<image>",),
            rows_per_image=anyres.rows,
            template_as="llava",  # mlx-vlm refuses several images of llava_next
            prepare=anyres.prepare,
            image_rows=anyres.image_rows,
        ),
        Family(
            model_type="llava_onevision",
            image_token=(("image_token_index",), 151646),
            placeholders=("<image>", "<video>"),
            rows_per_image=anyres.rows,
            embeds="input_embeddings",
        ),
        *(
            Family(
                model_type=model_type,
                image_token=(("image_token_id",), 151655),
                placeholders=QWEN_PLACEHOLDERS,
                rows_per_image=qwen_rows,
                mrope=True,
                takes_max_pixels=True,
                video_token=(("video_token_id",), 151656),
                frame_rows=qwen_frame_rows,
                timed=model_type == "qwen3_vl",
            )
            for model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
        ),
        Family(
            model_type="gemma3",
            image_token=(("image_token_index",), 262144),
            placeholders=("<start_of_image>", "<image_soft_token>"),
            rows_per_image=fixed_rows("mm_tokens_per_image", 256),
            sliding=True,
            attends_mask=True,
            scale=gemma_scale,
        ),
        *(
            Family(
                model_type=model_type,
                image_token=(("image_token_index", "image_token_id"), 49153),
                placeholders=("<image>", "<fake_token_around_image>"),
                rows_per_image=tiled_rows,
                marks=True,
                flat=True,
            )
            for model_type in ("idefics3", "smolvlm")
        ),
        Family(
            model_type="internvl_chat",
            image_token=((), "<IMG_CONTEXT>"),
            placeholders=("<image>", "<IMG_CONTEXT>"),
            rows_per_image=piece_rows,
            template_as="llava_qwen2",  # "<image>", a line feed, text: as its authors write it
        ),
        *(
            Family(
                model_type=model_type,
                image_token=(("image_token_index", "image_token_id"), 10),
                placeholders=("[IMG]",),
                rows_per_image=patch_rows,
                marks=True,
                # Far into a text they scale attention by a row's index instead of its position.
                chains_only=("ministral3", "mistral4"),
            )
            for model_type in ("pixtral", "mistral3")
        ),
        Family(
            model_type="paligemma",
            image_token=(("image_token_index",), 257152),
            placeholders=("<image>",),
            rows_per_image=fixed_rows("num_image_tokens", 256),
            num_images=(1, 1),
            system=False,
            prefix=True,
            softcap=gemma2_softcap,
            attends_mask=True,
            scale=gemma1_scale,
        ),
        *(
            Family(
                model_type=model_type,
                image_token=((), -1),  # Qwen2's last rows of the vocabulary are of no token
                placeholders=("<image>",),
                rows_per_image=fastvlm.rows,
                template_as="llava_qwen2",
                embeds="input_embeddings",
                placed=-200,
                image_rows=fastvlm.image_rows,
            )
            for model_type in ("fastvlm", "llava_qwen2")
        ),
    )
}
