"""Describe many tiny pictures and print the most memory used so far: it must not grow.

python examples/caption_memory.py --count 10000
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import flash_mlx
import numpy as np
from PIL import Image

KINDS = 100  # different pictures; the others are links to them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--max-tokens", type=int, default=4)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "pictures")
        folder.mkdir()
        for number in range(args.count):
            file = folder / f"{number:06}.png"
            if number < KINDS:
                shape = (*rng.integers(8, 64, 2), 3)
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file)
            else:
                file.hardlink_to(folder / f"{number % KINDS:06}.png")
        captions = flash_mlx.caption(
            flash_mlx.load(), folder, output=Path(name, "out.jsonl"), max_tokens=args.max_tokens
        )
        for number, each in enumerate(captions, start=1):
            if each.error:
                raise SystemExit(f"{each.path}: {each.error}")
            if number % max(args.count // 10, 1) == 0:
                print(f"{number} pictures, at most {peak_megabytes():.1f} MB", flush=True)


def peak_megabytes() -> float:
    """Most memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    main()
