"""Images with one label each: folders, .npz arrays, and anyone's own dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from nmconvert.errors import DataError, NmconvertError, one_line
from nmconvert.imports import ImportPath
from nmconvert.tasks import images
from nmconvert.tasks.base import Split, held_out, part_folder, part_folders, part_names


@dataclass(frozen=True)
class Source:
    """``read(i)`` for i < ``length`` gives an image and its label, -1 where it has none."""

    read: Callable[[int], tuple[Any, int]]
    length: int
    fixed_size: bool
    """All images have one shape: they are taken as they are."""
    sizing: Callable[[], Iterable[tuple[Path, int]]] = tuple
    """The files of the training part, or where there is none of this: by the first of them all parts are sized."""

    def __len__(self) -> int:
        return self.length


def open_source(data: str, split: Split) -> Source:
    """Open labelled images.

    - A folder of images: ``train/<class>/x.png`` and ``val/<class>/y.png``, or ``<class>/x.png`` in one piece; the
      classes are the folders' names in sorted order, those of all parts. A folder that holds images and no folders has
      no labels.
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
            if not isinstance(stored, NpzFile):
                raise ValueError("it holds a single array, as .npy files do")
            yield stored
    except (NmconvertError, MemoryError):
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise DataError(f"{path}: is no readable .npz file: {one_line(error)}") from error


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
        return Source(partial(_read_item, named, dataset), len(dataset), fixed_size=True)


def _from_arrays(path: Path, split: Split, *, whole: bool = False) -> Source:
    with open_npz(path) as stored:
        prefix = next((f"{p}_" for p in part_names(split) if f"{p}_images" in stored), "")
        if f"{prefix}images" not in stored:
            raise DataError(f"{path}: {_lacking(list(stored), split)}")
        pixels, labels = _pick(stored, prefix, path)
    numbers = range(len(pixels)) if prefix or whole else held_out(len(pixels), split)
    if not len(numbers):
        raise DataError(f"{path}: no images for the split '{split}'")
    return Source(partial(_read_array, pixels, labels, numbers), len(numbers), fixed_size=True)


def _lacking(names: Sequence[str], split: Split) -> str:
    """What to say of a file that has no images for ``split``."""
    others = [name for name in names if name.endswith("_images")]
    if others:
        wanted = " or ".join(f"{part}_images" for part in part_names(split))
        return f"has {' and '.join(others)}, but none called {wanted}; name one so, or 'images' where there are no parts"
    return (
        f"has no array 'images' (or 'train_images', …), only {', '.join(names) or 'nothing'}; --calib takes arrays that are "
        "named as the model's inputs, too"
    )


def _pick(stored: Mapping[str, Any], prefix: str, path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    pixels, wanted = stored[f"{prefix}images"], f"{prefix}labels"
    if wanted not in stored and (close := get_close_matches(wanted, [name.lower() for name in stored], 1, 0.8)):
        raise DataError(f"{path}: has no '{wanted}' but {', '.join(stored)}: is '{close[0]}' what has to be called so?")
    labels = stored[wanted] if wanted in stored else np.full(len(pixels), -1)
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
    part, parts = part_folder(path, split), part_folders(path)
    # of all parts: where one of them lacks a class, a class has the same number in it as in the others
    classes = sorted({p.name for one in parts.values() or (path,) for p in one.iterdir() if _is_class(p)})
    found = [*_files(part, classes)]
    if part == path:
        found = [found[i] for i in held_out(len(found), split)]
    if not found:
        raise DataError(f"{part}: no images in it (png, jpeg, webp, bmp, gif, tiff), or too few to hold a tenth out")
    first = next((parts[name] for name in part_names("train") if name in parts), part)
    return Source(partial(_read_file, found), len(found), fixed_size=False, sizing=partial(_files, first, classes))


def _is_class(place: Path) -> bool:
    return place.is_dir() and not place.name.startswith(".")


def _files(part: Path, classes: Sequence[str]) -> Iterator[tuple[Path, int]]:
    """The images of a part, class after class, with their labels; -1 where none lies in the folder of a class."""
    empty = True
    for label, folder in enumerate(part / name for name in classes):
        inside = images.find_images(folder) if folder.is_dir() else []
        if inside and all(p.parent != folder for p in inside):
            _check_class(folder, sorted({p.relative_to(folder).parts[0] for p in inside}))
        empty = empty and not inside
        yield from ((p, label) for p in inside)
    if empty:
        yield from ((p, -1) for p in images.walk_images(part))


def _check_class(folder: Path, inner: Sequence[str]) -> None:
    """Raise where a folder of a class has its images in several ``inner`` ones: these seem to be the classes."""
    if len(inner) > 1:
        raise DataError(
            f"{folder}: holds no images, but {len(inner)} folders of them, such as '{inner[0]}': if it is a part, name it "
            "train, val or test; if it is a class, put its images into it"
        )


def _read_item(named: ImportPath, dataset: Any, index: int) -> tuple[Any, int]:
    with named.running(f"reading sample {index}"):
        item, where = dataset[index], f"{named.said}: sample {index}"
        if not isinstance(item, tuple | list) or len(item) != 2 or not (_is_pillow(item[0]) or hasattr(item[0], "dtype")):
            raise DataError(
                f"{where} is a {type(item).__name__}, and not (image, label); a model of several inputs is calibrated on an "
                ".npz with an array for each, named as in forward"
            )
        return _as_image(item[0], where), _as_label(item[1], where)


def _is_pillow(image: Any) -> bool:
    return hasattr(image, "getbands")


def _as_image(image: Any, where: str) -> Any:
    """Bytes as a file's are, uint8 [H, W, C], be they Pillow's, a tensor [C, H, W] or without channels; others as they are."""
    if _is_pillow(image):
        return images.pixels_of(image, keep_gray=True, where=where)
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:
            return image
        image = image.movedim(0, -1).numpy() if image.ndim == 3 else image.numpy()
    if image.dtype == np.uint8 and image.ndim not in (2, 3):
        raise DataError(f"{where} is uint8 {[*image.shape]}, and no image [H, W, C] or [H, W] (a tensor: [C, H, W])")
    return image[..., None] if image.dtype == np.uint8 and image.ndim == 2 else image


def _as_label(label: Any, where: str) -> int:
    try:
        number = int(label)
        if number == label:
            return number
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # said below: None, a text, several numbers, infinity
    raise DataError(f"{where} has the label {' '.join(repr(label).split())[:60]}: one whole number, the class, or -1 for none")


def _read_array(pixels: NDArray[Any], labels: NDArray[Any], numbers: Sequence[int], index: int) -> tuple[Any, int]:
    return pixels[numbers[index]], int(labels[numbers[index]])


def _read_file(found: Sequence[tuple[Path, int]], index: int) -> tuple[Any, int]:
    path, label = found[index]
    return images.read_image(path, keep_gray=True), label
