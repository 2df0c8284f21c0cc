"""Video files that are none, or not whole, or very long, given to the real command."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clip_files import noise, write_frames
from commands import command, make_drafter, start

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
REAL = Path(__file__).parents[3] / "shared/data/video/video_llama/dog_barking.mp4"


def without_frames(file: Path) -> None:
    import cv2

    # An AVI, because a writer of MP4 leaves nothing that could be opened.
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    writer.release()


def sound_alone(file: Path) -> None:
    """Hide the first of the two tracks, which holds the pictures."""
    if not REAL.exists():
        pytest.skip("needs a video with sound")
    content = REAL.read_bytes()
    pictures = content.index(b"vide")
    track = content.rindex(b"trak", 0, pictures)
    file.write_bytes(content[:track] + b"free" + content[track + 4 :])


def cut(file: Path) -> None:
    content = write_frames(file, noise(9)).read_bytes()
    file.write_bytes(content[: len(content) // 2])


def cut_late(file: Path) -> None:
    """Frames are missing whose places the file's beginning tells."""
    if not REAL.exists():
        pytest.skip("needs a video whose index comes first")
    content = REAL.read_bytes()
    file.write_bytes(content[: len(content) // 2])


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no frames": ("clip.avi", without_frames, "how many frames it has"),
    "sound alone": ("clip.mp4", sound_alone, "must be a whole video"),
    "cut": ("clip.mp4", cut, "must be a whole video"),
    "cut late": ("clip.mp4", cut_late, "must be a whole video"),
    "no UTF-8": (os.fsdecode(b"caf\xe9.mp4"), cut, "must be a whole video"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_said_in_one_line(kind: str, tmp_path: Path, tiny_llava: Path) -> None:
    name, make, part = BAD[kind]
    make(tmp_path / name)
    words = ["--model", tiny_llava, "--draft-model", "none", "--prompt", "?", "--video"]
    code, out, err = command("generate", *words, tmp_path / name)
    assert (code, out) == (1, b"")
    assert part in err.splitlines()[-1]
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def peak_memory(*words: object) -> float:
    """Run the command; return the most memory that it ever held [bytes]."""
    process = start(*words)
    process.stdin.close()
    said = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_four_hours_take_the_memory_of_four_seconds(tmp_path: Path, tiny_qwen: Path) -> None:
    frames = np.zeros((4, 48, 64, 3), dtype=np.uint8)
    short = write_frames(tmp_path / "short.mp4", frames, fps=1)
    long = write_frames(tmp_path / "long.mp4", np.broadcast_to(frames[:1], (14400, 48, 64, 3)), 1)
    drafter = make_drafter(tmp_path / "drafter")
    words = ["generate", "--model", tiny_qwen, "--draft-model", drafter, "--draft-block-size", "2"]
    words += ["--prompt", "?", "--max-tokens", "2", "--max-frames", "4", "--video"]
    used = [peak_memory(*words, file) for file in (short, long)]
    assert used[1] < used[0] + 40e6  # all frames, decoded, would be 130 MB


def test_a_file_that_says_nothing_of_its_speed_is_read_all_the_same(
    tmp_path: Path, tiny_llava: Path
) -> None:
    import cv2

    file = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (56, 42))
    for frame in noise(5, (56, 42)):
        writer.write(np.ascontiguousarray(frame))
    writer.release()
    content = bytearray(file.read_bytes())
    stream, whole = content.index(b"strh") + 28, content.index(b"avih") + 8
    assert struct.unpack_from("<II", content, stream) == (1, 10)  # seconds, frames
    struct.pack_into("<II", content, stream, 1, 0)
    struct.pack_into("<I", content, whole, 0)
    file.write_bytes(content)
    words = ["--model", tiny_llava, "--draft-model", "none", "--max-tokens", "2", "--prompt", "?"]
    code, out, err = command("generate", *words, "--no-verbose", "--video", file)
    assert code == 0, err
    assert out
