"""The real data of the benchmarks, from the folder that NMCONVERT_DATA names, in the formats that nmconvert reads.

    python benchmarks/data.py cifar10|cifar10_choice OUT.npz
    python benchmarks/data.py coco128|coco128_halves|bccd|nuclei|nuclei_choice|multi30k|tinyshakespeare|g2p OUT_FOLDER
    python -m benchmarks.data tinystories|tinystories_told OUT_FOLDER

Each function below makes one of them, and says where nmconvert's own figures for it come from. Boxes are [x, y, width,
height] in pixels, masks are uncompressed COCO RLE, both as the COCO format has them.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from PIL import Image

ROOT = Path(os.environ.get("NMCONVERT_DATA", Path(__file__).parents[2] / "shared" / "data"))
CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th", "resnet56": "resnet56-4bfd9763.th"}
"""The published ResNets of CIFAR-10, in ``ROOT/checkpoints``; their modules are in sample_models/resnet.py."""

Labelled = tuple[np.ndarray, np.ndarray]  # images and labels


def cifar10(out: Path) -> None:
    """``train_images``, ``train_labels``, ``val_images``, ``val_labels``: all 50,000 and 10,000 images, RGB."""
    _save(out, cifar_images("train"), cifar_images("test"))


def cifar10_choice(out: Path) -> None:
    """The same names, of the training images alone, to choose settings by: the first 15,000, and the last 5,000 as ``val``."""
    images, labels = cifar_images("train")
    _save(out, (images[:15000], labels[:15000]), (images[-5000:], labels[-5000:]))


def cifar_images(split: str) -> Labelled:
    """Images [N, 32, 32, 3] in bytes and labels [N] of ``train`` or ``test``."""
    files = sorted((ROOT / "cifar10" / split).glob("*.webp"))
    tiles = [np.asarray(Image.open(f).convert("RGB")).reshape(25, 32, 25, 32, 3) for f in files]
    images = np.concatenate([t.swapaxes(1, 2).reshape(-1, 32, 32, 3) for t in tiles])
    return images, np.load(ROOT / "cifar10" / f"labels_{split}.npy")


def _save(out: Path, train: Labelled, val: Labelled) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, train_images=train[0], train_labels=train[1], val_images=val[0], val_labels=val[1])


def coco128(out: Path) -> None:
    """``val.json`` with the 898 boxes of 128 images, ``val_masks.json`` with exact masks of 100, ``images``.

    Categories of the boxes are 0 to 79 plus one, so that 0 is left for the background; those of the masks are COCO's.
    """
    folder = ROOT / "coco128"
    files = sorted((folder / "images" / "val2017").glob("*.jpg"))
    _copy(out / "images", ((f.name, f.read_bytes()) for f in files))
    images = [_image_entry(int(f.stem), f.name, *Image.open(f).size) for f in files]
    boxes: list[dict[str, Any]] = []
    for entry in images:
        labels = folder / "labels_detection" / "val2017" / f"{Path(entry['file_name']).stem}.txt"
        for line in labels.read_text().splitlines() if labels.exists() else ():
            category, *box = (float(x) for x in line.split())
            cx, cy, w, h = np.array(box) * np.array([entry["width"], entry["height"]] * 2)
            boxes.append(_annotation(len(boxes) + 1, entry["id"], int(category) + 1, [cx - w / 2, cy - h / 2, w, h]))
    _write(out / "val.json", images, boxes, [{"id": i + 1, "name": str(i)} for i in range(80)])
    panoptic = json.loads((folder / "panoptic_val2017.json").read_text())
    things = {c["id"]: c["name"] for c in panoptic["categories"] if c["isthing"]}
    _coco128_masks(out, folder, {entry["id"]: entry for entry in images}, panoptic, things)


def coco128_halves(out: Path) -> None:
    """The same boxes in two parts: ``train.json``, the first 64 images, to learn from, and ``val.json``, the others."""
    coco128(out)
    whole = json.loads((out / "val.json").read_text())
    for part, images in (("train", whole["images"][:64]), ("val", whole["images"][64:])):
        ids = {image["id"] for image in images}
        _write(out / f"{part}.json", images, [a for a in whole["annotations"] if a["image_id"] in ids], whole["categories"])


def _coco128_masks(out: Path, folder: Path, images: dict[int, Any], panoptic: Any, things: dict[int, str]) -> None:
    found: list[dict[str, Any]] = []
    used: list[dict[str, Any]] = []
    for entry in panoptic["annotations"]:
        used.append(images[entry["image_id"]])
        pixels = np.asarray(Image.open(folder / "panoptic_val2017" / entry["file_name"]).convert("RGB")).astype(np.int64)
        ids = pixels @ np.array([1, 256, 65536])
        for segment in entry["segments_info"]:
            if segment["category_id"] in things:
                mask, crowd = ids == segment["id"], segment["iscrowd"]
                box = [float(v) for v in segment["bbox"]]
                category = segment["category_id"]
                found.append(_annotation(len(found) + 1, entry["image_id"], category, box, rle(mask), crowd))
    _write(out / "val_masks.json", used, found, [{"id": i, "name": name} for i, name in things.items()])


def bccd(out: Path) -> None:
    """``train.json`` (205 images), ``val.json`` (87), ``test.json`` (72) and ``images``: cells in blood, 3 classes."""
    whole = json.loads((ROOT / "bccd" / "annotations_coco.json").read_text())
    with ZipFile(ROOT / "bccd" / "images_320x240.zip") as stored:
        names = {Path(n).name: n for n in stored.namelist() if n.endswith(".jpg")}
        _copy(out / "images", ((short, stored.read(name)) for short, name in names.items()))
    for split in ("train", "val", "test"):
        images = [image for image in whole["images"] if image["split"] == split]
        ids = {image["id"] for image in images}
        annotations = [a for a in whole["annotations"] if a["image_id"] in ids]
        _write(out / f"{split}.json", images, annotations, whole["categories"])


def nuclei(out: Path) -> None:
    """``train.json`` (267 images) and ``val.json`` (67), ``images``: nuclei of cells, one class, masks."""
    with np.load(ROOT / "nuclei_dsb2018" / "nuclei_dsb2018_256.npz") as stored:
        pixels, labels, n_train = stored["images"], stored["labels"], int(stored["n_train"])
    _nuclei(out, pixels, labels, {"train": range(n_train), "val": range(n_train, len(pixels))})


def nuclei_choice(out: Path) -> None:
    """The same of the training images alone, to choose settings by: the first 200, and the other 67 as ``val``."""
    with np.load(ROOT / "nuclei_dsb2018" / "nuclei_dsb2018_256.npz") as stored:
        pixels, labels, n_train = stored["images"], stored["labels"], int(stored["n_train"])
    _nuclei(out, pixels, labels, {"train": range(200), "val": range(200, n_train)})


def _nuclei(out: Path, pixels: np.ndarray, labels: np.ndarray, parts: dict[str, range]) -> None:
    (out / "images").mkdir(parents=True, exist_ok=True)
    for part, numbers in parts.items():
        images: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for number in numbers:
            Image.fromarray(pixels[number]).save(out / "images" / f"{number:03d}.png")
            images.append(_image_entry(number, f"{number:03d}.png", *pixels[number].shape[::-1]))
            for instance in range(1, int(labels[number].max()) + 1):
                mask = labels[number] == instance
                if mask.any():
                    found.append(_annotation(len(found) + 1, number, 1, _box_of(mask), rle(mask)))
        _write(out / f"{part}.json", images, found, [{"id": 1, "name": "nucleus"}])


def multi30k(out: Path) -> None:
    """``train.en``, ``train.de``, ``val.*`` and ``test.*`` (test_2016_flickr), a sentence a line."""
    for language in ("en", "de"):
        for source, part in (("train", "train"), ("val", "val"), ("test_2016_flickr", "test")):
            _unpack(ROOT / "multi30k" / f"{source}.{language}.gz", out / f"{part}.{language}")


def tinystories(out: Path) -> None:
    """``test.npz``: the ids of 155 stories for the tokeniser of stories260K, each a document of at most 512 ids."""
    out.mkdir(parents=True, exist_ok=True)
    with np.load(ROOT / "text" / "tinystories_sample_tok512.npz") as stored:
        np.savez(out / "test.npz", ids=stored["ids"], lengths=stored["lengths"])


def tinystories_told(out: Path) -> None:
    """The same, and ``train.npz`` and ``val.npz``: 8,192 and 64 stories that stories260K tells itself, eight minutes' work.

    They are as long as those that are measured, 512 ids at most: what was told 256 of taught nothing about the places after.

    Its training text is not to be had here, and a teacher needs none (Liu et al. 2023, "LLM-QAT: data-free quantization aware
    training for large language models").
    """
    from benchmarks.models.llama import told

    tinystories(out)
    stories = told(ROOT / "checkpoints" / "stories260K.pt", count=8256, length=512)
    for part, some in (("train", stories[:8192]), ("val", stories[8192:])):
        np.savez(out / f"{part}.npz", ids=np.concatenate(some), lengths=np.array([len(story) for story in some]))


def tinyshakespeare(out: Path) -> None:
    """``train.txt`` (the first nine tenths) and ``val.txt``."""
    text = gzip.decompress((ROOT / "text" / "tinyshakespeare.txt.gz").read_bytes())
    cut = len(text) * 9 // 10
    _copy(out, (("train.txt", text[:cut]), ("val.txt", text[cut:])))


def g2p(out: Path) -> None:
    """``g2p.pt``, the published weights under the names of `benchmarks.models.g2p`; ``symbols.json`` and ``words.tsv``."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    names = {"fc_w": "fc.weight", "fc_b": "fc.bias"}
    for short, half in (("enc", "encoder"), ("dec", "decoder")):
        names[f"{short}_emb"] = f"{half}.embedding.weight"
        for part, name in (("w", "weight"), ("b", "bias")):
            names |= {f"{short}_{part}_{side}": f"{half}.gru.{name}_{side}_l0" for side in ("ih", "hh")}
    with np.load(ROOT / "g2p" / "g2p_en_gru_checkpoint20.npz") as stored:
        torch.save({name: torch.from_numpy(stored[key]) for key, name in names.items()}, out / "g2p.pt")
    (out / "symbols.json").write_bytes((ROOT / "g2p" / "symbols.json").read_bytes())
    _unpack(ROOT / "g2p" / "cmudict_20k.tsv.gz", out / "words.tsv")


def rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths of a mask [H, W]: down the columns, zeros first."""
    flat = np.concatenate([[False], mask.T.ravel().astype(bool)])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": [*mask.shape], "counts": np.diff([0, *edges, mask.size]).tolist()}


def _box_of(mask: np.ndarray) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(v) for v in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)]


def _image_entry(number: int, name: str, width: int, height: int) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": width, "height": height}


def _annotation(
    number: int, image: int, category: int, box: Iterable[float], mask: dict[str, Any] | None = None, crowd: int = 0
) -> dict[str, Any]:
    x, y, w, h = (float(v) for v in box)
    area = sum(mask["counts"][1::2]) if mask else w * h
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": [x, y, w, h]}
    return entry | {"area": area, "iscrowd": crowd} | ({"segmentation": mask} if mask else {})


def _write(path: Path, images: list[Any], annotations: list[Any], categories: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _copy(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files:
        (folder / name).write_bytes(content)


def _unpack(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.decompress(source.read_bytes()))


MADE = (
    cifar10, cifar10_choice, coco128, coco128_halves, bccd, nuclei, nuclei_choice, multi30k, tinystories, tinystories_told,
    tinyshakespeare, g2p,
)  # fmt: skip
SETS = {function.__name__: function for function in MADE}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SETS:
        sys.exit(f"usage: python benchmarks/data.py {{{','.join(SETS)}}} OUT")
    SETS[sys.argv[1]](Path(sys.argv[2]))
