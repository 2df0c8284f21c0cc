"""Write held-out scenes as picture files, for the benchmark and the examples.

python make_pictures.py --output runs/pictures --count 40
python make_pictures.py --output ../images --count 8 --first 1000 --scale 3

With `--questions`, rows for `flash-mlx bench --data` lie beside them, one file a family of prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from evaluate import HELD_OUT, held_out_scene
from study_data import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--first", type=int, default=2000, help="index in the reporting split")
    parser.add_argument("--scale", type=int, default=1, help="pixels are repeated this often")
    parser.add_argument("--questions", action="store_true", help="write what to ask, too")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for index in range(args.first, args.first + args.count):
        picture = held_out_scene(index)[1]
        size = (picture.width * args.scale, picture.height * args.scale)
        picture.resize(size, Image.Resampling.NEAREST).save(args.output / f"scene_{index}.png")
    for family, ask in FAMILIES.items() if args.questions else ():
        rows = [
            {"image": f"scene_{index}.png", "question": ask(index, HELD_OUT + index)}
            for index in range(args.first, args.first + args.count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.output / f"{family}s.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
