"""What each latent reads, drawn over the picture; and drafts in colour."""

import dataclasses
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands import make_drafter
from flash_mlx.cli import run
from flash_mlx.cli.show import coloured
from flash_mlx.cost import Costs
from flash_mlx.draft.adaptive import unpaced
from flash_mlx.draft.calibrate import Calibrator
from flash_mlx.generate import Model, generate, load, stream_generate
from flash_mlx.loading import Drafting, demo_pictures
from flash_mlx.processing import Detokenizer, make_prompt
from flash_mlx.tree import DraftTree
from flash_mlx.viz import GAP, TILE, attention, draw_latents, latent_weights
from identity import SHAPES, CorruptedOracle
from tiny import edit_json, random_image

PICTURES = [random_image(160, 90, seed=1), random_image(90, 160, seed=2)]


@pytest.fixture(scope="module", params=["llava", "qwen"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = request.getfixturevalue(f"tiny_{request.param}")
    return load(folder, make_drafter(tmp_path_factory.mktemp("drafter")))


def test_weights_are_the_softmax_over_the_rows_of_an_image(model: Model) -> None:
    prompt = make_prompt(model.loaded, "What?", PICTURES, "Be brief.")
    hidden = model.target.prefill(prompt, model.target.make_cache()).hidden
    queries = np.array(unpaced(model.drafter).model.A, dtype=np.float64)
    found = latent_weights(model, PICTURES, "What?", "Be brief.")
    for weights, (start, stop) in zip(found, prompt.image_spans, strict=True):
        scores = queries @ np.array(hidden[start:stop], dtype=np.float64).T
        expected = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights.reshape(expected.shape), expected, atol=1e-5)


def test_the_grid_has_the_proportions_that_the_processor_made(model: Model) -> None:
    (_, wide, _), *_ = shapes = [w.shape for w in latent_weights(model, PICTURES, "What?")]
    if model.config["model_type"] == "llava":  # makes squares
        assert shapes == [(4, 4, 4), (4, 4, 4)]
    else:
        grids = np.array(make_prompt(model.loaded, "What?", PICTURES).inputs["image_grid_thw"])
        merge = model.config["vision_config"]["spatial_merge_size"]
        assert shapes == [(4, *(grid[1:] // merge)) for grid in grids]
        assert wide < shapes[0][2]


def test_what_is_read_shines() -> None:
    grey = Image.new("RGB", (120, 60), (100, 100, 100))
    weights = np.zeros((3, 2, 4))
    weights[0, 0, 3], weights[1, 1, 0], weights[1, 1, 3] = 1, 0.5, 0.25
    drawing = np.asarray(attention(grey, weights)).astype(int)
    side, height = TILE + GAP, TILE // 2 + GAP
    assert drawing.shape == (2 * height - GAP, 2 * side - GAP, 3)

    def brightness(tile: int, row: int, column: int) -> int:
        left, top = tile % 2 * side, tile // 2 * height
        return int(drawing[top + 18 + 36 * row, left + 30 + 36 * column].sum())

    assert {brightness(0, row, column) for row in (0, 1) for column in range(4)} == {300}
    dark = brightness(3, 1, 1)
    shining = {(t, r, c) for t in (1, 2, 3) for r in (0, 1) for c in range(4)
               if brightness(t, r, c) > dark}  # fmt: skip
    assert shining == {(1, 0, 3), (2, 1, 0), (2, 1, 3)}
    assert brightness(1, 0, 3) == brightness(2, 1, 0) > brightness(2, 1, 3) > dark


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros((0, 2, 2)), [[[np.nan]]], [[[-1.0]]]])
def test_what_are_no_weights_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="shape"):
        attention(PICTURES[0], wrong)


def test_a_picture_is_drawn_as_the_processor_cuts_it(model: Model, tmp_path: Path) -> None:
    folder = shutil.copytree(model.loaded.path, tmp_path / "copy")
    copy = dataclasses.replace(model, loaded=dataclasses.replace(model.loaded, path=folder))
    edit_json(folder, "preprocessor_config.json", do_center_crop=False)
    whole = draw_latents(copy, PICTURES[:1], "What?")
    edit_json(folder, "preprocessor_config.json", do_center_crop=True)
    cut = draw_latents(copy, PICTURES[:1], "What?")
    assert whole.size == (3 * (TILE + GAP) - GAP, 2 * (round(TILE * 90 / 160) + GAP) - GAP)
    assert cut.size == (3 * (TILE + GAP) - GAP, 2 * (TILE + GAP) - GAP)


def test_the_command_draws(model: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{number}.png") for number in range(2)]
    for file, picture in zip(files, PICTURES, strict=True):
        picture.save(file)
    drawing = tmp_path / "latents.png"
    words = ["generate", "--model", model.name, "--max-tokens", "2", "--prompt", "What?",
             "--show-latents", str(drawing)]  # fmt: skip
    assert run([*words, "--draft-model", model.draft_name, "--image", *files]) == 0
    with Image.open(drawing) as found:
        assert found.format == "PNG"
        assert found.tobytes() == draw_latents(model, PICTURES, "What?").tobytes()
    capfd.readouterr()
    assert run([*words, "--image", *files]) == 1
    assert "ngram has none" in capfd.readouterr().err
    assert run(words) == 2
    assert "--show-latents" in capfd.readouterr().err


def test_where_a_drawing_cannot_stand_is_known_before_the_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    PICTURES[0].save(tmp_path / "a.png")
    words = [
        "generate",
        "--model",
        "/none",
        "--prompt",
        "What?",
        "--image",
        str(tmp_path / "a.png"),
    ]
    for place, code in (("none/out.png", 1), (".", 2), ("/dev/null", 2)):
        assert run([*words, "--show-latents", str(tmp_path / place)]) == code
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1
        assert "--show-latents" in err


def test_a_drawing_that_fails_leaves_the_old_one(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PICTURES[0].save(tmp_path / "a.png")
    drawing = tmp_path / "latents.png"
    drawing.write_bytes(b"the old one")

    def torn(_picture: Image.Image, file: Path, **_options: object) -> None:
        Path(file).write_bytes(b"half a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", torn)
    words = ["generate", "--model", model.name, "--draft-model", model.draft_name, "--prompt", "?"]
    words += ["--image", str(tmp_path / "a.png"), "--show-latents", str(drawing)]
    assert run([*words, "--max-tokens", "2"]) == 1
    assert drawing.read_bytes() == b"the old one"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "latents.png"]


@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_are_coloured_and_nothing_else(tiny_llava: Path, shape: str) -> None:
    plain = load(tiny_llava, "none")
    settings = {"max_tokens": 40, "temperature": 0.0}
    free = generate(plain, "Hello.", **settings)
    oracle = CorruptedOracle(free.token_ids, SHAPES[shape], plain.target.vocab_size)
    pieces = list(stream_generate(dataclasses.replace(plain, drafter=oracle), "Hello.", **settings))
    assert "".join(piece.text for piece in pieces) == free.text
    detokenizer = Detokenizer(plain.processor)
    for piece in pieces[:-2]:  # of the last round, the budget may have cut off the last token
        drafts, own = (detokenizer.add(ids) for ids in (piece.token_ids[:-1], piece.token_ids[-1:]))
        assert (piece.text, piece.num_drafted) == (drafts + own, len(drafts))
    assert sum(piece.num_drafted for piece in pieces) > 10
    for piece in pieces:
        shown = coloured(piece)
        assert shown.replace("\x1b[32m", "").replace("\x1b[0m", "") == piece.text
        assert ("\x1b[32m" in shown) == (piece.num_drafted > 0)


@pytest.mark.parametrize(
    ("draft", "drafting", "temperature"),
    [("demo", "tree", 0.0), ("demo", "chain", 0.0), ("demo", "fixed", 0.0), ("demo", "tree", 1.0),
     ("ngram", "tree", 0.0), ("ngram", "fixed", 0.0)],
)  # fmt: skip
def test_what_is_green_was_drafted(
    draft: str,
    drafting: Drafting,
    temperature: float,
    tiny_llava: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Green is what follows the root in the very tree that was drafted, and nothing after that."""
    cheap = Costs(1.0, ((1, 1.0), (16, 1.1)), ((1, 0.01), (10, 0.02)) if draft == "demo" else ())
    monkeypatch.setattr(Calibrator, "costs", lambda *_words, **_named: cheap)
    name, shown = ("demo", demo_pictures()[:1]) if draft == "demo" else (tiny_llava, ())
    model = load(name, draft, drafting=drafting)
    draw, trees = type(model.drafter).draft, []

    def noted(*words: Any) -> DraftTree:
        trees.append(draw(*words))
        return trees[-1]

    monkeypatch.setattr(type(model.drafter), "draft", noted)
    settings: dict[str, Any] = {"max_tokens": 60, "temperature": temperature, "seed": 1}
    pieces = list(stream_generate(model, "Describe the picture.", shown, **settings))
    detokenizer = Detokenizer(model.processor)
    assert pieces[0].num_drafted == 0
    detokenizer.add(pieces[0].token_ids)
    green, sizes = 0, set()
    for piece, tree in zip(pieces[1:-2], trees, strict=False):
        said, row, drafted = [*map(int, tree.tokens.tolist())], 0, 0
        for token in piece.token_ids:
            row = next((r for r in tree.topology.children[row] if said[r] == token), -1)
            if row < 0:
                break
            drafted += 1
        assert drafted < len(piece.token_ids)
        text = detokenizer.add(piece.token_ids[:drafted])
        own = detokenizer.add(piece.token_ids[drafted:])
        around = f"\x1b[32m{text}\x1b[0m" if text else ""
        assert coloured(piece) == around + own
        green, sizes = green + drafted, sizes | {tree.topology}
    assert green > 10
    assert drafting != "tree" or len(sizes) > 1  # of several shapes
    siblings = any(not topology.is_chain for topology in sizes)
    assert siblings == (draft == "demo" and drafting == "tree")


@pytest.mark.parametrize(("terminal", "no_color"), [(True, None), (True, "1"), (False, None)])
def test_colours_are_for_terminals_that_want_them(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, no_color: str | None
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr(sys, "stdout", screen := Screen())
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    words = ["generate", "--model", str(tiny_llava), "--prompt", "a b c a b c a b", "--temp", "0"]
    words += ["--draft-block-size", "4"]  # whatever it costs here
    assert run([*words, "--max-tokens", "60", "--no-verbose", "--show-drafts"]) == 0
    assert ("\x1b[" in screen.getvalue()) == (terminal and not no_color)
