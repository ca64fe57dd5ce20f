"""Images with one label each: folders, .npz arrays, and anyone's own dataset."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from nmconvert.errors import DataError
from nmconvert.imports import ImportPath
from nmconvert.tasks import images
from nmconvert.tasks.base import Split, held_out, part_folder, part_names


@dataclass(frozen=True)
class Source:
    """``read(i)`` for i < ``length`` gives an image and its label, -1 where it has none."""

    read: Callable[[int], tuple[Any, int]]
    length: int
    fixed_size: bool
    """All images have one shape: they are taken as they are."""

    def __len__(self) -> int:
        return self.length


def open_source(data: str, split: Split) -> Source:
    """Open labelled images.

    - A folder of images: ``train/<class>/x.png`` and ``val/<class>/y.png``, or ``<class>/x.png`` in one piece; the
      classes are the folders' names in sorted order. A folder that holds images and no folders has no labels.
    - An ``.npz`` file with ``images`` (uint8 [N, H, W, C] or [N, H, W], or float [N, C, H, W]) and ``labels`` [N]
      (or without them), or with ``train_images``, ``train_labels``, ``val_images``, …; or a folder with
      ``train.npz`` and ``val.npz``; or ``digits`` for ``digits_train.npz`` and ``digits_val.npz``.
    - ``package.module:callable`` or ``path/to/file.py:callable``: called with the split (``train``, ``val``, ``test``),
      returns a map-style dataset of (image, label).

    Raises:
        DataError: there is no such thing, or nothing in it.
        UsageError: there is no such callable.
    """
    path = Path(data)
    for part in part_names(split):
        for file in (path / f"{part}.npz", Path(f"{data}_{part}.npz")):
            if file.is_file():
                return _from_arrays(file, split, whole=True)
    if not path.exists():
        return _from_callable(data, split)
    if path.is_dir():
        return _from_folder(path, split)
    if path.suffix == ".npz":
        return _from_arrays(path, split)
    raise DataError(f"{data}: classification takes a folder of images, an .npz file, or package.module:callable")


@contextmanager
def open_npz(path: Path) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The arrays of an .npz file, each read when it is asked for; raises `DataError` where that is not possible."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            yield stored
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: is no readable .npz file: {error}") from error


def _from_callable(data: str, split: Split) -> Source:
    named = ImportPath.parse(data, data, DataError)
    if named is None:
        raise DataError(f"{data}: there is no such data, nor is it of the form package.module:callable")
    make = named.load()
    if not callable(make):
        raise DataError(f"{data}: is a {type(make).__name__}; name a callable, which gets '{split}' and returns a dataset")
    with named.running("calling it"):
        dataset = make(split)
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(f"{data}: returned {type(dataset).__name__}, not a dataset with a length")
        return Source(partial(_read_item, dataset), len(dataset), fixed_size=True)


def _from_arrays(path: Path, split: Split, *, whole: bool = False) -> Source:
    with open_npz(path) as stored:
        prefix = next((f"{p}_" for p in part_names(split) if f"{p}_images" in stored), "")
        pixels, labels = _pick(stored, prefix, path)
    numbers = range(len(pixels)) if prefix or whole else held_out(len(pixels), split)
    if not len(numbers):
        raise DataError(f"{path}: no images for the split '{split}'")
    return Source(partial(_read_array, pixels, labels, numbers), len(numbers), fixed_size=True)


def _pick(stored: Mapping[str, Any], prefix: str, path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    if f"{prefix}images" not in stored:
        there = ", ".join(stored) or "nothing"
        raise DataError(
            f"{path}: has no array 'images' (or 'train_images', …), only {there}; --calib takes arrays that are named as the "
            "model's inputs, too"
        )
    pixels = stored[f"{prefix}images"]
    labels = stored[f"{prefix}labels"] if f"{prefix}labels" in stored else np.full(len(pixels), -1)
    if pixels.dtype == np.uint8 and pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or (pixels.dtype != np.uint8 and pixels.dtype.kind != "f"):
        what = f"{path}: 'images' is {pixels.dtype} {[*pixels.shape]}"
        raise DataError(f"{what}; it has to be uint8 [N, H, W, C] or float [N, C, H, W]")
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "ui":
        what = f"{path}: 'labels' is {labels.dtype} {[*labels.shape]} for {len(pixels)} images"
        raise DataError(f"{what}: one integer each")
    return pixels, labels


def _from_folder(path: Path, split: Split) -> Source:
    boxes = [path / name for name in ("Annotations", "annotations", *(f"{part}.json" for part in part_names(split)))]
    other = next((found for found in boxes if found.exists()), None)
    if other is not None:
        raise DataError(f"{path}: has boxes ({other.name}), no classes: give --task detection or segmentation")
    part = part_folder(path, split)
    classes = sorted(p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [(p, label) for label, name in enumerate(classes) for p in images.find_images(part / name)]
    found = found or [(p, -1) for p in images.find_images(part)]
    if part == path:
        found = [found[i] for i in held_out(len(found), split)]
    if not found:
        raise DataError(f"{part}: no images in it (png, jpeg, webp, bmp, gif, tiff), or too few to hold a tenth out")
    return Source(partial(_read_file, found), len(found), fixed_size=False)


def _read_item(dataset: Any, index: int) -> tuple[Any, int]:
    item = dataset[index]
    if not isinstance(item, tuple | list) or len(item) != 2 or not hasattr(item[0], "dtype"):
        raise DataError(
            f"sample {index} is a {type(item).__name__}, and not (image, label); a model of several inputs is calibrated on an "
            ".npz with an array for each, named as in forward"
        )
    return item[0], int(item[1])


def _read_array(pixels: NDArray[Any], labels: NDArray[Any], numbers: Sequence[int], index: int) -> tuple[Any, int]:
    return pixels[numbers[index]], int(labels[numbers[index]])


def _read_file(found: Sequence[tuple[Path, int]], index: int) -> tuple[Any, int]:
    path, label = found[index]
    return images.read_image(path, keep_gray=True), label
