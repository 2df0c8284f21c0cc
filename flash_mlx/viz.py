"""Pictures of what a drafter sees: which parts of an image each latent reads.

A latent is a weighted sum of the target's hidden states at the image's rows. Its weights,
softmax(A F^T), are drawn over the picture: what is read shines, what is not is dark.

Shapes:
    M: latents.    N: rows of an image, h * w.    h, w: rows and columns of its grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

from flash_mlx.draft import FlashDrafter
from flash_mlx.draft.adaptive import unpaced
from flash_mlx.files import read_json
from flash_mlx.images import ImageSource, load_image
from flash_mlx.loading import Model
from flash_mlx.processing import make_prompt
from flash_mlx.prompt import Prompt

TILE = 144  # longer side of a tile [pixels]
GAP = 4
GLOW = (255, 170, 40)
DIM = 0.45  # brightness of what is not read
TOLERANCE = 0.03  # of the logarithm of a grid's height over its width

Weights = npt.NDArray[np.float32]


def latent_weights(
    model: Model, images: Sequence[ImageSource], prompt: str, system: str | None = None
) -> list[Weights]:
    """Return what each latent reads of each picture.

    Args:
        model: From `load`, with a drafter that has latents.
        images: Pictures, in order.
        prompt: What is said about them. A picture's hidden states depend on what comes before it.
        system: Likewise.

    Returns:
        One [M, h, w] a picture; each latent's weights over the patches sum to 1.

    Raises:
        OSError: A picture cannot be opened.
        ValueError: The drafter has no latents, the model's image rows are no grid, or the prompt
            cannot be made.
    """
    drafter = unpaced(model.drafter)
    if not isinstance(drafter, FlashDrafter):
        raise ValueError(
            f"Latents are read by a trained drafter; {model.draft_name} has none. Name one with "
            "--draft-model."
        )
    config = drafter.model.config
    if config.reads_whole_images or not config.num_latents:
        raise ValueError(
            f"Latents are drawn of a drafter that compresses pictures; {model.draft_name} reads "
            f"{'them whole' if config.reads_whole_images else 'none'}."
        )
    question = make_prompt(model.loaded, prompt, images, system=system)
    hidden = model.target.prefill(question, model.target.make_cache()).hidden
    grids = [_grid(question, number) for number in range(len(images))]
    rows = drafter.model.features(hidden)
    weights = [drafter.model.latent_weights(rows[a:b]) for a, b in question.image_spans]
    mx.eval(weights)
    return [np.array(w).reshape(-1, *grid) for w, grid in zip(weights, grids, strict=True)]


def attention(image: ImageSource, latents: npt.ArrayLike) -> Image.Image:
    """Draw which patches of a picture each latent reads: the picture, then a tile for each.

    Args:
        image: The picture.
        latents: [M, h, w] weights, such as those of `latent_weights`; the largest of each latent
            shines brightest.

    Returns:
        The drawing, RGB.

    Raises:
        OSError: The picture cannot be opened.
        ValueError: The weights have another shape, or are negative or not finite.
    """
    weights = np.asarray(latents, dtype=np.float32)
    if (
        weights.ndim != 3
        or 0 in weights.shape
        or not np.isfinite(weights).all()
        or weights.min() < 0
    ):
        raise ValueError(
            "Latents must be drawn from weights of the shape (latents, rows, columns), finite and "
            f"not negative; got the shape {weights.shape}."
        )
    picture = load_image(image)
    scale = TILE / max(picture.size)
    picture = picture.resize([max(round(side * scale), 1) for side in picture.size])
    dim = ImageOps.grayscale(picture).point(lambda value: value * DIM).convert("RGB")
    tiles = [picture]
    for number, weight in enumerate(weights):
        glow = Image.fromarray(np.rint(255 * weight / max(weight.max(), 1e-30)).astype(np.uint8))
        glow = glow.resize(picture.size, Image.Resampling.NEAREST)
        lit = Image.blend(picture, Image.new("RGB", picture.size, GLOW), 0.5)
        tile = Image.composite(lit, dim, glow)
        ImageDraw.Draw(tile).text(
            (3, 1), str(number), fill="white", stroke_width=1, stroke_fill="black"
        )
        tiles.append(tile)
    return sheet(tiles, math.ceil(math.sqrt(len(tiles))))


def draw_latents(
    model: Model, images: Sequence[ImageSource], prompt: str, system: str | None = None
) -> Image.Image:
    """Draw `attention` of several pictures, one below the other; as for `latent_weights`."""
    pictures = [load_image(image) for image in images]
    weights = latent_weights(model, pictures, prompt, system)
    views = (_as_seen(model, picture) for picture in pictures)
    return sheet([attention(v, w) for v, w in zip(views, weights, strict=True)], 1)


def sheet(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Put pictures in rows of so many, with gaps; such as a video's frames (`load_video`)."""
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + GAP for row in rows]
    width = max(sum(tile.width + GAP for tile in row) for row in rows)
    sheet = Image.new("RGB", (width - GAP, sum(heights) - GAP))
    for number, row in enumerate(rows):
        left = 0
        for tile in row:
            sheet.paste(tile, (left, sum(heights[:number])))
            left += tile.width + GAP
    return sheet


def _as_seen(model: Model, picture: Image.Image) -> Image.Image:
    """Cut off what the checkpoint's processor cuts off: all but the square in the middle."""
    settings = model.loaded.path / "preprocessor_config.json"
    if settings.is_file() and read_json(settings).get("do_center_crop") is True:
        return ImageOps.fit(picture, (min(picture.size),) * 2)
    return picture


def _grid(prompt: Prompt, number: int) -> tuple[int, int]:
    """Return h and w of a picture, of the same proportions as what the processor made of it.

    Raises:
        ValueError: The rows do not form a grid like that of the processor's pixels.
    """
    start, stop = prompt.image_spans[number]
    if "image_grid_thw" in prompt.inputs:  # Qwen: patches, before they are merged in squares
        height, width = np.array(prompt.inputs["image_grid_thw"])[number, 1:].tolist()
    elif "pixel_values" in prompt.inputs and prompt.inputs["pixel_values"].ndim == 4:
        height, width = prompt.inputs["pixel_values"].shape[2:]
    else:
        height, width = 0, 1
    for rows in range(1, stop - start + 1):
        columns, rest = divmod(stop - start, rows)
        if not rest and height and abs(math.log(rows * width / columns / height)) < TOLERANCE:
            return rows, columns
    raise ValueError(
        f"Latents can be drawn where an image's rows are its patches, row by row; {stop - start} "
        "rows of this model are not."
    )
