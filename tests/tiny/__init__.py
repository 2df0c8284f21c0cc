"""Tiny checkpoints with random weights in the layout of the Hugging Face hub.

Built in about a second each, without torch and without network: the configuration, the weights
under their hub names (convolutions as [out, in, ...]), tokenizer, processor and chat template.
Settings and templates are written after the published ones; they are this project's own, since
those families' files cannot be shipped.

Use the session fixtures `tiny_llava` and `tiny_qwen` of `conftest.py` (folders); call the builders
here for a checkpoint that differs from them.
"""

from tiny.common import edit_json, random_image
from tiny.fastvlm import build_fastvlm, small_tower
from tiny.gemma import build_gemma3, build_paligemma
from tiny.idefics import build_idefics3, build_smolvlm
from tiny.internvl import build_internvl
from tiny.llava import build_llava, build_llava_next, build_llava_onevision
from tiny.pixtral import build_mistral3, build_pixtral
from tiny.qwen import build_qwen, build_qwen2, build_qwen3

__all__ = [
    "BUILDERS",
    "build_gemma3",
    "build_llava",
    "build_llava_next",
    "build_mistral3",
    "build_paligemma",
    "build_qwen",
    "edit_json",
    "random_image",
    "small_tower",
]

# By model type.
BUILDERS = {
    "llava": build_llava,
    "llava_next": build_llava_next,
    "llava_onevision": build_llava_onevision,
    "qwen2_vl": build_qwen2,
    "qwen2_5_vl": build_qwen,
    "qwen3_vl": build_qwen3,
    "gemma3": build_gemma3,
    "idefics3": build_idefics3,
    "smolvlm": build_smolvlm,
    "internvl_chat": build_internvl,
    "pixtral": build_pixtral,
    "mistral3": build_mistral3,
    "paligemma": build_paligemma,
    "llava_qwen2": build_fastvlm,
}
