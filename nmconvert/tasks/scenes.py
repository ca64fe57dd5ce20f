"""Images with boxes and masks: COCO JSON, Pascal VOC XML, or a folder of images without either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmconvert.errors import DataError
from nmconvert.extras import require
from nmconvert.tasks import images
from nmconvert.tasks.base import Split, held_out, part_folder
from nmconvert.tasks.coco import ROBOFLOW, Annotation, Listing, check_runs, coco_file, read_coco
from nmconvert.tasks.voc import read_voc

TAKES = "detection and segmentation take a COCO file (.json), a folder with one, or a Pascal VOC folder"


@dataclass
class Scene:
    """One image and what is on it.

    ``boxes`` float32 [n, 4] (x1, y1, x2, y2), ``labels`` int64 [n] and ``masks`` uint8 [n, H, W] follow the image when it is
    resized, flipped or zoomed, and leave out crowds; ``truth`` keeps everything as the file has it, for the metric, or is None
    where nothing is known.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    truth: list[Annotation] | None
    masks: NDArray[np.uint8] | None = None
    original: tuple[int, int] = field(default=(0, 0))
    """Height and width of the file's image."""

    def resized(self, height: int, width: int) -> Scene:
        """Stretched to ``height`` × ``width``."""
        down, right = height / self.image.shape[0], width / self.image.shape[1]
        boxes = self.boxes * np.array([right, down, right, down], np.float32)
        masks = None if self.masks is None else np.stack([_stretch(m, height, width) for m in self.masks] or [
            np.zeros((height, width), np.uint8)])[: len(self.masks)]  # fmt: skip
        return Scene(images.resize(self.image, height, width), boxes, self.labels, self.truth, masks, self.original)

    def flipped(self) -> Scene:
        """Mirrored, left to right."""
        width = self.image.shape[1]
        boxes = np.stack([width - self.boxes[:, 2], self.boxes[:, 1], width - self.boxes[:, 0], self.boxes[:, 3]], 1)
        masks = None if self.masks is None else np.ascontiguousarray(self.masks[..., ::-1])
        pixels = np.ascontiguousarray(self.image[:, ::-1])
        return Scene(pixels, boxes, self.labels, self.truth, masks, self.original)

    def zoomed(self, top: int, left: int, height: int, width: int) -> Scene:
        """The window of ``height`` × ``width`` pixels from there, stretched to the size of the whole.

        What has its middle outside is left out, the rest cut at the edges.
        """
        boxes = self.boxes - np.array([left, top, left, top], np.float32)
        room = np.array([width, height], np.float32)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        kept = ((middle > 0) & (middle < room)).all(1)
        window = np.s_[top : top + height, left : left + width]
        masks = None if self.masks is None else self.masks[kept][(slice(None), *window)]
        boxes = boxes[kept].clip(0, np.concatenate([room, room]))
        part = Scene(self.image[window], boxes, self.labels[kept], self.truth, masks, self.original)
        return part.resized(*self.image.shape[:2])


@dataclass(frozen=True)
class SceneFiles:
    """Image files and what is known of each; ``read(i)`` makes a `Scene`."""

    paths: Sequence[Path]
    truths: Sequence[list[Annotation] | None]
    sizes: Sequence[tuple[int, int] | None]
    """Height and width, where the annotations say them."""
    with_masks: bool

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Scene:
        """Read the image and decode its masks; raises `DataError` with the path."""
        told, truth = self.sizes[index], self.truths[index]
        pixels = images.read_image(self.paths[index], size=told)
        size = pixels.shape[0], pixels.shape[1]
        if told is not None and told != size:
            what = f"is {size[1]} × {size[0]} pixels, its annotations are of {told[1]} × {told[0]}"
            raise DataError(f"{self.paths[index]}: {what}; repair them, or leave the image out with --skip-bad")
        single = [a for a in truth or () if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
        corners = [(a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]) for a in single]
        boxes = np.asarray(corners, np.float32).reshape(-1, 4)
        labels = np.asarray([a["category_id"] for a in single], np.int64)
        masks = None
        if self.with_masks:
            decoded = [decode(encode(a, *size, self.paths[index])) for a in single]
            masks = np.stack(decoded) if decoded else np.zeros((0, *size), np.uint8)
        return Scene(pixels, boxes, labels, truth, masks, size)


