"""Picture files of all kinds as plain RGB images.

Whatever Pillow can read becomes what a processor expects: 8 bits, RGB, upright, opaque, one frame.
A damaged file is an error; grey filling in place of lost data would be described as if it were
the picture.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # by suffix
ImageSource = str | os.PathLike[str] | bytes | Image.Image

MAX_PIXELS = 178_956_970  # twice Pillow's threshold for a warning: 512 MiB as RGB
RUN_PROGRAMS = ("EPS",)  # formats that Pillow leaves to a program, Ghostscript, if it is there
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    NotImplementedError,
    OverflowError,
    struct.error,
    zlib.error,
)
HIGH_DEPTH_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def load_image(source: ImageSource) -> Image.Image:
    """Return a picture as an 8-bit RGB image, upright, on white where it is transparent.

    Args:
        source: A file, the bytes of one, or an image. Of an animation, the first frame is taken.

    Raises:
        OSError: If the file is missing, a folder, or cannot be opened.
        ValueError: If it is empty, no picture, damaged, or too large.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "The image")
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), len(source), "The image")
    path, name = Path(source), os.fspath(source)
    if path.is_dir():
        raise IsADirectoryError(f"An image must be a file; {name} is a folder. Name a file in it.")
    if not path.exists():
        raise FileNotFoundError(f"An image must be a file; {name} does not exist. Check the path.")
    if not path.is_file():
        raise OSError(f"An image must be a file; {name} is a device or a pipe.")
    with path.open("rb") as stream:
        return _read(stream, path.stat().st_size, name)


def _read(stream: BinaryIO, size: int, name: str) -> Image.Image:
    if size == 0:
        raise ValueError(f"{name} must be a picture; it is empty (0 bytes).")
    try:
        with _strict_pillow():
            image = Image.open(stream)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} must be a picture in a format that Pillow reads (JPEG, PNG, WebP, GIF, ...); "
            "it is none."
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except DAMAGED as error:
        raise ValueError(f"{name} must be a whole picture; it is damaged: {error}.") from error
    with image:
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    if image.format in RUN_PROGRAMS:
        raise ValueError(
            f"{name} must be a picture of pixels; it is {image.format}, which another program "
            "would have to draw. Save it as PNG."
        )
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, f"it has {image.width} x {image.height}")
    if image.width == 0 or image.height == 0:
        raise ValueError(f"{name} must have pixels; it is {image.width} x {image.height}.")
    try:
        with _strict_pillow():
            image.load()
            return _to_rgb(_upright(image))
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except DAMAGED as error:
        raise ValueError(
            f"{name} must be a whole picture; it is damaged or cut off: {error}. Copy it again."
        ) from error


def _too_large(name: str, found: str = "it has many more") -> ValueError:
    return ValueError(f"{name} must have at most {MAX_PIXELS} pixels; {found}. Scale it down.")


def _upright(image: Image.Image) -> Image.Image:
    """Turn as EXIF says; an EXIF block that cannot be read says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGED:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in HIGH_DEPTH_MODES:
        return _to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale brightness instead of clipping it, which Pillow's own conversion does.

    Whole numbers count as 16-bit unless one is larger; fractions as 0 to 1, to 255, or to the
    brightest, whichever is the first to hold all.
    """
    values = np.maximum(np.nan_to_num(np.asarray(image, dtype=np.float32)), 0)
    brightest = float(values.max())
    steps = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    top = next((step for step in steps if brightest <= step), brightest)
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Let Pillow raise on truncated and on too much data, whatever others asked, and not chat."""
    allowed, threshold = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # it warns above, and raises above twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allowed
        Image.MAX_IMAGE_PIXELS = threshold
