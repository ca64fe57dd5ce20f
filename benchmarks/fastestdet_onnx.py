"""FastestDet as a bare ONNX file on coco128: its inputs, its plan, and AP50 of what it says. Used by calibration.py."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image
from torch import Tensor

from benchmarks.data import ROOT
from benchmarks.models.fastestdet import suppressed
from nmconvert.onnx_graph import tensor_infos
from nmconvert.pattern import Pattern
from nmconvert.plan import make_plan
from nmconvert.tensor import Row

SIDE, CELLS, SCORE = 352, 22, 0.001


@dataclass(frozen=True)
class Sample:
    """One image as the graph takes it, [1, 3, 352, 352], and its boxes (class, cx, cy, w, h), relative."""

    pixels: Tensor
    boxes: NDArray[np.float64]


def load() -> ModelProto:
    """The published file."""
    return onnx.load(ROOT / "checkpoints" / "fastestdet_coco.onnx")


def samples() -> list[Sample]:
    """The 128 images, BGR in 0..1, resized as they are, in bytes."""
    found = []
    for file in sorted((ROOT / "coco128" / "images" / "val2017").glob("*.jpg")):
        image = resized(np.asarray(Image.open(file).convert("RGB"))[:, :, ::-1])
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        labels = ROOT / "coco128" / "labels_detection" / "val2017" / f"{file.stem}.txt"
        lines = labels.read_text().splitlines() if labels.exists() else []
        found.append(Sample(pixels, np.array([line.split() for line in lines], dtype=float).reshape(-1, 5)))
    return found


def resized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``image`` [H, W, 3] as [352, 352, 3], by OpenCV's bilinear interpolation of bytes in 11 bits, with which the published
    figures were measured: AP50 35.67, AP 19.07. Interpolated in floating point it is 35.71 and 19.00.
    """
    left, right, first, second = _taps(image.shape[1])
    wide = image.astype(np.int64)
    wide = wide[:, left] * first[:, None] + wide[:, right] * second[:, None]
    left, right, first, second = _taps(image.shape[0])
    shares = [share[:, None, None] * (wide[place] >> 4) >> 16 for place, share in ((left, first), (right, second))]
    return ((shares[0] + shares[1] + 2) >> 2).astype(np.uint8)


def _taps(size: int) -> tuple[NDArray[np.int64], ...]:
    """For each of 352 places along ``size`` pixels: two pixels, and their shares in 2048ths."""
    place = ((np.arange(SIDE) + 0.5) * (size / SIDE) - 0.5).astype(np.float32).clip(0, size - 1)
    low = np.floor(place).astype(np.int64)
    share = np.rint((place - low) * 2048).astype(np.int64)
    return low, np.minimum(low + 1, size - 1), 2048 - share, share


def rows(model: ModelProto, pattern: Pattern) -> tuple[Row, ...]:
    """What the plan prunes."""
    return make_plan(tensor_infos(model), pattern).pruned


def ap50(model: ModelProto, data: list[Sample]) -> float:
    """COCO's AP at an overlap of one half, in percent, on a canvas of 352×352."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    truth: list[dict[str, object]] = []
    found: list[dict[str, object]] = []
    for number, sample in enumerate(data):
        for kind, cx, cy, w, h in sample.boxes:
            box = [SIDE * v for v in (cx - w / 2, cy - h / 2, w, h)]
            truth.append(_annotation(len(truth) + 1, number, int(kind), box))
        output = torch.from_numpy(session.run(None, {name: sample.pixels.numpy()})[0])[0]
        found += [{"image_id": number, "category_id": k, "bbox": b, "score": s} for b, s, k in _decode(output)]
    with redirect_stdout(StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(len(data))],
            "annotations": truth,
            "categories": [{"id": i} for i in range(80)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[1])


def _annotation(number: int, image: int, kind: int, box: list[float]) -> dict[str, object]:
    return {
        "id": number, "image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
    }  # fmt: skip


def _decode(output: Tensor) -> list[tuple[list[float], float, int]]:
    """[85, 22, 22] → the 100 best boxes [x, y, w, h] in pixels with score and class (data README, "fastestdet")."""
    row, column = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    best, label = output[5:].max(0)
    score = (output[0] ** 0.6 * best**0.4).flatten()
    centre = torch.stack([(output[1].tanh() + column) / CELLS, (output[2].tanh() + row) / CELLS], -1).reshape(-1, 2)
    size = output[3:5].sigmoid().permute(1, 2, 0).reshape(-1, 2)
    boxes = torch.cat([centre - size / 2, centre + size / 2], 1) * SIDE
    keep = score > SCORE
    boxes, score, labels = boxes[keep], score[keep], label.flatten()[keep]
    kept = suppressed(boxes, score, labels)[:100]
    corners = boxes[kept]
    shapes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    return list(zip(shapes.tolist(), score[kept].tolist(), labels[kept].tolist(), strict=True))
