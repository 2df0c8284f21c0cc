"""Pictures of every kind, prompts, and text from ids."""

import io
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from flash_mlx.images import MAX_PIXELS
from flash_mlx.processing import Detokenizer, image_spans, load_image, make_prompt
from flash_mlx.targets import LoadedTarget, load_target
from tiny import edit_json, random_image

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files_bytes_and_images_become_rgb(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"picture.{kind.lower()}"
    file.write_bytes(saved(Image.new("RGB", (30, 20), RED), kind))
    for source in (file, str(file), file.read_bytes(), Image.open(file)):
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", (30, 20))
        assert np.abs(np.array(pixel(image)) - RED).max() <= 3


def test_an_image_in_memory_is_copied() -> None:
    source = Image.new("RGB", (4, 4), RED)
    image = load_image(source)
    source.paste(BLUE, (0, 0, 4, 4))
    assert pixel(image) == RED


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_keeps_its_colour(mode: str) -> None:
    white = Image.new("RGB", (9, 7), WHITE)
    image = load_image(white.convert("L").convert(mode) if mode == "LA" else white.convert(mode))
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 250


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert pixel(load_image(clear)) == WHITE
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert pixel(load_image(half)) == (127, 127, 127)
    assert pixel(load_image(Image.new("LA", (4, 4), (0, 0)))) == WHITE
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(load_image(saved(palette, "PNG", transparency=1))) == WHITE
    assert pixel(load_image(saved(palette, "PNG"))) == RED
    keyed = saved(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED)
    assert pixel(load_image(keyed)) == WHITE


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    steps = np.linspace(0, 65535, 256).round().astype(np.uint16)
    for array in (steps, steps.astype(">u2"), steps.astype(np.int32)):
        image = Image.fromarray(np.tile(array, (4, 1)))
        for source in (image, saved(image, "PNG") if image.mode == "I;16" else image):
            assert np.array_equal(np.asarray(load_image(source))[0, :, 0], np.arange(256))
    grey = Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    assert pixel(load_image(grey)) == pixel(load_image(saved(grey, "PNG"))) == (128, 128, 128)
    for scale in (1.0, 255.0, 40_000.0):
        image = Image.fromarray(np.linspace(0, scale, 256, dtype=np.float32)[None])
        assert np.array_equal(np.asarray(load_image(image))[0, :, 0], np.arange(256))
    odd = Image.fromarray(np.array([[np.nan, -1, 0.5, 1]], dtype=np.float32))
    assert np.asarray(load_image(odd))[0, :, 0].tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert pixel(load_image(data), 4, 4)[0] > 250
    assert pixel(load_image(data), 4, 4)[2] < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(orientation: int) -> None:
    upright = Image.new("RGB", (24, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in turns.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(saved(stored, "PNG", exif=exif))
    assert image.size == (24, 16)
    assert pixel(image, 2, 2) == RED
    assert load_image(image).tobytes() == image.tobytes()


@pytest.mark.filterwarnings("error")
def test_unreadable_exif_says_nothing() -> None:
    data = saved(
        Image.new("RGB", (24, 16), RED), "JPEG", exif=b"Exif\0\0MM\0*garbage" + b"\xff" * 40
    )
    assert load_image(data).size == (24, 16)


@pytest.mark.parametrize("size", [(1, 1), (4800, 3203), (40, 1600), (1600, 40), (1, 40)])
def test_unusual_sizes_load(size: tuple[int, int]) -> None:
    assert load_image(saved(Image.new("RGB", size, RED), "JPEG")).size == size


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jpg does not exist"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="device or a pipe"):
        load_image(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"just text", "it is none"),
        (b"\x89PNG\r\n\x1a\n", "none|damaged"),
        (b"GIF89a", "none|damaged"),
        (b"%PDF-1.7\n%\xe2\xe3", "it is none"),
    ],
)
def test_what_is_no_picture_is_said(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.jpg"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        load_image(file)
    assert "\n" not in str(info.value)
    assert "picture.jpg" in str(info.value)
    with pytest.raises(ValueError, match=message):
        load_image(content)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.97])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("BMP", {}),
    ],
)
def test_a_truncated_picture_is_an_error_and_never_filled_with_grey(
    kind: str, options: dict[str, object], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as another library may have
    data = saved(random_image(160, 120), kind, **options)
    with pytest.raises(ValueError, match="must be a"):
        load_image(data[: int(len(data) * share)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]))
