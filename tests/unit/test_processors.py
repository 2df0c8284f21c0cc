"""Published tokenizers and image processors: golden vectors, golden pixels, and 60 real pictures.

Skipped without the shared test data. Where a family's processor files are not among them, those of
its tiny checkpoint stand in (`REAL` says which are real); the tokenizer is the tiny one everywhere
but for the golden vectors, since it does not matter for the number of rows.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from flash_mlx.processing import Detokenizer, make_prompt
from flash_mlx.targets import FAMILIES, LoadedTarget, MlxVlmTarget
from tiny import BUILDERS, edit_json, small_tower

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CONFIGS, GOLDEN = DATA / "configs", DATA / "golden_vectors"
IMAGES = sorted((DATA / "mmspec" / "images").glob("*.jpg"))

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared test data")

# Families whose image processor's settings are published ones.
REAL = {
    "llava": "llava-1.5-7b-hf",
    "llava_next": "llava-next-lora",
    "qwen2_vl": "qwen2-vl-7b-olmocr",
    "qwen2_5_vl": "qwen2.5-vl-7b",
    "qwen3_vl": "qwen3-vl-cosmos-reason2",
    "gemma3": "gemma3-medgemma-27b",
    "idefics3": "idefics3-granite-docling-258M",
}
# What the settings ask of the model's configuration.
MODELS: dict[str, dict[str, Any]] = {
    "llava": {"image_size": 336},
    "llava_next": {"image_size": 336},
}
LLAVA_NEXT_GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]  # lines, columns
TINY_GRIDS = [(1, 2), (2, 1), (2, 2)]


def qwen(height: int, width: int, side: int, least: int, most: int) -> int:
    """Sides rounded to multiples of `side`, between `least` and `most` pixels."""
    lines, columns = (max(side, round(x / side) * side) for x in (height, width))
    if lines * columns > most:
        shrink = math.sqrt(height * width / most)
        lines, columns = (max(side, math.floor(x / shrink / side) * side) for x in (height, width))
    elif lines * columns < least:
        grow = math.sqrt(least / (height * width))
        lines, columns = (math.ceil(x * grow / side) * side for x in (height, width))
    return lines * columns // side**2


def anyres(
    height: int, width: int, tile: int, grids: list[tuple[int, int]], most: int | None = None
) -> int:
    """The overview, and the patches of the grid that shows most of the picture, less filling."""
    side = tile // 14

    def shown(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[0] * tile / height, grid[1] * tile / width)
        pixels = min(int(height * scale) * int(width * scale), height * width)
        return pixels, pixels - grid[0] * grid[1] * tile**2

    lines, columns = (n * side for n in max(grids, key=shown))
    if width / height > columns / lines:
        lines -= (lines - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * lines / height, 7))) // 2 * 2
    if most is not None and (ratio := math.sqrt(lines * columns / (most * side**2))) > 1.1:
        lines, columns = int(lines // ratio), int(columns // ratio)
    return side**2 + lines * (columns + 1)


def tiles(height: int, width: int, longest: int, tile: int, rows: int) -> int:
    """The longer side becomes `longest`, both whole tiles; one tile more for the whole picture."""
    shape = width / height
    if width >= height:
        height, width = int(longest / shape), longest
        height += height % 2
    else:
        height, width = longest, int(longest * shape)
        width += width % 2
    wide, high = math.ceil(max(width, 1) / tile), math.ceil(max(height, 1) / tile)
    return rows * (wide * high + 1)


def patches(height: int, width: int, longest: int, side: int) -> int:
    ratio = max(height / longest, width / longest, 1)
    return math.prod((math.floor(x / ratio) - 1) // side + 1 for x in (height, width))


def closest(height: int, width: int, tile: int, most: int, rows: int) -> int:
    """The grid closest to the picture's shape; of equals, the one closest to its area."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    grids.sort(key=lambda grid: grid[0] * grid[1])

    def fit(grid: tuple[int, int]) -> tuple[float, float]:
        area = tile**2 * grid[0] * grid[1]
        return abs(width / height - grid[0] / grid[1]), abs(width * height - area)

    columns, lines = min(grids, key=fit)
    return rows * (lines * columns + (lines * columns > 1))


