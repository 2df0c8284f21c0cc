"""The demo's tokenizer: byte-level BPE over the grammar's own text, and the chat format.

python tokenizer.py --output runs/tokenizer.json
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from language import conversation
from world import draw_scene

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
PREFIX = "<s>USER: "  # then the picture
VOCABULARY = 1280
_CORPUS_SPLIT = 10_000_000


def question_text(prompt: str) -> str:
    """What follows the picture, up to the answer."""
    return f"\n{prompt}\nASSISTANT:\n"


def next_question_text(prompt: str) -> str:
    """A later question of the same conversation, up to its answer."""
    return f"USER: {prompt}\nASSISTANT:\n"


# Line breaks are written as expressions: Jinja drops one that follows a tag.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ 'ASSISTANT:\\n' }}{% else %}{{ 'USER: ' }}{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:\\n' }}{% endif %}"
)


def train(num_scenes: int = 6000) -> Tokenizer:
    """Train on conversations about scenes that no other stage uses."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = []
    for seed in range(_CORPUS_SPLIT, _CORPUS_SPLIT + num_scenes):
        rng = random.Random(seed)
        scene = draw_scene(rng)
        for kind in ("caption", "brief", "list", "question"):
            prompt, answer = conversation(scene, kind, rng)
            texts.append(question_text(prompt) + answer + "USER: ")
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    train().save(str(args.output))


if __name__ == "__main__":
    main()
