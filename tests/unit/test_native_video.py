"""Videos as the Qwen families read them: rows, positions, times, ids, and what drafters see."""

import json
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from clip_files import noise, write_frames
from flash_mlx.cli import run as run_command
from flash_mlx.decode import NoDrafter
from flash_mlx.draft import FlashConfig, FlashModel
from flash_mlx.draft.drafter import FlashDrafter
from flash_mlx.generate import generate, load
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.session import Session
from flash_mlx.targets import LoadedTarget, load_target
from flash_mlx.targets.videos import merge_videos, mrope_positions
from flash_mlx.tree import Topology
from flash_mlx.verify import greedy_text
from flash_mlx.video import Video
from identity import CorruptedOracle, run
from passes import TREE, after, assert_same, one_by_one, random_tokens, tree_of
from tiny import BUILDERS, random_image

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
REAL = Path(__file__).parents[3] / "shared/data"
IMAGE, VIDEO = 8, 9  # ids of visual rows, where a test chooses them


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames, four a second."""
    return write_frames(tmp_path_factory.mktemp("clips") / "clip.mp4", noise(8), fps=4)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LoadedTarget:
    folder = tmp_path_factory.mktemp("native") / request.param
    return load_target(BUILDERS[request.param](folder))


def mlx_vlms(
    loaded: LoadedTarget,
    file: Path,
    fps: float,
    most: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> list[int]:
    """Ids of mlx-vlm, which reads the file itself."""
    from mlx_vlm import stream_generate
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = loaded.target.model, loaded.processor
    written = apply_chat_template(processor, model.config, "What?", video=[str(file)])
    monkeypatch.setattr(processor.tokenizer.stopping_criteria, "eos_token_ids", [])
    responses = stream_generate(
        model,
        processor,
        written,
        video=[str(file)],
        fps=fps,
        max_frames=most,
        max_tokens=count,
        temperature=0.0,
    )
    return [response.token for response in responses][:count]


def test_ids_are_those_of_mlx_vlm_on_the_same_file(
    loaded: LoadedTarget, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All eight frames at four a second: in Qwen2.5-VL, too, a step of time is then one position.
    cases = [(clip, 4.0, 8)]
    if loaded.model_type != "qwen2_5_vl":
        cases.append((write_frames(tmp_path / "b.mp4", noise(23, seed=1), fps=7), 2.0, 5))
    for file, fps, most in cases:
        expected = mlx_vlms(loaded, file, fps, most, 32, monkeypatch)
        prompt = make_prompt(loaded, "What?", [Video(file, fps, most)])
        ids, *_ = run(loaded.target, NoDrafter(), prompt, 32)
        assert ids == expected
        assert len(set(ids)) > 3


def mixed(loaded: LoadedTarget, clip: Path) -> Prompt:
    media = [random_image(60, 90), Video(clip, 4, 4), random_image(90, 60, 1), Video(clip, 4, 6)]
    return make_prompt(loaded, "Describe these.", media, digests=True)


def test_pictures_and_videos_keep_their_order(loaded: LoadedTarget, clip: Path) -> None:
    prompt = mixed(loaded, clip)
    kinds = {
        loaded.image_token_id: "picture",
        loaded.family.video_token_id(loaded.config, loaded.processor.tokenizer): "video",
    }
    found = [{kinds.get(t) for t in prompt.tokens[a:b]} for a, b in prompt.image_spans]
    assert found == [{"picture"}, *[{"video"}] * 2, {"picture"}, *[{"video"}] * 3]
    assert prompt.videos == ((1, 3), (4, 7))
    assert len(set(prompt.image_digests)) == len(prompt.image_digests) == 7
    assert prompt.num_visual_tokens == sum(token in kinds for token in prompt.tokens)

    text = loaded.processor.tokenizer.decode(prompt.tokens)
    times = ["<0.2 seconds>", "<1.5 seconds>"]  # of frames 0 and 2, 5 and 7, four a second
    assert all((time in text) == (loaded.model_type == "qwen3_vl") for time in times)


def test_the_same_frames_at_another_pace_are_something_else(
    loaded: LoadedTarget, clip: Path
) -> None:
    slow = replace(Video(clip, 4, 4).read(pairs=True), rate=1.0)
    first, other = (
        make_prompt(loaded, "?", [each], digests=True) for each in (Video(clip, 4, 4), slow)
    )
    assert set(first.image_digests).isdisjoint(other.image_digests)


def test_what_is_shown_in_another_order_reads_otherwise(loaded: LoadedTarget, clip: Path) -> None:
    def logits(media: list) -> mx.array:
        prompt = make_prompt(loaded, "?", media)
        return loaded.target.prefill(prompt, loaded.target.make_cache()).logits

    picture, video = random_image(112, 84), Video(clip, 4, 4)
    first, other = logits([picture, video]), logits([video, picture])
    assert float(mx.abs(first - other).max()) > 1e-2
    # A picture is two frames that are alike: after it, nothing of the video is lost.
    assert float(mx.abs(first - logits([picture])).max()) > 1e-2


def test_chains_and_trees_say_what_single_passes_say(loaded: LoadedTarget, clip: Path) -> None:
    target, prompt = loaded.target, mixed(loaded, clip)
    tokens = random_tokens(target, len(TREE))
    chain = target.verify(tree_of(Topology.chain(7), tokens), after(target, prompt))
    assert_same(chain, one_by_one(target, prompt, tokens))
    tree = target.verify(tree_of(TREE, tokens), after(target, prompt))
    for path in [(0, 1, 3), (0, 2, 4, 7)]:
        alone = one_by_one(target, prompt, [tokens[row] for row in path])
        rows = mx.array(path)
        assert_same(type(tree)(tree.logits[rows], tree.hidden[rows]), alone)


def test_drafts_change_nothing(loaded: LoadedTarget, clip: Path) -> None:
    prompt = mixed(loaded, clip)
    expected, *_ = run(loaded.target, NoDrafter(), prompt, 60)
    oracle = CorruptedOracle(tuple(expected), TREE, loaded.target.vocab_size)
    ids, accepted, rejected = run(loaded.target, oracle, prompt, 60)
    assert ids == expected
    assert min(accepted, rejected) > 20
    mx.random.seed(0)
    config = FlashConfig(
        hidden_size=loaded.target.hidden_size,
        vocab_size=loaded.target.vocab_size,
        num_latents=4,
        num_heads=2,
        head_dim=16,
        video_groups=1,
    )
    drafter = FlashDrafter(FlashModel(config), loaded.target.embed, loaded.target.lm_head)
    assert list(greedy_text(loaded.target, drafter, prompt, 60).tokens) == expected


def test_text_follows_as_if_one_read_row_by_row(loaded: LoadedTarget, clip: Path) -> None:
    """Chunks of a prompt may end within a frame."""
    prompt = mixed(loaded, clip)
    whole = loaded.target.prefill(prompt, loaded.target.make_cache())
    target = type(loaded.target)(loaded.target.model, loaded.family, chunk_size=7)
    assert_same(target.prefill(prompt, target.make_cache()), whole)


def test_time_passes_in_seconds_under_qwen25(tmp_path: Path) -> None:
    """The published example: 25 positions a second, two frames a patch, one frame a second."""
    tokens = [1, *[IMAGE] * 12, 2, 3]
    positions, delta = mrope_positions(tokens, IMAGE, [(3, 2, 2)], [25 * 2 / 1])
    assert (positions[0, 1:13] - 1).tolist() == [0] * 4 + [50] * 4 + [100] * 4
    assert (positions[1, 1:13] - 1).tolist() == [0, 0, 1, 1] * 3
    assert (positions[2, 1:13] - 1).tolist() == [0, 1, 0, 1] * 3
    assert positions[:, 13:].tolist() == [[102, 103]] * 3
    assert delta == 104 - len(tokens)

    loaded = load_target(BUILDERS["qwen2_5_vl"](tmp_path / "qwen"))
    file = write_frames(tmp_path / "slow.mp4", noise(8), fps=1)  # two positions a second

    def temporal(*videos: Video) -> list[list[int]]:
        prompt = make_prompt(loaded, "?", [random_image(56, 56), *videos])
        found = loaded.target._decoder.read(prompt)
        assert found.rope_delta == int(found.positions.max()) + 1 - len(prompt)
        starts = [start for start, _ in prompt.image_spans]
        times = np.array(found.positions[0, 0])[starts]
        return [np.diff(times[first:stop]).tolist() for first, stop in prompt.videos]

    every, second = Video(file, 1, 8), Video(file, 0.5, 4)
    assert temporal(every) == [[4, 4, 4]]
    assert temporal(second, every) == [[8], [4, 4, 4]]


def test_each_video_keeps_its_own_patches_and_frames(clip: Path) -> None:
    assert Video(clip, 0.5, 8).read(pairs=True).numbers == (0, 2, 5, 7)  # four at least

    tokens = [1, IMAGE, 2, VIDEO, VIDEO, 3, IMAGE, VIDEO]
    inputs = {
        "pixel_values": mx.arange(8)[:, None],
        "image_grid_thw": mx.array([[1, 2, 2]] * 2),
        "pixel_values_videos": 100 + mx.arange(12)[:, None],
        "video_grid_thw": mx.array([[2, 2, 2], [1, 2, 2]]),
        "video_fps": mx.array([1.0, 2.0]),
    }
    ids, merged, rates = merge_videos(tokens, inputs, IMAGE, VIDEO)
    assert ids == (1, IMAGE, 2, IMAGE, IMAGE, 3, IMAGE, IMAGE)
    expected = [*range(4), *range(100, 108), *range(4, 8), *range(108, 112)]
    assert merged["pixel_values"][:, 0].tolist() == expected
    assert merged["image_grid_thw"].tolist() == [[1, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]
    assert rates == [0, 1, 0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_positions_are_mlx_vlms_where_time_is_counted(loaded: LoadedTarget, seed: int) -> None:
    if loaded.model_type == "qwen3_vl":
        pytest.skip("mlx-vlm's own positions are used")
    rng = np.random.default_rng(seed)
    config, image = loaded.target.model.config, loaded.image_token_id
    tokens, grids = rng.integers(0, 50, 3).tolist(), []
    for _ in range(3):
        grid = rng.integers(1, 5, 3)
        grids.append(grid.tolist())
        tokens += [config.vision_start_token_id, *[image] * int(grid.prod())]
        tokens += rng.integers(0, 50, rng.integers(1, 4)).tolist()
    ours, delta = mrope_positions(tokens, image, grids, [1.0] * 3)
    patches = mx.array([[t, 2 * lines, 2 * columns] for t, lines, columns in grids])
    theirs, their_delta = loaded.target.model.language_model.get_rope_index(
        mx.array([tokens]), patches
    )
    np.testing.assert_array_equal(ours, np.array(theirs)[:, 0])
    assert delta == int(their_delta.item())


def test_short_and_odd_videos(loaded: LoadedTarget, tmp_path: Path) -> None:
    for count, most, frames in ((1, 8, 1), (2, 1, 1), (3, 8, 1), (5, 8, 2)):
        file = write_frames(tmp_path / f"{count}.mp4", noise(count), fps=2)
        prompt = make_prompt(loaded, "?", [Video(file, 2, most)])
        assert prompt.videos == ((0, frames),)
        logits = loaded.target.prefill(prompt, loaded.target.make_cache()).logits
        assert bool(mx.isfinite(logits).all())


def test_a_conversation_keeps_its_video(loaded: LoadedTarget, clip: Path, tmp_path: Path) -> None:
    model = load(loaded.path)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    session = Session(model)
    settings = {"max_tokens": 8, "temperature": 0.0}
    session.ask("What is this?", Video(copy, 4, 4), **settings)
    copy.unlink()
    answer = session.ask("And then?", **settings)
    assert answer.kept_tokens > session.messages[0].images[0].total


def test_the_command_shows_them_in_the_order_of_its_options(
    loaded: LoadedTarget, clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    random_image(60, 90).save(picture)
    words = ["generate", "--model", str(loaded.path), "--draft-model", "none", "--temp", "0"]
    words += ["--json", "--max-tokens", "6", "--prompt", "?", "--max-frames", "4", "--fps", "4"]
    video = Video(clip, 4, 4)
    model, texts = load(loaded.path), []
    for media, options in (
        ([video, str(picture), video], ["--video", clip, "--image", picture, f"--video={clip}"]),
        ([video, video, str(picture)], ["--video", clip, clip, "--image", picture]),
    ):
        expected = generate(model, "?", media, max_tokens=6, temperature=0.0)
        assert run_command([*words, *map(str, options)]) == 0
        said = json.loads(capfd.readouterr().out)
        assert said["token_ids"] == list(expected.token_ids)
        assert said["visual_tokens"] == expected.visual_tokens
        texts.append(said["token_ids"])
    assert texts[0] != texts[1]


REAL_FILES = {
    "qwen2_vl": "qwen2-vl-7b-olmocr",
    "qwen2_5_vl": "qwen2.5-vl-7b",
    "qwen3_vl": "qwen3-vl-cosmos-reason2",
}


def test_published_templates_and_settings_take_real_clips(
    loaded: LoadedTarget, tmp_path: Path
) -> None:
    """Rows by the published rule: sides are multiples of 28 or 32, two frames a temporal patch."""
    from mlx_vlm.utils import load_processor

    source = REAL / "configs" / REAL_FILES[loaded.model_type]
    if not source.is_dir():
        pytest.skip("needs the shared test data")
    folder = BUILDERS[loaded.model_type](tmp_path / "real")
    for file in (
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "chat_template.json",
    ):
        if (source / file).is_file():
            (folder / file).write_bytes((source / file).read_bytes())
    published = replace(loaded, processor=load_processor(folder, True, trust_remote_code=False))
    side = 32 if loaded.model_type == "qwen3_vl" else 28
    sizes = {"video_llama/boat.mp4": (592, 336), "qwen3vl_demo/v_rBMQFpHspmo.mp4": (398, 224)}
    for name, (width, height) in sizes.items():
        video = Video(REAL / "video" / name, 1, 6)
        prompt = make_prompt(published, "What happens?", [video])
        rows = round(width / side) * round(height / side)
        assert [stop - start for start, stop in prompt.image_spans] == [rows] * 3
        text = published.processor.tokenizer.decode(prompt.tokens)
        assert text.count("<|vision_start|>") == (3 if loaded.family.timed else 1)
