"""Write held-out clips as video files, for the benchmark and the examples.

python make_clips.py --output runs/clips --count 40
flash-mlx generate --video runs/clips/clip_2000.mp4 --prompt "What happens in the video?"

At one frame a second, which is the default, the demo target sees the three moments of a clip.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clips import PER_MOMENT, Clip, draw_clip, film

HELD_OUT = 80_000_000  # reporting; 70 million is for tuning, 60 and 90 million for training


def held_out_clip(index: int) -> Clip:
    """Clip `index` of the reporting split."""
    return draw_clip(random.Random(HELD_OUT + index))


def write_video(file: Path, pictures: NDArray[np.uint8]) -> None:
    """Write pictures [N, S, S, 3] as an MP4.

    Raises:
        OSError: If OpenCV cannot.
    """
    import cv2

    size = (pictures.shape[2], pictures.shape[1])
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), PER_MOMENT, size)
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {file}. Does its folder exist?")
    for picture in pictures:
        writer.write(np.ascontiguousarray(picture[..., ::-1]))
    writer.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--first", type=int, default=2000, help="index in the reporting split")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for index in range(args.first, args.first + args.count):
        pictures = film(held_out_clip(index), HELD_OUT + index)
        write_video(args.output / f"clip_{index}.mp4", pictures)


if __name__ == "__main__":
    main()