def test_damaged_bytes_give_a_picture_or_one_clear_error(data: st.DataObject, kind: str) -> None:
    content = bytearray(saved(random_image(24, 18), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        assert load_image(bytes(content)).mode == "RGB"


def huge_png(side: int) -> bytes:
    """The header of a picture of `side` x `side` pixels, and the data of one."""
    content = saved(Image.new("1", (1, 1)), "PNG")
    start = content.index(b"IHDR")
    header = b"IHDR" + struct.pack(">II", side, side) + content[start + 12 : start + 17]
    checksum = struct.pack(">I", zlib.crc32(header))
    return content[:start] + header + checksum + content[start + 21 :]


def in_an_icon(picture: bytes) -> bytes:
    """A macOS icon that calls itself 1024 x 1024; the picture in it is found when it is decoded."""
    entry = b"ic10" + struct.pack(">I", 8 + len(picture)) + picture
    return b"icns" + struct.pack(">I", 8 + len(entry)) + entry


@pytest.mark.parametrize("wrap", [bytes, in_an_icon])
@pytest.mark.parametrize("side", [14_000, 60_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(
    side: int, wrap: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for threshold in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", threshold)
        with pytest.raises(ValueError, match=f"at most {MAX_PIXELS} pixels"):
            load_image(wrap(huge_png(side)))
        assert threshold == Image.MAX_IMAGE_PIXELS


def test_a_format_that_another_program_would_draw_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program ran"))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match=r"it is EPS, .* Save it as PNG"):
        load_image(content)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="must have pixels; it is 0 x 5"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("num_images", [0, 1, 2, 3])
def test_the_template_is_the_one_of_the_checkpoint(loaded: LoadedTarget, num_images: int) -> None:
    from mlx_vlm.prompt_utils import apply_chat_template

    images = [random_image(60 + 30 * i, 90, seed=i) for i in range(num_images)]
    written = apply_chat_template(
        loaded.processor, loaded.target.model.config, "Compare.", num_images=num_images
    )
    arrays = loaded.processor(text=[written], images=images or None)
    prompt = make_prompt(loaded, "Compare.", images)
    assert prompt.tokens == tuple(arrays["input_ids"][0].tolist())
    assert len(prompt.image_spans) == num_images
    rows = [row for start, stop in prompt.image_spans for row in range(start, stop)]
    visual = [row for row, token in enumerate(prompt.tokens) if token == loaded.image_token_id]
    assert rows == visual
    names = {0: set(), 1: {"pixel_values"}}[min(num_images, 1)]
    if num_images and loaded.model_type == "qwen2_5_vl":
        names = names | {"image_grid_thw"}
    assert set(prompt.inputs) == names


def test_rows_follow_the_image_under_qwen_only(llava: LoadedTarget, qwen: LoadedTarget) -> None:
    images = [random_image(56, 56), random_image(280, 28)]
    sizes = [
        [stop - start for start, stop in make_prompt(loaded, "?", images).image_spans]
        for loaded in (llava, qwen)
    ]
    assert sizes == [[16, 16], [4, 10]]


def test_a_system_message_comes_first(loaded: LoadedTarget) -> None:
    plain = make_prompt(loaded, "What?")
    prompt = make_prompt(loaded, "What?", system="Be brief.")
    text = loaded.processor.tokenizer.decode(prompt.tokens)
    assert text.index("Be brief.") < text.index("What?")
    assert prompt.tokens != plain.tokens


def test_files_can_be_given_as_images(loaded: LoadedTarget, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    random_image().save(file)
    prompt = make_prompt(loaded, "What?", [file])
    assert prompt.tokens == make_prompt(loaded, "What?", [random_image()]).tokens
    with pytest.raises(FileNotFoundError):
        make_prompt(loaded, "What?", [tmp_path / "none.png"])


def test_a_placeholder_in_the_text_is_refused(llava: LoadedTarget, qwen: LoadedTarget) -> None:
    for loaded, placeholders in (
        (llava, ["<image>"]),
        (qwen, ["<|image_pad|>", "<|video_pad|>", "<|placeholder|>"]),
    ):
        for placeholder in placeholders:
            with pytest.raises(ValueError, match="stands for a picture"):
                make_prompt(loaded, f"What does {placeholder} mean?")
            with pytest.raises(ValueError, match="stands for a picture"):
                make_prompt(loaded, "What?", [random_image()], system=placeholder)
    assert make_prompt(qwen, "What does <image> mean?")


def test_text_that_is_no_unicode_is_refused(loaded: LoadedTarget) -> None:
    with pytest.raises(ValueError, match="valid Unicode"):
        make_prompt(loaded, os.fsdecode(b"caf\xe9"))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (40, 1600), (1600, 40), (1, 40), (200, 1)])
def test_unusual_images_are_read(loaded: LoadedTarget, size: tuple[int, int]) -> None:
    prompt = make_prompt(loaded, "What?", [Image.new("RGB", size, RED)])
    out = loaded.target.prefill(prompt, loaded.target.make_cache())
    assert bool(mx.all(mx.isfinite(out.logits)))
    if loaded.model_type == "llava":
        square = make_prompt(loaded, "What?", [Image.new("RGB", (56, 56), RED)])
        assert mx.allclose(prompt.inputs["pixel_values"], square.inputs["pixel_values"], atol=1e-5)


def test_thinner_strips_are_refused(loaded: LoadedTarget) -> None:
    images = [random_image(), Image.new("RGB", (3, 601), RED)]
    with pytest.raises(ValueError, match=r"at most 200 times .* image 2 is 3 x 601"):
        make_prompt(loaded, "What?", images)


def test_a_prompt_beyond_the_context_is_refused(llava: LoadedTarget) -> None:
    with pytest.raises(ValueError, match=r"context of 2048 tokens; it has \d+, 16 of them"):
        make_prompt(llava, "red circle " * 600, [random_image()])


def test_a_template_that_refuses_is_quoted(tiny_llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    edit_json(
        folder, "chat_template.json", chat_template="{{ raise_exception('no system message') }}"
    )
    with pytest.raises(ValueError, match="no system message"):
        make_prompt(load_target(folder), "What?", system="Be brief.")


def test_a_template_that_loses_images_is_an_error(tiny_llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    edit_json(folder, "chat_template.json", chat_template="{{ 'USER: <image> ASSISTANT:' }}")
    loaded = load_target(folder)
    assert len(make_prompt(loaded, "What?", [random_image()]).image_spans) == 1
    for images in ([], [random_image()] * 2):
        with pytest.raises(ValueError, match="do not fit its model"):
            make_prompt(loaded, "What?", images)


def test_a_processor_that_disagrees_with_the_model_is_an_error(
    tiny_llava: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    edit_json(folder, "processor_config.json", patch_size=7)
    with pytest.raises(ValueError, match="1 images with 16 rows"):
        make_prompt(load_target(folder), "What?", [random_image()])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_spans_are_found_wherever_images_stand(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=4))
    tokens: list[int] = []
    expected = []
    for text, rows in parts:
        tokens += [1] * text
        expected.append((len(tokens), len(tokens) + rows))
        tokens += [9] * rows
    tokens += [2] * data.draw(st.integers(0, 2))
    rows_per_image = [rows for _, rows in parts]
    assert image_spans(tokens, {9}, rows_per_image) == tuple(expected)
    with pytest.raises(ValueError, match="do not fit its model"):
        image_spans([*tokens, 3, 9], {9}, rows_per_image)


def test_an_image_in_two_pieces_is_an_error() -> None:
    with pytest.raises(ValueError, match="each in one piece"):
        image_spans([9, 1, 9, 9, 9], {9}, [2, 2])


WORDS = ["a", "é", " 日本", "語", "😀", " the", "\n", "  ", "ﬁ", " red", "👩‍👩‍👧", "."]


@settings(max_examples=80, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=25), data=st.data())
def test_pieces_of_text_join_to_the_whole(
    llava: LoadedTarget, words: list[str], data: st.DataObject
) -> None:
    for tokenizer in (llava.processor.tokenizer, sentencepiece_like()):
        ids = tokenizer.encode("".join(words), add_special_tokens=False)
        detokenizer = Detokenizer(Holder(tokenizer))
        pieces, rest = [], list(ids)
        while rest:
            size = data.draw(st.integers(1, 4))
            pieces.append(detokenizer.add(rest[:size]))
            rest = rest[size:]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 260), max_size=40))
def test_bytes_that_are_no_text_do_no_harm(llava: LoadedTarget, ids: list[int]) -> None:
    tokenizer = llava.processor.tokenizer
    detokenizer = Detokenizer(Holder(tokenizer))
    assert detokenizer.add(ids) + detokenizer.finish() == tokenizer.decode(ids)
    detokenizer = Detokenizer(Holder(sentencepiece_like()))
    assert isinstance(detokenizer.add(ids) + detokenizer.finish(), str)


def test_special_tokens_do_not_show_and_characters_come_out_whole(llava: LoadedTarget) -> None:
    tokenizer = llava.processor.tokenizer
    ids = tokenizer.encode("red 語", add_special_tokens=False)
    detokenizer = Detokenizer(llava.processor)
    pieces = [detokenizer.add([token]) for token in [*ids, *llava.eos_ids, *ids[-3:]]]
    assert "".join(pieces) == "red 語語"
    assert pieces[-3:] == ["", "", "語"]
    detokenizer.add(ids[:-1])
    assert detokenizer.finish().endswith("\ufffd")
    assert detokenizer.finish() == ""


class Holder:
    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer with byte fallback that marks spaces, like LLaVA-1.5's."""
    words = ["▁", "▁the", "▁red", "the", "red", "a", "é", "\n", ".", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
