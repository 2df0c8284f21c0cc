"""Video files for tests.

Shapes:
    N frames of [height, width, 3] uint8: red, green, blue.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt


def write_frames(file: Path, frames: npt.NDArray[np.uint8], fps: float = 10) -> Path:
    """Write a clip of frames [N, height, width, 3]."""
    import cv2

    plain = file.with_name("plain.mp4")
    size = (frames.shape[2], frames.shape[1])
    writer = cv2.VideoWriter(str(plain), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return plain.replace(file)


def noise(number: int, size: tuple[int, int] = (112, 84), seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return `number` frames of coarse noise, each another."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (number, height // 14, width // 14, 3), dtype=np.uint8)
    return coarse.repeat(14, axis=1).repeat(14, axis=2)
