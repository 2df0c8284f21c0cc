"""Describe many tiny pictures and print how much memory is used: it must not grow.

python examples/caption_memory.py --count 10000 --folder DIR    # killed, it goes on where it was
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
    parser.add_argument("--folder", type=Path, help="Keeps pictures and captions; default: none.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        draw(folder / "pictures", args.count)
        captions = flash_mlx.caption(
            flash_mlx.load(),
            folder / "pictures",
            output=folder / "out.jsonl",
            resume=True,
            max_tokens=args.max_tokens,
        )
        for number, each in enumerate(captions, start=1):
            if each.error:
                raise SystemExit(f"{each.path}: {each.error}")
            if number % max(args.count // 20, 1) == 0:
                print(
                    f"{number} pictures: {used_megabytes():.1f} MB, at most "
                    f"{peak_megabytes():.1f} MB",
                    flush=True,
                )


def draw(folder: Path, count: int) -> None:
    """Make pictures; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = folder / f"{number:06}.png"
        if file.exists():
            continue
        if number < KINDS:
            rng = np.random.default_rng(number)
            shape = (*rng.integers(8, 64, 2), 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file)
        else:
            file.hardlink_to(folder / f"{number % KINDS:06}.png")


def used_megabytes() -> float:
    """Memory of this process now, where the system says it; else the most that it has had."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return peak_megabytes()
    return int(pages.read_text().split()[1]) * resource.getpagesize() / 1e6


def peak_megabytes() -> float:
    """Most memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    main()
