"""Hugging Face's DETR-like detectors: ``pixel_values`` and ``labels`` in, ``logits`` and ``pred_boxes`` out.

Boxes are centre and size, relative to the image without its padding. ``logits`` have one class more than the model has
labels ("no object", softmax: DETR, YOLOS) or as many (sigmoid: Deformable DETR, RT-DETR).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nmconvert.tasks.base import unwrapped

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_detr(model: Any) -> bool:
    """Whether ``model`` is a Hugging Face detector."""
    model = unwrapped(model)
    return "ForObjectDetection" in type(model).__name__ and hasattr(model, "config")


def loss(model: Any, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """The model's own loss."""
    labels = []
    for image, target in zip(images, targets, strict=True):
        low, high = (target["boxes"] / _size(image)).split(2, 1)
        labels.append({"class_labels": target["labels"], "boxes": torch.cat([(low + high) / 2, high - low], 1)})
    found: Tensor = model(**padded(images), labels=labels).loss
    return found


def predict(model: Any, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """The best class of each query, and its box (x1, y1, x2, y2) in pixels."""
    output = model(**padded(images))
    scores, labels = _probabilities(model, output.logits.float()).max(-1)
    found = []
    for index, image in enumerate(images):
        centre, size = output.pred_boxes[index].float().split(2, 1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], 1) * _size(image)
        found.append({"boxes": boxes, "labels": labels[index], "scores": scores[index]})
    return found


def distill(model: Any, teacher: Any, images: list[Tensor]) -> Tensor:
    """The distance of the class probabilities and of the boxes, query by query, where the teacher sees something."""
    inputs = padded(images)
    with torch.no_grad():
        goal = teacher(**inputs)
        theirs = _probabilities(teacher, goal.logits.float())
    output = model(**inputs)
    ours = _probabilities(model, output.logits.float())
    weight = theirs.amax(-1, keepdim=True)
    classes = F.binary_cross_entropy(ours, theirs, reduction="sum")
    classes = classes - F.binary_cross_entropy(theirs, theirs, reduction="sum")
    boxes = (weight * (output.pred_boxes.float() - goal.pred_boxes.float()).abs()).sum()
    distance: Tensor = (classes + 5 * boxes) / weight.sum().clamp(min=1)
    return distance


def _probabilities(model: Any, logits: Tensor) -> Tensor:
    background = logits.shape[-1] == unwrapped(model).config.num_labels + 1
    return logits.softmax(-1)[..., :-1] if background else logits.sigmoid()


def _size(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return torch.tensor([width, height, width, height], device=image.device, dtype=torch.float32)


def padded(images: list[Tensor]) -> dict[str, Tensor]:
    """What a model is given: the images in one tensor, normalised, and where each of them is."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    mean, std = (torch.tensor(v, device=images[0].device).view(3, 1, 1) for v in (MEAN, STD))
    room = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
    pixels = torch.stack([F.pad((i - mean) / std, pad) for i, pad in zip(images, room, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(i[0], dtype=torch.int64), pad) for i, pad in zip(images, room, strict=True)])
    return {"pixel_values": pixels, "pixel_mask": mask}