RULES: dict[str, Callable[[int, int], int]] = {
    "llava": lambda h, w: 576,
    "llava_next": lambda h, w: anyres(h, w, 336, LLAVA_NEXT_GRIDS),
    "llava_onevision": lambda h, w: anyres(h, w, 56, [(1, 1), *TINY_GRIDS], 2),
    "qwen2_vl": lambda h, w: qwen(h, w, 28, 3136, 12845056),
    "qwen2_5_vl": lambda h, w: qwen(h, w, 28, 3136, 12845056),
    "qwen3_vl": lambda h, w: qwen(h, w, 32, 65536, 16777216),
    "gemma3": lambda h, w: 256,
    "idefics3": lambda h, w: tiles(h, w, 2048, 512, 64),
    "smolvlm": lambda h, w: tiles(h, w, 112, 56, 4),
    "internvl_chat": lambda h, w: closest(h, w, 56, 4, 4),
    "pixtral": lambda h, w: patches(h, w, 112, 14),
    "mistral3": lambda h, w: patches(h, w, 112, 28),
    "paligemma": lambda h, w: 16,
    "llava_qwen2": lambda h, w: 4,
}


@pytest.fixture(scope="module", params=RULES)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LoadedTarget:
    """A family's processor and configuration; there is no model."""
    from mlx_vlm.utils import load_processor

    name = request.param
    with small_tower():
        folder = BUILDERS[name](tmp_path_factory.mktemp("processor") / name)
    if name in REAL:
        source = CONFIGS / REAL[name]
        settings = json.loads((source / "preprocessor_config.json").read_text())
        for file in ("preprocessor_config.json", "processor_config.json"):
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        config = json.loads((folder / "config.json").read_text())
        vision = {**config["vision_config"], **MODELS.get(name, {})}
        edit_json(folder, "config.json", vision_config=vision, mm_tokens_per_image=256)
        if "image_grid_pinpoints" in settings:
            pinpoints = settings["image_grid_pinpoints"]
            edit_json(folder, "config.json", image_grid_pinpoints=pinpoints)
    config = json.loads((folder / "config.json").read_text())
    processor = load_processor(folder, True, trust_remote_code=False)
    if name == "internvl_chat":
        processor.chat_template = processor.tokenizer.chat_template
    family = FAMILIES[name]
    return LoadedTarget(
        path=folder,
        target=cast(MlxVlmTarget, SimpleNamespace(max_context=None)),
        processor=processor,
        config=config,
        family=family,
        eos_ids=(),
        image_token_id=family.image_token_id(config, processor.tokenizer),
        generation_defaults={},
    )


@pytest.mark.parametrize(
    "some",
    [slice(0, None, 13), pytest.param(slice(None), marks=pytest.mark.slow)],
    ids=["sample", "all"],
)
def test_real_pictures_take_the_rows_of_the_familys_rule(loaded: LoadedTarget, some: slice) -> None:
    assert len(IMAGES) == 60
    for file in IMAGES[some]:
        prompt = make_prompt(loaded, "What is this?", [file])
        ((start, stop),) = prompt.image_spans
        visual = sum(token == loaded.image_token_id for token in prompt.tokens[start:stop])
        with Image.open(file) as image:
            width, height = image.size
        assert visual == RULES[loaded.model_type](height, width), (file.name, width, height)


@pytest.mark.parametrize(
    ("checkpoint", "vectors"),
    [("llava-1.5-7b-hf", "llama-spm"), ("qwen2.5-vl-7b", "qwen2")],
)
def test_real_tokenizers_pass_the_golden_vectors(checkpoint: str, vectors: str) -> None:
    from mlx_vlm.utils import load_processor

    processor = load_processor(CONFIGS / checkpoint, True, trust_remote_code=False)
    folder = GOLDEN / "llamacpp_tokenizer"
    texts = (folder / f"ggml-vocab-{vectors}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{vectors}.gguf.out").read_text().split("\n")
    expected = [[int(number) for number in re.findall(r"\d+", line)] for line in lines]
    pairs = list(zip(texts, expected, strict=False))[:46]
    assert len(pairs) == 46
    for text, ids in pairs:
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        detokenizer = Detokenizer(processor)
        pieces = detokenizer.add(ids) + detokenizer.finish()
        assert pieces == processor.tokenizer.decode(ids)


def test_real_preprocessing_gives_the_golden_pixels() -> None:
    from mlx_vlm.utils import load_processor

    processor = load_processor(CONFIGS / "qwen2.5-vl-7b", True, trust_remote_code=False)
    folder = GOLDEN / "ort_extensions_processor"
    with Image.open(folder / "australia.jpg") as image:
        # The vectors were made for 540 x 360 pixels, rounded to multiples of 28.
        scaled = image.convert("RGB").resize((532, 364), Image.Resampling.BICUBIC)
    arrays = processor(text=["<|vision_start|><|image_pad|><|vision_end|>"], images=[scaled])
    assert np.array(arrays["image_grid_thw"]).tolist() == [[1, 26, 38]]
    golden = np.array((folder / "pixel_values_reference.txt").read_text().split(), dtype=np.float64)
    assert len(golden) == 1000
    ours = np.array(arrays["pixel_values"], dtype=np.float64).ravel()[:1000]
    assert np.abs(ours - golden).max() < 1e-5
