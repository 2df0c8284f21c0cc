"""Time captions by batch size, drafted and plain, and compare their ids with those of one by one.

python examples/caption_throughput.py --pictures FOLDER --sizes 1 2 4 8
"""

import argparse
import time
from pathlib import Path

import flash_mlx
from flash_mlx.processing import make_prompt
from flash_mlx.throughput import together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model", nargs="+", default=["auto", "none"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()
    files = sorted(args.pictures.glob("*.png"))
    files = (files * args.count)[: args.count]
    expected: list[tuple[int, ...]] = []
    print("drafter, batch size: tokens/s of decoding, texts/minute with prefill, identical")
    for draft in args.draft_model:
        model = flash_mlx.load(args.model, draft)
        prompts = [make_prompt(model.loaded, "Describe the image in detail.", [f]) for f in files]
        for size in args.sizes:
            how = together(model, size, greedy=True)
            decode_together(how, prompts[:size], 4)  # costs are measured here, and caches made
            said, first, whole = decode_together(how, prompts, args.max_tokens)
            expected = expected or said
            same = sum(a == b for a, b in zip(said, expected, strict=True))
            tokens = sum(map(len, said)) - len(said)
            print(
                f"{draft}, {size}: {tokens / (whole - first):.0f}, {60 * len(said) / whole:.0f}, "
                f"{same}/{len(said)}",
                flush=True,
            )


def decode_together(how, prompts, max_tokens):
    """Return the ids of all texts, the time spent on prompts and that on everything [s]."""
    batch, waiting, active = how.batch(), list(enumerate(prompts)), []
    said, prefill, start = {}, 0.0, time.perf_counter()
    while waiting or active:
        while waiting and len(active) < how.size:
            number, prompt = waiting.pop(0)
            answer = flash_mlx.stream_generate(
                how.model,
                prompt,
                max_tokens=max_tokens,
                temperature=0.0,
                seat=None if batch is None else batch.seat(),
            )
            begun = time.perf_counter()
            said[number] = [next(answer)]
            prefill += time.perf_counter() - begun
            active.append((number, answer))
        for each in tuple(active):
            piece = next(each[1], None)
            if piece is None:
                active.remove(each)
            else:
                said[each[0]].append(piece)
    ids = [sum((piece.token_ids for piece in said[n]), ()) for n in sorted(said)]
    return ids, prefill, time.perf_counter() - start


if __name__ == "__main__":
    main()
