"""Average precision of boxes and masks, counted by pycocotools."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nmconvert.errors import DataError
from nmconvert.extras import require
from nmconvert.tasks.coco import Annotation
from nmconvert.tasks.scenes import encode

Found = dict[str, Tensor]
Record = dict[str, Any]
"""One image: its size, the truth and what was found, in the pixels of the file; what ranks exchange."""

MOST = 100  # of one image and one label, as COCO counts


def record(
    truth: Sequence[Annotation], found: Found, original: tuple[int, int], shape: Sequence[int], with_masks: bool
) -> Record:
    """Scale what was found on an image of ``shape`` [h, w] back to its ``original`` size, and encode masks."""
    height, width = original
    best = _best(found["scores"].float(), found["labels"])
    scale = found["boxes"].new_tensor([width / shape[1], height / shape[0]] * 2, dtype=torch.float32)
    kept: dict[str, Any] = {
        "boxes": (found["boxes"][best].float() * scale).cpu().numpy(),
        "labels": found["labels"][best].cpu().numpy(),
        "scores": found["scores"][best].float().cpu().numpy(),
    }
    annotations = [dict(annotation) for annotation in truth]
    if with_masks:
        for annotation in annotations:
            annotation["segmentation"] = encode(annotation, height, width)
        kept["masks"] = _encode_all(found["masks"][best], height, width)
    return {"size": original, "truth": annotations, "found": kept}


def as_annotations(
    target: Found, original: tuple[int, int], shape: Sequence[int], with_masks: bool, label_offset: int = 0
) -> list[Annotation]:
    """The objects of ``target`` (boxes, labels and masks on an image of ``shape``) as COCO would annotate the original."""
    certain = target | {"scores": torch.ones(len(target["labels"]))}
    kept = record((), certain, original, shape, with_masks)["found"]
    objects = []
    for number, result in enumerate(_results(0, kept, "bbox", label_offset)):
        box = {"bbox": result["bbox"], "area": result["bbox"][2] * result["bbox"][3]}
        mask = {"segmentation": kept["masks"][number]} if with_masks else {}
        objects.append({"category_id": result["category_id"], "iscrowd": 0} | box | mask)
    return objects


def average_precision(records: Sequence[Record], kind: str, label_offset: int = 0) -> dict[str, float]:
    """``ap``, ``ap50`` and ``ap75`` in percent, of ``kind`` ``bbox`` or ``segm``."""
    api = require("pycocotools.coco", "detection")
    evaluation = require("pycocotools.cocoeval", "detection")
    annotations = [a | {"image_id": i} for i, one in enumerate(records) for a in one["truth"]]
    if not annotations:
        raise DataError("there is nothing to find on these images: the data has no annotations")
    truth = api.COCO()
    truth.dataset = {
        "images": [{"id": i, "height": one["size"][0], "width": one["size"][1]} for i, one in enumerate(records)],
        "annotations": [a | {"id": number + 1} for number, a in enumerate(annotations)],
        "categories": [{"id": category} for category in sorted({a["category_id"] for a in annotations})],
    }
    results = [result for i, one in enumerate(records) for result in _results(i, one["found"], kind, label_offset)]
    if not results:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with redirect_stdout(io.StringIO()):  # pycocotools prints, and has no switch
        truth.createIndex()
        judge = evaluation.COCOeval(truth, truth.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: 100 * float(judge.stats[place]) for place, name in enumerate(("ap", "ap50", "ap75"))}


def _best(scores: Tensor, labels: Tensor) -> Tensor:
    """The numbers of the `MOST` best of each label, the best of all first."""
    order = scores.argsort(descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool)
    for label in labels.unique():
        kept[(labels[order] == label).nonzero()[:MOST]] = True
    return order[kept]


def _results(image: int, found: Record, kind: str, label_offset: int) -> list[Annotation]:
    boxes = np.concatenate([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1)
    results: list[Annotation] = []
    for number in np.flatnonzero(found["scores"] > 0):
        label, score = int(found["labels"][number]) - label_offset, float(found["scores"][number])
        shape = {"bbox": boxes[number].tolist()} if kind == "bbox" else {"segmentation": found["masks"][number]}
        results.append({"image_id": image, "category_id": label, "score": score} | shape)
    return results


def _encode_all(masks: Tensor, height: int, width: int) -> list[Any]:
    coder = require("pycocotools.mask", "detection")
    if not len(masks):
        return []
    planes = masks.float().reshape(-1, 1, *masks.shape[-2:])
    if planes.shape[-2:] != (height, width):
        planes = F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)
    bits: NDArray[np.uint8] = (planes[:, 0] > 0.5).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return list(coder.encode(np.asfortranarray(bits)))
