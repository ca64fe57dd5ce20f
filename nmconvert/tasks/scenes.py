"""Images with boxes and masks: COCO JSON, Pascal VOC XML, or a folder of images without either."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from nmconvert.errors import DataError
from nmconvert.extras import require
from nmconvert.tasks import images
from nmconvert.tasks.base import Split, held_out, part_folder, part_names

Annotation = dict[str, Any]
"""As in COCO: ``bbox`` [x, y, width, height], ``category_id``, ``area``, ``iscrowd``, and ``segmentation`` if there is."""


_TAKES = "detection and segmentation take a COCO file (.json), a folder with one, or a Pascal VOC folder"


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
    with_masks: bool

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Scene:
        """Read the image and decode its masks; raises `DataError` with the path."""
        pixels, truth = images.read_image(self.paths[index]), self.truths[index]
        size = (pixels.shape[0], pixels.shape[1])
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
      ``annotations/``, also as ``instances_train2017.json``. The images are looked for beside the file, in ``images/``, and
      in the folder named like the part.
    - A Pascal VOC folder: ``Annotations/*.xml``, ``JPEGImages``, and ``ImageSets/Main/train.txt``, ``val.txt`` where there
      are parts. Categories are numbered from 1 in the order of their names; ``difficult`` objects count as crowds.
    - A folder of images, without boxes, or with ``train/`` and ``val/``; or a COCO file without annotations: to distill on.

    Raises:
        DataError: there is none of these, an image is missing, or ``with_masks`` and there are none.
    """
    path = Path(data)
    if path.is_file() and path.suffix == ".json":
        files = _from_coco(path, (path.parent,), split, whole=False)
    elif (path / "Annotations").is_dir():
        files = _from_voc(path, split)
    elif path.is_dir():
        files = _from_folder(path, split)
    else:
        raise DataError(f"{data}: {_TAKES}")
    if not files.paths:
        raise DataError(f"{data}: no images for the split '{split}'; {_TAKES}")
    known = [annotation for truth in files.truths for annotation in truth or ()]
    if with_masks and known and not any("segmentation" in annotation for annotation in known):
        raise DataError(f"{data}: has boxes but no 'segmentation' (polygons or RLE): is it for --task detection?")
    return SceneFiles(files.paths, files.truths, with_masks)


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
            return coder.merge(coder.frPyObjects(shape, height, width))
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


def _from_folder(path: Path, split: Split) -> SceneFiles:
    places = [path, path / "annotations"]
    for part in part_names(split):
        for place in places:
            for file in (place / f"{part}.json", *sorted(place.glob(f"instances_{part}*.json"))):
                if file.is_file():
                    roots = (path, path / part, path / file.stem.removeprefix("instances_"))
                    return _from_coco(file, roots, split, whole=True)
    folder = part_folder(path, split)
    found = images.find_images(folder)
    numbers = held_out(len(found), split) if folder == path else range(len(found))
    return SceneFiles([found[i] for i in numbers], [None for _ in numbers], False)


def _from_coco(file: Path, roots: Iterable[Path], split: Split, *, whole: bool) -> SceneFiles:
    try:
        content = json.loads(file.read_text("utf-8"))
        entries = content["images"]
        known = "annotations" in content  # COCO's own lists of test images come without
        by_image: dict[Any, list[Annotation]] = {entry["id"]: [] for entry in entries}
        for annotation in content["annotations"] if known else ():
            box = annotation["bbox"]
            complete = {"area": box[2] * box[3], "iscrowd": 0} | annotation
            if annotation["image_id"] not in by_image:
                number, image = annotation.get("id", "?"), annotation["image_id"]
                raise DataError(f"{file}: annotation {number} is of image {image}, which is none of its images")
            by_image[annotation["image_id"]].append(complete | {"category_id": int(annotation["category_id"])})
        names = [entry["file_name"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{file}: is no COCO file with images and annotations: {type(error).__name__} {error}") from error
    roots = [*roots, *(root / "images" for root in roots)]
    root = next((r for r in roots if names and (r / names[0]).is_file()), roots[0])
    numbers = range(len(names)) if whole else held_out(len(names), split)
    truths = [by_image[entries[i]["id"]] if known else None for i in numbers]
    return SceneFiles([root / names[i] for i in numbers], truths, False)


def _from_voc(path: Path, split: Split) -> SceneFiles:
    trees = {}
    for file in sorted((path / "Annotations").glob("*.xml")):
        try:
            trees[file.stem] = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise DataError(f"{file}: is no readable XML: {error}") from error
    names = {o.findtext("name", "") for tree in trees.values() for o in tree.iter("object")}
    classes = {name: i + 1 for i, name in enumerate(sorted(names))}
    lists = [path / "ImageSets" / "Main" / f"{part}.txt" for part in part_names(split)]
    listed = next((file.read_text().split() for file in lists if file.is_file()), None)
    if listed is not None and (missing := set(listed) - set(trees)):
        raise DataError(f"{path}: no Annotations/{min(missing)}.xml, though ImageSets lists it")
    chosen = listed if listed is not None else [[*trees][i] for i in held_out(len(trees), split)]
    paths = [path / "JPEGImages" / (trees[stem].findtext("filename") or f"{stem}.jpg") for stem in chosen]
    return SceneFiles(paths, [_voc_objects(trees[stem], classes) for stem in chosen], False)


def _voc_objects(tree: ElementTree.Element, classes: Mapping[str, int]) -> list[Annotation]:
    found: list[Annotation] = []
    for thing in tree.iter("object"):
        try:
            x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError as error:
            raise DataError(f"{tree.findtext('filename')}: an object of the XML has no complete bndbox") from error
        box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]  # VOC counts pixels from 1, and the last one belongs to the box
        crowd = int(thing.findtext("difficult", "0"))
        category = classes[thing.findtext("name", "")]
        found.append({"bbox": box, "category_id": category, "area": box[2] * box[3], "iscrowd": crowd})
    return found
