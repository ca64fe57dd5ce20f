"""Pascal VOC: an XML file for each image, and lists of the images of each part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from nmconvert.checkpoint.paths import IMAGES
from nmconvert.errors import DataError
from nmconvert.tasks.base import Split, held_out, part_names
from nmconvert.tasks.coco import Annotation
from nmconvert.tasks.text import read_lines

_DIFFICULT = {"1": 1, "true": 1, "yes": 1} | dict.fromkeys(("", "0", "false", "no", "unspecified"), 0)


def read_voc(path: Path, split: Split) -> tuple[list[Path], list[list[Annotation]]]:
    """The images of ``split`` and their objects as COCO has them; categories count from 1 in the order of their names.

    Raises:
        DataError: the folder has lists of other parts only, a file is missing or broken, or an object lacks something.
    """
    files = sorted((path / "Annotations").glob("*.xml"))
    trees = {file.stem: _parsed(file) for file in files}
    things = {file.stem: [(_name(thing, file), thing) for thing in trees[file.stem].iter("object")] for file in files}
    names = sorted({name for inside in things.values() for name, _ in inside})
    classes = {name: number for number, name in enumerate(names, 1)}
    chosen = _listed(path, split, trees)
    objects = {file.stem: [_object(thing, classes[name], file) for name, thing in things[file.stem]] for file in files}
    return _images(path / "JPEGImages", chosen, trees), [objects[stem] for stem in chosen]


def _parsed(file: Path) -> ElementTree.Element:
    """The tree of an XML file, every tag in small letters."""
    try:
        tree = ElementTree.parse(file).getroot()
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise DataError(f"{file}: is no readable XML: {error}") from error
    for element in tree.iter():
        element.tag = element.tag.lower()
    return tree


def _listed(path: Path, split: Split, trees: Mapping[str, ElementTree.Element]) -> list[str]:
    """The names of the images of ``split``: those of its list, or a share of all where there is no list of any part."""
    folder, wanted = path / "ImageSets" / "Main", [*part_names(split), *(("trainval",) if split == "train" else ())]
    lists = [folder / f"{part}.txt" for part in (*wanted, *part_names("train"), "trainval", *part_names("val"))]
    file = next((file for file in lists if file.is_file()), None)
    if file is None:
        return [[*trees][i] for i in held_out(len(trees), split)]
    if file.stem not in wanted:
        raise DataError(f"{folder}: has {file.name} and none called {'.txt or '.join(wanted)}.txt; name one so")
    names = [name for line in read_lines(file) if (name := line.strip())]
    if missing := set(names) - set(trees):
        raise DataError(f"{path}: no Annotations/{min(missing)}.xml, though ImageSets lists it")
    return names


def _images(folder: Path, stems: Sequence[str], trees: Mapping[str, ElementTree.Element]) -> list[Path]:
    """Each image as its XML names it, or where there is no such file, one that is called as the XML."""
    there = {p.stem: p for p in folder.glob("*") if p.suffix.lower() in IMAGES}
    named = {stem: folder / ((trees[stem].findtext("filename") or "").strip() or f"{stem}.jpg") for stem in stems}
    return [named[stem] if named[stem].is_file() else there.get(stem, named[stem]) for stem in stems]


def _name(thing: ElementTree.Element, file: Path) -> str:
    name = thing.findtext("name", "").strip()
    if not name:
        raise DataError(f"{file}: an object has no name: give it that of its class")
    return name


def _object(thing: ElementTree.Element, category: int, file: Path) -> Annotation:
    try:
        x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise DataError(f"{file}: an object has no complete bndbox") from error
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise DataError(f"{file}: an object has the bndbox {[x1, y1, x2, y2]}, which are no pixels")
    said = thing.findtext("difficult", "").strip()
    if said.lower() not in _DIFFICULT:
        raise DataError(f"{file}: an object is difficult to the degree '{said}'; it has to be 0 or 1")
    box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]  # VOC counts pixels from 1, and the last one belongs to the box
    return {"bbox": box, "category_id": category, "area": box[2] * box[3], "iscrowd": _DIFFICULT[said.lower()]}
