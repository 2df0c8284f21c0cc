"""Videos as a few frames: the right ones, and clear words about files that are no whole video."""

import json
import os
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_files import write_frames
from flash_mlx.caption import caption
from flash_mlx.cli import run
from flash_mlx.generate import generate, load
from flash_mlx.video import FRAME_PIXELS, load_video
from tiny import random_image

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"  # FFmpeg reads it once, when the first clip is written
REAL = Path(__file__).parents[3] / "shared/data/video/video_llama/boat.mp4"


def write_video(
    file: Path, levels: list[int], fps: float = 10, size: tuple[int, int] = (64, 48)
) -> Path:
    """Write a clip whose frames are red, as bright as `levels` say."""
    frames = np.zeros((len(levels), size[1], size[0], 3), dtype=np.uint8)
    frames[..., 0] = np.array(levels)[:, None, None]
    return write_frames(file, frames, fps)


def reds(frames: list[Image.Image]) -> list[int]:
    pixels = [np.asarray(frame).mean(axis=(0, 1)) for frame in frames]
    assert all(green < 12 and blue < 12 for _, green, blue in pixels)
    return [int(red) for red, _, _ in pixels]


def test_frames_stand_in_the_middle_of_their_shares(tmp_path: Path) -> None:
    levels = list(range(0, 240, 8))
    file = write_video(tmp_path / "clip.mp4", levels)  # 30 frames, 3 s

    everything = reds(load_video(file, fps=100, max_frames=768))
    np.testing.assert_allclose(everything, levels, atol=8)
    assert sorted(set(everything)) == everything

    def taken(**settings: float) -> list[int]:
        return [everything.index(red) for red in reds(load_video(file, **settings))]

    assert taken() == [5, 15, 25]
    assert taken(fps=2) == [2, 7, 12, 17, 22, 27]
    assert taken(fps=2, max_frames=2) == [7, 22]
    assert taken(fps=0.01) == [15]
    for wrong in ({"fps": 0}, {"fps": float("nan")}, {"max_frames": 0}, {"max_frames": 10_000}):
        with pytest.raises(ValueError, match="must"):
            load_video(file, **wrong)


def test_four_hours_are_read_like_four_seconds(tmp_path: Path) -> None:
    file = write_video(
        tmp_path / "long.mp4", [i // 64 for i in range(4 * 3600)], fps=1, size=(32, 32)
    )
    found = reds(load_video(file))
    assert len(found) == 8
    assert found == sorted(found)
    assert found[0] < 30 < 190 < found[-1]


def test_names_and_sizes_of_all_kinds(tmp_path: Path) -> None:
    for name in (os.fsdecode(b"caf\xe9.mp4"), "%03d.mp4", "a:b.mp4"):
        assert len(load_video(write_video(tmp_path / name, [100] * 5))) == 1
    (large,) = load_video(write_video(tmp_path / "large.mp4", [90] * 2, size=(1920, 1080)))
    assert 0.98 * FRAME_PIXELS < large.width * large.height < 1.02 * FRAME_PIXELS
    assert large.width / large.height == pytest.approx(16 / 9, rel=0.01)


def sound(file: Path) -> None:
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(16000))


def half(file: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 40).tolist()
    whole = write_video(file, noise).read_bytes()
    start = whole.index(b"moov") - 4  # the index, which stands last, comes first here
    offset = whole.index(b"mdat")
    assert start > offset
    file.write_bytes(whole[:start])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda file: file.touch(), "empty"),
    "text": (lambda file: file.write_text("no video " * 99), "must be a whole video"),
    "picture": (lambda file: random_image().save(file, format="PNG"), "must be a whole video"),
    "sound": (sound, "must be a whole video"),
    "cut": (half, "must be a whole video"),
    "folder": (lambda file: file.mkdir(), "is none"),
    "missing": (lambda file: None, "is none"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_video_is_one_line(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, part = BAD[kind]
    file = tmp_path / "clip.mp4"
    make(file)
    assert run(["generate", "--model", "/none", "--video", str(file)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert part in err
    assert str(file) in err


def test_a_video_cut_off_in_the_midst_is_an_error(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip("no video whose index comes first")
    content, file = REAL.read_bytes(), tmp_path / "cut.mp4"
    file.write_bytes(content[: len(content) // 2])
    assert len(load_video(REAL, max_frames=2)) == 2
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_video(file, max_frames=4)


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
    ],
)
def test_a_list_of_other_files_is_no_video(tmp_path: Path, content: str) -> None:
    write_video(tmp_path / "secret.mp4", [100] * 5)
    (tmp_path / "list.mp4").write_text(content.format("secret.mp4"))
    before = dict(os.environ)
    with pytest.raises(ValueError, match="must be a whole video"):
        load_video(tmp_path / "list.mp4")
    assert dict(os.environ) == before


def test_commands_read_pictures_and_videos(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    clip = write_video(folder / "clip.mp4", list(range(0, 240, 8)))
    (folder / "cut.mp4").write_bytes(clip.read_bytes()[:2000])
    random_image().save(folder / "picture.png")
    model, settings = load(tiny_llava), {"max_tokens": 4, "temperature": 0.0}
    frames = load_video(clip, fps=1, max_frames=2)
    alone = generate(model, "What?", frames, **settings)
    words = ["--model", str(tiny_llava), "--max-tokens", "4", "--temp", "0", "--prompt", "What?"]
    words += ["--max-frames", "2"]
    assert run(["generate", *words, "--json", "--video", str(clip)]) == 0
    assert json.loads(capfd.readouterr().out)["token_ids"] == list(alone.token_ids)
    said = []  # with a prompt left out, a video is called one
    for asked in ([], ["--prompt", "Describe this video in detail."], ["--prompt", "What?"]):
        named = [*words[:-4], *words[-2:], *asked]
        assert run(["generate", *named, "--json", "--video", str(clip)]) == 0
        said.append(json.loads(capfd.readouterr().out))
    facts = [(each["prompt_tokens"], each["token_ids"]) for each in said]
    assert facts[0] == facts[1] != facts[2]
    both = ["--video", str(clip), str(clip), "--image", str(folder / "picture.png")]
    assert run(["generate", *words, "--json", *both]) == 0
    assert json.loads(capfd.readouterr().out)["visual_tokens"] == 5 * 16
    output = tmp_path / "out.jsonl"
    assert run(["caption", *words, str(folder), "-o", str(output)]) == 0
    first, second, third = map(json.loads, output.read_text().splitlines())
    assert first["text"] == alone.text
    assert "damaged" in second["error"]
    assert third["path"].endswith("picture.png")
    assert [len(row["sha256"]) for row in (first, second, third)] == [64] * 3
    (again,) = caption(model, clip, "What?", max_frames=2, **settings)
    assert again.text == alone.text
    for wrong in (["--fps", "0"], ["--max-frames", "0"]):
        assert run(["generate", "--video", str(clip), *wrong]) == 2
        assert wrong[0] in capfd.readouterr().err
