"""Scikit-learn's digits on canvases, as COCO files with boxes and masks: ``python -m sample_models.digit_scenes OUT``.

Each canvas has 64×64 pixels and one to five digits of 14 to 26 pixels, on a gray ground with noise and some strokes. The
last 360 digits, which no training image shows, are on the 300 images of ``val.json``; the others on the 1,500 of
``train.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

SIDE = 64
PARTS = {"train": 1500, "val": 300}
TEST_DIGITS = 360


def scene(digits: NDArray[np.float64], labels: NDArray[np.int64], rng: Generator) -> tuple[Image.Image, list[Any]]:
    """A canvas, and for each digit on it its label and its mask, bool [64, 64]."""
    canvas = Image.new("L", (SIDE, SIDE), int(rng.integers(20, 110)))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 4)):
        pen.line([int(v) for v in rng.integers(0, SIDE, 4)], fill=int(rng.integers(0, 160)), width=1)
    pixels = np.asarray(canvas).astype(float)
    found: list[tuple[int, NDArray[np.bool_]]] = []
    for _ in range(rng.integers(1, 6)):
        number = int(rng.integers(len(digits)))
        size = int(rng.integers(14, 27))
        digit = Image.fromarray((digits[number] * 255).astype(np.uint8))
        ink = np.asarray(digit.resize((size, size), Image.Resampling.BICUBIC)) / 255
        top, left = (int(v) for v in rng.integers(0, SIDE - size + 1, 2))
        place = (slice(top, top + size), slice(left, left + size))
        if any(mask[place].any() for _, mask in found):
            continue
        pixels[place] += ink * (rng.uniform(140, 250) - pixels[place])
        mask = np.zeros((SIDE, SIDE), bool)
        mask[place] = ink > 0.35
        found.append((int(labels[number]), mask))
    noisy = pixels + rng.normal(0, rng.uniform(2, 14), pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), found


def annotation(number: int, image: int, label: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's entry for one digit: the mask as uncompressed run lengths, down the columns, zeros first."""
    flat = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff([0, *edges, mask.size]).tolist()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [int(v) for v in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)]
    known = {"bbox": box, "area": int(mask.sum()), "segmentation": {"size": [SIDE, SIDE], "counts": counts}}
    return {"id": number, "image_id": image, "category_id": label + 1, "iscrowd": 0} | known


def write(out: Path) -> None:
    """``train.json``, ``val.json`` and ``images`` in ``out``; the same on every machine."""
    bunch = load_digits()
    cut = len(bunch.target) - TEST_DIGITS
    (out / "images").mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate(PARTS.items()):
        rng = np.random.default_rng(seed)
        chosen = slice(0, cut) if part == "train" else slice(cut, None)
        images: list[Any] = []
        annotations: list[Any] = []
        for number in range(count):
            canvas, found = scene(bunch.images[chosen] / 16, bunch.target[chosen], rng)
            name = f"{part}_{number:04d}.png"
            canvas.save(out / "images" / name)
            images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
            annotations += [annotation(len(annotations) + i + 1, number, *one) for i, one in enumerate(found)]
        categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (out / f"{part}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sample_models.digit_scenes OUT")
    write(Path(sys.argv[1]))
