"""Images: read, resize, crop and flip. Arrays are uint8 [H, W, 3] RGB, or [H, W, 1] gray, until a batch is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nmconvert.checkpoint.paths import IMAGES
from nmconvert.errors import DataError
from nmconvert.extras import require

Image = NDArray[np.uint8]


GRAY = frozenset({"1", "L", "LA"})  # Pillow's modes of files without colour
_BITS_PER_SAMPLE = 258  # the tag of TIFF


def read_image(path: Path, *, keep_gray: bool = False, size: tuple[int, int] | None = None) -> Image:
    """The image at ``path`` as uint8 [H, W, 3], or [H, W, 1] if it is to be kept gray; raises `DataError` with the path.

    Pixels are taken as they are stored, as torchvision does; but where ``size``, height and width, is only had by turning them
    as a camera's tag says (EXIF), they are: somebody drew boxes on what a viewer shows.
    """
    pil = require("PIL.Image", "vision")
    try:
        with pil.open(path) as image:
            stored = size is None or size == (image.height, image.width)
            upright = image if stored else require("PIL.ImageOps", "vision").exif_transpose(image)
            return pixels_of(upright if (upright.height, upright.width) == size else image, keep_gray=keep_gray, where=path)
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is no readable image"
        raise DataError(f"{path}: {reason}; --skip-bad leaves out what cannot be read") from error


def pixels_of(image: Any, *, keep_gray: bool = False, where: object = "") -> Image:
    """What `read_image` gives, of an image of Pillow; raises `DataError` where its numbers are no brightness."""
    if image.mode[0] in "IF":
        gray = _from_16_bits(image, where)
        return gray[..., None] if keep_gray else np.stack([gray] * 3, 2)
    if keep_gray and image.mode in GRAY:
        return np.asarray(image.convert("L"))[..., None]
    colour = np.asarray(image.convert("RGB"))
    if keep_gray and image.mode == "P" and (colour == colour[..., :1]).all():  # as GIF has it: there is no mode L
        return colour[..., :1]
    return colour


def _from_16_bits(image: Any, where: object) -> Image:
    """Gray in 16 bits as gray in 8; Pillow itself would cut it off at 255.

    A mode I has 32 bits, but Pillow takes it for some files of 16, too.
    """
    narrow = image.format in ("PNG", "PPM") or getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (16,)
    values = np.asarray(image)
    if image.mode == "F" or (image.mode == "I" and not narrow) or values.min(initial=0) < 0:
        kind = "floats" if image.mode == "F" else "integers of 32 bits or with a sign"
        raise DataError(f"{where}: its pixels are {kind} (Pillow's mode {image.mode}); convert it to 8 or 16 bits")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def find_images(folder: Path) -> list[Path]:
    """The image files below ``folder``, sorted by path."""
    return [*walk_images(folder)]


def walk_images(folder: Path) -> Iterator[Path]:
    """The same, one after the other; what is hidden, a file or a folder, is left out."""
    for place in sorted(folder.iterdir()):
        if place.name.startswith("."):
            continue
        if place.suffix.lower() in IMAGES:
            yield place
        elif place.is_dir() and not place.is_symlink():
            yield from walk_images(place)


def resize(image: Image, height: int, width: int) -> Image:
    """Bilinear, with antialiasing when it shrinks; the same array where it has that size already."""
    if image.shape[:2] == (height, width):
        return image
    pil = require("PIL.Image", "vision")
    pixels = pil.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(pixels.resize((width, height), pil.Resampling.BILINEAR)).reshape(height, width, -1)


def resize_shorter(image: Image, size: int) -> Image:
    """The shorter side becomes ``size``, the other keeps the proportions."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    return resize(image, max(size, round(height * scale)), max(size, round(width * scale)))


def centre_crop(image: Image, size: int) -> Image:
    """The middle ``size`` × ``size`` pixels."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def shifted(image: NDArray[np.generic], pad: int, rng: Generator) -> NDArray[np.generic]:
    """A random crop of the size of the image [H, W, C], out of it with ``pad`` zero pixels on every side."""
    top, left = rng.integers(0, 2 * pad + 1, size=2)
    height, width = image.shape[:2]
    padded = np.zeros((height + 2 * pad, width + 2 * pad, *image.shape[2:]), image.dtype)
    padded[pad : pad + height, pad : pad + width] = image
    return padded[top : top + height, left : left + width]


def random_resized_crop(image: Image, size: int, rng: Generator) -> Image:
    """A random part of 8 to 100 % of the area, sides 3:4 to 4:3, resized to ``size`` (Szegedy et al. 2015, sec. 6)."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return resize(np.ascontiguousarray(image[top : top + h, left : left + w]), size, size)
    return resize(centre_crop(image, min(height, width)), size, size)
