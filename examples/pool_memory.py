"""What pooling an image of many rows takes of memory: at once by the definition, and part by part.

    python examples/pool_memory.py --rows 16384 --size 3584

Peaks are MLX's own, on this machine, above the rows where these are kept. Bytes moved are
counted from the operations: each reads its inputs and writes its outputs once. How long it takes on
a GPU is not measured here; `flash-mlx selftest` measures it on a Mac.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import flash_mlx  # noqa: F401  binds the BLAS, which works only before mlx.core is imported
import mlx.core as mx

from flash_mlx.draft.model import pool
from flash_mlx.draft.reading import PartPool

WIDE, NARROW = 4, 2  # bytes of float32 and float16


def main() -> None:
    """Measure and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--size", type=int, default=3584, help="hidden size")
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=512, help="rows of a part")
    args = parser.parse_args()
    queries = mx.random.normal((args.latents, args.size), scale=args.size**-0.5)
    queries = queries.astype(mx.float16)
    mx.eval(queries)
    starts = range(0, args.rows, args.chunk)

    def part(start: int) -> mx.array:
        count = min(args.chunk, args.rows - start)
        rows = mx.random.normal((count, args.size), key=mx.random.key(start)).astype(mx.float16)
        mx.eval(rows)
        return rows

    def at_once() -> mx.array:
        rows = mx.concatenate([part(start) for start in starts])
        mx.eval(rows)
        mx.clear_cache()
        return measured("at once, by the definition", lambda: pool(queries, rows))

    def in_parts() -> mx.array:
        def run() -> mx.array:
            found = None
            for start in starts:
                new = PartPool.of(queries, part(start))
                found = new if found is None else found.join(new)
                mx.eval(found.largest, found.total, found.rows)
            return found.latents()

        return measured(f"in parts of {args.chunk}, rows included", run)

    rows_bytes = args.rows * args.size * NARROW
    print(f"{args.rows} rows of {args.size}, {args.latents} latents; float16 rows {mb(rows_bytes)}")
    a, b = at_once(), in_parts()
    print(f"The latents differ by {mx.abs(a.astype(mx.float32) - b).max().item():.1e} at most")
    wide = args.rows * args.size * WIDE
    scores = args.rows * args.latents * WIDE
    # A copy is written once and read by both products; softmax reads and writes the scores.
    print(f"moved by the definition: {mb(rows_bytes + 3 * wide + 4 * scores)}")
    print(f"moved by the kernel: {mb(2 * rows_bytes + 2 * scores)}")


def measured(name: str, run: Callable[[], mx.array]) -> mx.array:
    """Print the peak of what `run` allocates; return its result."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = run()
    mx.eval(result)
    print(f"{name}: peak {mb(mx.get_peak_memory() - before)}")
    return result


def mb(size: int) -> str:
    """Return bytes as text."""
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
