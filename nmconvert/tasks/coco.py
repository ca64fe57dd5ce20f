"""COCO: one JSON file for many images; where it lies, where its images do, and what it says of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nmconvert.errors import DataError
from nmconvert.tasks.base import Split, held_out, part_folders, part_names

Annotation = dict[str, Any]
"""As in COCO: ``bbox`` [x, y, width, height], ``category_id``, ``area``, ``iscrowd``, and ``segmentation`` if there is."""

Listing = tuple[list[Path], list[list[Annotation] | None], list[tuple[int, int] | None]]
"""Images, what is on each (None where nothing is known), and height and width of each where they are said."""

ROBOFLOW = "_annotations.coco.json"


def annotations_of(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """The COCO files of parts that are called ``names``, which may lie in several places of ``folder``."""
    inner = part_folders(folder)
    for part in names:
        for place in (folder, folder / "annotations"):
            found = (place / f"{part}.json", *sorted(place.glob(f"instances_{part}*.json")))
            yield from (file for file in found if file.is_file())
        if part in inner and (inner[part] / ROBOFLOW).is_file():
            yield inner[part] / ROBOFLOW


def coco_file(folder: Path, split: Split) -> Path | None:
    """The COCO file of ``split``, None where the folder has none of any part.

    Raises:
        DataError: it has some of other parts only, and no folder of images of this one.
    """
    found = next(annotations_of(folder, part_names(split)), None)
    other = next(annotations_of(folder, (*part_names("train"), *part_names("val"))), None)
    if found is None and other is not None and not part_folders(folder).keys() & set(part_names(split)):
        wanted = " or ".join(f"{part}.json" for part in part_names(split))
        raise DataError(
            f"{folder}: has {other.relative_to(folder)} and none called {wanted}; name one so, or give {other} itself"
        )
    return found


def read_coco(file: Path, split: Split, *, whole: bool) -> Listing:
    """The images of ``split``, all of them if ``whole``: see `nmconvert.tasks.base.Split`.

    Raises:
        DataError: the file is none of COCO, an annotation is broken, or none of the images is found.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
        entries = content["images"]
        known = "annotations" in content  # COCO's own lists of test images come without
        by_image: dict[Any, list[Annotation]] = {entry["id"]: [] for entry in entries}
        for annotation in content["annotations"] if known else ():
            if annotation["image_id"] not in by_image:
                number, image = annotation.get("id", "?"), annotation["image_id"]
                raise DataError(f"{file}: annotation {number} is of image {image}, which is none of its images")
            by_image[annotation["image_id"]].append(_complete(annotation, file))
        names, sizes = [entry["file_name"] for entry in entries], [_size(entry) for entry in entries]
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError("a file_name that is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{file}: is no COCO file with images and annotations: {type(error).__name__} {error}") from error
    numbers = range(len(names)) if whole else held_out(len(names), split)
    root = _root(file, names)
    truths = [by_image[entries[i]["id"]] if known else None for i in numbers]
    return [root / names[i] for i in numbers], truths, [sizes[i] for i in numbers]


def check_runs(counts: Sequence[int] | str | bytes, pixels: int) -> None:
    """Raise `ValueError` where run lengths do not make up a mask of so many ``pixels``: pycocotools would read beyond it."""
    runs = [*_unpacked(counts.encode() if isinstance(counts, str) else counts)] if isinstance(counts, str | bytes) else counts
    if min(runs, default=0) < 0 or sum(runs) != pixels:
        raise ValueError(f"runs of {sum(runs)} pixels for a mask of {pixels}")


def _complete(annotation: Annotation, file: Path) -> Annotation:
    """With all that pycocotools asks for."""
    box = annotation["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) and math.isfinite(v) for v in box)):
        number = annotation.get("id", "?")
        raise DataError(f"{file}: annotation {number} has the bbox {box}, which is none: [x, y, width, height] in pixels")
    area, crowd = annotation.get("area"), annotation.get("iscrowd")
    known = {"area": box[2] * box[3] if area is None else float(area), "iscrowd": int(crowd or 0)}
    category = int(annotation["category_id"])
    if not -(2**31) <= category < 2**31:
        raise ValueError(f"a category_id of {category:.3g}")
    return annotation | known | {"category_id": category}


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    height, width = entry.get("height"), entry.get("width")
    return (int(height), int(width)) if height and width else None


def _root(file: Path, names: Sequence[str]) -> Path:
    """The first folder that has any of the images: beside the file or above its ``annotations``, there in ``images``, or
    in one that is called as the part."""
    above = [file.parent.parent] if file.parent.name == "annotations" else []
    stem = file.stem.removeprefix("instances_")
    part = re.split(r"[^A-Za-z]", stem)[0]  # val of val2017
    inner = dict.fromkeys(("", part, stem, "images", f"images/{part}", f"images/{stem}", f"{part}/images", f"{stem}/images"))
    roots = [place / name for place in (file.parent, *above) for name in inner]
    for some in (names[:100], names[100:]):  # mostly one of the first is there, and a place without them is left soon
        for root in roots:
            if any((root / name).is_file() for name in some):
                return root
    if names:
        places = ", ".join(dict.fromkeys(str(root) for root in roots if root.is_dir()))
        raise DataError(f"{file}: none of its images is found, the first being {names[0]}: looked in {places}")
    return roots[0]


def _unpacked(text: bytes) -> Iterator[int]:
    """The run lengths of a compressed RLE: pieces of five bits, the lowest first; from the third on, what the one before
    the last is less (``rleFrString`` in pycocotools)."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        piece = letter - 48
        value |= (piece & 31) << shift
        shift += 5
        if not piece & 32:
            value -= (1 << shift) if piece & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            yield runs[-1]
            value = shift = 0
    if shift or not text:
        raise ValueError("the text ends within a number")
