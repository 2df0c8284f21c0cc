"""Write held-out scenes as picture files, for the benchmark and the examples.

python make_pictures.py --output runs/pictures --count 40
python make_pictures.py --output ../images --count 8 --first 1000 --scale 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from evaluate import held_out_scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--first", type=int, default=2000, help="index in the reporting split")
    parser.add_argument("--scale", type=int, default=1, help="pixels are repeated this often")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for index in range(args.first, args.first + args.count):
        picture = held_out_scene(index)[1]
        size = (picture.width * args.scale, picture.height * args.scale)
        picture.resize(size, Image.Resampling.NEAREST).save(args.output / f"scene_{index}.png")


if __name__ == "__main__":
    main()