def open_scenes(data: str, split: Split, *, with_masks: bool) -> SceneFiles:
    """Open images with boxes.

    - A COCO file, ``x.json``, in one piece; or a folder with ``train.json`` and ``val.json``, there or in
      ``annotations/``, also as ``instances_train2017.json``, or with ``train/_annotations.coco.json``. The images are looked
      for beside the file, above ``annotations/``, in ``images/``, and in the folder named like the part.
    - A Pascal VOC folder: ``Annotations/*.xml``, ``JPEGImages``, and ``ImageSets/Main/train.txt`` (or ``trainval.txt``),
      ``val.txt`` where there are parts. Categories are numbered from 1 in the order of their names; ``difficult`` objects
      count as crowds.
    - A folder of images, without boxes, or with ``train/`` and ``val/``; or a COCO file without annotations: to distill on.

    Raises:
        DataError: there is none of these, an image is missing, or ``with_masks`` and there are none.
    """
    path = Path(data)
    if path.is_file() and path.suffix == ".json":
        found = read_coco(path, split, whole=False)
    elif (path / "Annotations").is_dir():
        paths, truths = read_voc(path, split)
        found = paths, [*truths], [None] * len(paths)
    elif path.is_dir():
        found = _from_folder(path, split)
    else:
        raise DataError(f"{data}: {TAKES}")
    files = SceneFiles(*found, with_masks)
    if not files.paths:
        raise DataError(f"{data}: no images for the split '{split}'; {TAKES}")
    known = [annotation for truth in files.truths for annotation in truth or ()]
    if with_masks and known and not any("segmentation" in annotation for annotation in known):
        raise DataError(f"{data}: has boxes but no 'segmentation' (polygons or RLE): is it for --task detection?")
    return files


def encode(annotation: Annotation, height: int, width: int, where: object = "") -> Any:
    """The mask of a COCO annotation (polygons, run lengths, or the box where it has none) as compressed RLE."""
    coder = require("pycocotools.mask", "detection")
    shape, number = annotation.get("segmentation"), annotation.get("id", "?")
    try:
        if isinstance(shape, dict) and [*shape["size"]] != [height, width]:
            raise DataError(f"{where}: annotation {number} has a mask of size {shape['size']}, the image {[height, width]}")
        if not shape:
            x, y, w, h = annotation["bbox"]
            shape = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if isinstance(shape, list):
            sides = (width, height)  # pycocotools goes along every pixel of an edge, and beyond memory where that is far
            if not all(-sides[i % 2] <= place <= 2 * sides[i % 2] for polygon in shape for i, place in enumerate(polygon)):
                raise DataError(f"{where}: annotation {number} has a segmentation far outside of the image, {width} × {height}")
            return coder.merge(coder.frPyObjects(shape, height, width))
        check_runs(shape["counts"], height * width)
        return coder.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
    except DataError:
        raise
    except Exception as error:  # pycocotools raises this very class
        raise DataError(f"{where}: annotation {number} has a segmentation that is none") from error


def decode(rle: Any) -> NDArray[np.uint8]:
    """The mask uint8 [H, W] of a compressed RLE."""
    found: NDArray[np.uint8] = require("pycocotools.mask", "detection").decode(rle)
    return found


def _stretch(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    rows = (np.arange(height) + 0.5) * mask.shape[0] / height
    columns = (np.arange(width) + 0.5) * mask.shape[1] / width
    found: NDArray[np.uint8] = mask[rows.astype(int)][:, columns.astype(int)]
    return found


def _from_folder(path: Path, split: Split) -> Listing:
    file = coco_file(path, split)
    if file is not None:
        return read_coco(file, split, whole=True)
    if (path / ROBOFLOW).is_file():
        return read_coco(path / ROBOFLOW, split, whole=False)
    folder = part_folder(path, split)
    found = images.find_images(folder)
    numbers = held_out(len(found), split) if folder == path else range(len(found))
    return [found[i] for i in numbers], [None for _ in numbers], [None for _ in numbers]
