r"""Is the demo target's text easier than real captions? Lookup, compression, repetition.

    python text_statistics.py --texts grounding.json --tokenizer DEMO/tokenizer.json \
        --reference MMSPEC_FOLDER --reference-tokenizer LLAVA_TOKENIZER.json

`--texts` is what `evaluate.py --json` wrote. The reference is MMSpec's format: `mmspec.jsonl` with
the prompts and `baseline-LLaVA-1.5-7B.jsonl` with recorded captions. Texts are compared at equal
length, because a compressor does better on longer ones.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import statistics
from pathlib import Path

from tokenizers import Tokenizer

from flash_mlx.draft.ngram import NgramRule, Text

RULE = NgramRule(min_n=2, max_n=3, occurrence="earliest", drafts_per_match=None)  # vLLM's
MAX_DRAFTS = 10


def accepted_per_round(prompt: list[int], answer: list[int]) -> tuple[int, int]:
    """Drafts accepted and rounds, if n-gram lookup drafts this greedy answer."""
    text = Text(RULE, (*prompt, *answer[:1]))
    done, accepted, rounds = 1, 0, 0
    while done < len(answer):
        drafts = text.continuation(MAX_DRAFTS)
        hits = 0
        while (
            hits < len(drafts) and done + hits < len(answer) and drafts[hits] == answer[done + hits]
        ):
            hits += 1
        for token in answer[done : done + hits + 1]:
            text.append(token)
        rounds, accepted, done = rounds + 1, accepted + hits, done + hits + 1
    return accepted, rounds


def bits_per_character(texts: list[str], length: int) -> float:
    """Mean size under xz of consecutive pieces of `length` characters."""
    joined = "\n".join(texts)
    pieces = [joined[i : i + length] for i in range(0, max(1, len(joined) - length + 1), length)]
    return statistics.mean(8 * len(lzma.compress(p.encode(), preset=9)) / len(p) for p in pieces)


def repeated_sentences(texts: list[str]) -> float:
    """Share of sentences that stand earlier in the same text."""
    total = repeated = 0
    for text in texts:
        sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
        total += len(sentences)
        repeated += len(sentences) - len(set(sentences))
    return repeated / total


def summary(
    texts: list[str], prompts: list[str], tokenizer: Tokenizer, length: int
) -> dict[str, float]:
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    pairs = [accepted_per_round(encode(p), encode(t)) for p, t in zip(prompts, texts, strict=True)]
    return {
        "texts": len(texts),
        "tokens_per_text": round(statistics.mean(len(encode(t)) for t in texts), 1),
        "ngram_accepted_per_round": round(sum(a for a, _ in pairs) / sum(r for _, r in pairs), 4),
        "xz_bits_per_character": round(bits_per_character(texts, length), 3),
        "repeated_sentences": round(repeated_sentences(texts), 4),
    }


def recorded_captions(folder: Path) -> tuple[list[str], list[str]]:
    """Prompts and captions of the image captioning topic."""
    rows = (json.loads(line) for line in (folder / "mmspec.jsonl").read_text().splitlines())
    asked = {row["id"]: row["turns"] for row in rows if row["topic"] == "image captioning"}
    prompts, texts = [], []
    for line in (folder / "baseline-LLaVA-1.5-7B.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["question_id"] in asked:
            prompts += asked[row["question_id"]]
            texts += row["choices"][0]["turns"]
    return prompts, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--reference-tokenizer", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = json.loads(args.texts.read_text())["texts"]
    out, length = {}, 4000
    if args.reference:
        prompts, captions = recorded_captions(args.reference)
        length = len("\n".join(captions))
        tokenizer = Tokenizer.from_file(str(args.reference_tokenizer))
        out["recorded_llava_captions"] = summary(captions, prompts, tokenizer, length)
    prompts = ["Describe the image in detail."] * len(texts)
    out["demo"] = summary(texts, prompts, Tokenizer.from_file(str(args.tokenizer)), length)
    print(json.dumps(out, indent=2))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
