"""What a long prompt takes of memory: in one pass, in chunks, and with the drafter reading along.

    python examples/prefill_memory.py --pictures 64

asks the bundled demo, whose layers are small, about that many pictures of 256 visual tokens each,
far more than it was made for: the text would be nonsense, the memory is what it is. Peaks are
MLX's own, above the weights and the pictures' embeddings, in a process that does nothing else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import flash_mlx  # binds the BLAS, which works only before mlx.core is imported
import mlx.core as mx

from flash_mlx.decode import Cache, Output
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.targets import MlxVlmTarget
from flash_mlx.targets.cache import SequenceCache

PICTURE = Path(__file__).parent / "images" / "scene_1005.png"
ROOT = 5  # any token: it follows the prompt


def main() -> None:
    """Measure each way of reading."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=512, help="prompt rows per pass")
    parser.add_argument("--skip-one-pass", action="store_true", help="it takes most")
    args = parser.parse_args()

    model = flash_mlx.load(drafting="fixed")
    loaded, drafter = model.loaded, model.drafter
    loaded.target.max_context = None
    prompt = make_prompt(loaded, "Compare these.", [PICTURE] * args.pictures)
    whole, chunked = (
        MlxVlmTarget(loaded.target.model, loaded.family, chunk_size=size)
        for size in (len(prompt), args.chunk)
    )
    for target in (whole, chunked):
        target.max_context = None

    def all_logits(cache: Cache) -> mx.array:
        out = whole.prefill(prompt, cache)
        return drafter_after(out, whole.lm_head(out.hidden))

    def drafter_after(out: Output, logits: mx.array) -> mx.array:
        mx.eval(logits)
        return drafter.prefill(prompt, out.hidden, ROOT).slots

    def one_pass(cache: Cache) -> mx.array:
        out = whole.prefill(prompt, cache)
        return drafter_after(out, out.logits)

    def in_chunks(cache: Cache) -> mx.array:
        out = chunked.prefill(prompt, cache)
        return drafter_after(out, out.logits)

    def reading_along(cache: Cache) -> mx.array:
        states = [None]
        out = chunked.prefill(
            prompt,
            cache,
            lambda start, rows: states.append(drafter.read(prompt, start, rows, states.pop())),
        )
        mx.eval(out.logits)
        return drafter.extend(out.hidden, (ROOT,), states.pop()).slots

    ways: dict[str, Callable[[Cache], mx.array]] = {
        f"chunks of {args.chunk}, the drafter reads along": reading_along,
        f"chunks of {args.chunk}, then the drafter": in_chunks,
    }
    if not args.skip_one_pass:
        ways |= {"one pass, LM head on the last row": one_pass, "one pass, all logits": all_logits}
    report(prompt, ways, whole)


def report(
    prompt: Prompt, ways: dict[str, Callable[[Cache], mx.array]], target: MlxVlmTarget
) -> None:
    """Print the peak of each way."""
    print(f"{len(prompt)} rows, {prompt.num_visual_tokens} of them visual; peaks above the weights")
    results = []
    for name, read in ways.items():
        mx.clear_cache()
        cache: SequenceCache = target.make_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start = time.perf_counter()
        results.append(read(cache))
        mx.eval(results[-1])
        seconds, peak = time.perf_counter() - start, mx.get_peak_memory() - before
        print(
            f"{name:44} {peak / 1e6:9.1f} MB, keys and values {cache.nbytes / 1e6:.1f} MB, "
            f"{seconds:.1f} s"
        )
        del cache
    apart = max(mx.abs(each - results[0]).max().item() for each in results)
    print(f"The drafter's slots differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
