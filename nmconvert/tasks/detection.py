"""Object detection, measured by COCO's average precision in percent.

Models follow torchvision's convention: in training mode ``model(images, targets)`` returns a dict of losses, in eval mode
``model(images)`` returns for each image a dict of ``boxes`` [d, 4] (x1, y1, x2, y2 in pixels), ``labels`` [d] and
``scores`` [d]; images are a list of float [3, H, W] in 0..1, targets a list of dicts of boxes and labels. Hugging Face's
DETR-like models are taken, too: ``pixel_values``, ``labels``, ``logits``, ``pred_boxes``. A label is the category id of
the data, 0 stands for the background.

An ONNX file gets one float [B, 3, H, W] and has outputs named ``boxes`` [B, D, 4], ``labels`` [B, D] and ``scores``
[B, D] (``masks`` [B, D, H, W], probabilities, for segmentation); rows that hold nothing have score 0. A model called with
one tensor may return the same as a dict of tensors, which is how it is exported.

For distillation, the forward of a model may take ``raw=True`` and return its raw maps as a dict of tensors [B, ?, h, w]:
``logits`` are compared as probabilities of each class by itself, ``classes``, if there are any, as those of one class for
each place (logits before a softmax), all others by distance; these where the teacher sees something. Without it the
teacher's own detections are the targets.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn

from nmconvert.errors import DataError
from nmconvert.tasks import coco_ap, detr
from nmconvert.tasks.base import IMAGE_MISFIT, Batch, Gather, Predict, Samples, Split, need_labels, on_bad, unwrapped
from nmconvert.tasks.coco_ap import Found
from nmconvert.tasks.scenes import TAKES, Scene, SceneFiles, open_scenes

Target = dict[str, Tensor]
_HARDLY = 5.0  # percent of AP50


@dataclass(frozen=True)
class Detection:
    """The task; see `nmconvert.tasks.scenes.open_scenes` for its data.

    Attributes:
        size: images are stretched to ``size`` × ``size``, and boxes are measured in the pixels of the original; by
            default images are given as they are, as torchvision's models take them.
        flip: augmented images are mirrored at random.
        zoom: augmented images are enlarged at random by up to so much, and cut to their size; helps where images are few.
        label_offset: added to the data's category ids, where the model counts from another number.
        teacher_score: what a teacher finds with less than this score is no target for the model.
        skip_bad: images that cannot be read are left out, with a warning.
    """

    size: int | None = None
    flip: bool = True
    zoom: float = 1.0
    label_offset: int = 0
    teacher_score: float = 0.4
    skip_bad: bool = False

    name: ClassVar[str] = "detection"
    metric: ClassVar[str] = "ap"
    higher_is_better: ClassVar[bool] = True
    misfit: ClassVar[str] = IMAGE_MISFIT
    with_masks: ClassVar[bool] = False

    def dataset(self, data: str, *, split: Split, augment: bool) -> Samples:
        """Samples of a COCO file or folder, a Pascal VOC folder, or a folder of images."""
        files = open_scenes(data, split, with_masks=self.with_masks)
        change = self._augmented if augment and (self.flip or self.zoom > 1) else None
        return Samples(partial(self._read, files), len(files), augment=change, bad=on_bad(self.skip_bad, split))

    def _read(self, files: SceneFiles, index: int) -> Scene:
        scene = files.read(index)
        return scene.resized(self.size, self.size) if self.size else scene

    def _augmented(self, scene: Scene, rng: Generator) -> Scene:
        scene = scene.flipped() if self.flip and rng.random() < 0.5 else scene
        if self.zoom <= 1:
            return scene
        whole = np.array(scene.image.shape[:2])
        part = np.ceil(whole * rng.uniform(1 / self.zoom, 1)).astype(int)
        top, left = rng.integers(0, whole - part + 1)
        return scene.zoomed(top, left, *part)

    def collate(self, samples: Sequence[Scene | None]) -> Batch:
        """Images as a list of float [3, H, W] in 0..1; targets as torchvision has them, and the truth for the metric."""
        kept = [scene for scene in samples if scene is not None]
        pixels = [torch.from_numpy(np.ascontiguousarray(s.image.transpose(2, 0, 1))).float() / 255 for s in kept]
        targets = [self._target(scene) for scene in kept]
        truths = [scene.truth for scene in kept]
        rest = {"targets": targets, "truths": truths, "originals": [scene.original for scene in kept]}
        return Batch(pixels, rest, size=len(kept), labelled=all(truth is not None for truth in truths))

    def _target(self, scene: Scene) -> Target:
        boxes, labels = torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels + self.label_offset)
        masks = {} if scene.masks is None else {"masks": torch.from_numpy(scene.masks)}
        return {"boxes": boxes, "labels": labels} | masks

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The sum of the losses that the model returns."""
        need_labels(batch, TAKES)
        return self._loss(model, batch.inputs, batch.targets["targets"])

    def _loss(self, model: Any, images: list[Tensor], targets: list[Target]) -> Tensor:
        _check_labels(model, targets)
        if detr.is_detr(model):
            return detr.loss(model, images, targets)
        losses = model(images, targets)
        if not isinstance(losses, dict) or not losses:
            raise DataError(f"{type(model).__name__} returned no dict of losses: detection needs torchvision's convention")
        return torch.stack([value.float() for value in losses.values()]).sum()

    def distill(self, model: Any, teacher: Any, batch: Batch) -> Tensor:
        """The distance between the raw maps of both, or the model's loss on what the teacher finds."""
        if detr.is_detr(model):
            return detr.distill(model, teacher, batch.inputs)
        if _gives_maps(model) and _gives_maps(teacher):
            with torch.no_grad():
                goal = teacher(batch.inputs, raw=True)
            return map_distance(model(batch.inputs, raw=True), goal)
        return self._loss(model, batch.inputs, self._found_by(teacher, batch.inputs))

    def taught(self, teacher: Any, batch: Batch) -> Batch:
        """With what the teacher finds for the truth."""
        targets = self._found_by(teacher, batch.inputs)
        truths = [
            coco_ap.as_annotations(target, original, image.shape[-2:], self.with_masks, self.label_offset)
            for target, original, image in zip(targets, batch.targets["originals"], batch.inputs, strict=True)
        ]
        return replace(batch, targets=batch.targets | {"targets": targets, "truths": truths}, labelled=True)

    def _found_by(self, teacher: Any, inputs: list[Tensor]) -> list[Target]:
        """Targets for a loss: what the teacher is sure of."""
        with torch.no_grad():
            found = self.predictor(teacher)(inputs)
        return [self._confident(one, image) for one, image in zip(found, inputs, strict=True)]

    def _confident(self, found: Found, image: Tensor) -> Target:
        sizes = found["boxes"][:, 2:] - found["boxes"][:, :2]
        keep = (found["scores"] >= self.teacher_score) & (sizes > 1).all(1)
        target = {"boxes": found["boxes"][keep], "labels": found["labels"][keep]}
        if self.with_masks:
            target["masks"] = (found["masks"][keep].reshape(-1, *image.shape[-2:]) > 0.5).to(torch.uint8)
        return target

    def predictor(self, model: Any) -> Predict:
        """A list of images → a list of dicts of boxes, labels, scores (and masks)."""
        if detr.is_detr(model):
            return partial(detr.predict, model)
        return partial(_predict, model, ("boxes", "labels", "scores", *(("masks",) if self.with_masks else ())))

    def evaluate(self, predict: Predict, loader: Iterable[Batch], *, gather: Gather = list) -> dict[str, float]:
        """``ap`` (mean over IoU 0.50 to 0.95), ``ap50`` and ``ap75``; for segmentation ``mask_ap`` … as well, in percent."""
        records: list[coco_ap.Record] = []
        for batch in loader:
            if batch.size:
                need_labels(batch, TAKES)
                with torch.inference_mode():
                    found = predict(batch.inputs)
                for index, one in enumerate(found):
                    original, shape = batch.targets["originals"][index], batch.inputs[index].shape[-2:]
                    record = coco_ap.record(batch.targets["truths"][index], one, original, shape, self.with_masks)
                    records.append(record)
        records = gather(records)
        if not records:
            raise DataError("no image to evaluate on: the data is empty, or none of it can be read")
        result = coco_ap.average_precision(records, "bbox", self.label_offset)
        if result["ap50"] < _HARDLY:
            self._suspect_the_offset(records)
        if not self.with_masks:
            return result
        masks = coco_ap.average_precision(records, "segm", self.label_offset)
        return {f"mask_{name}": value for name, value in masks.items()} | result

    def _suspect_the_offset(self, records: Sequence[coco_ap.Record]) -> None:
        """Warn where nearly nothing is right, and much would be if classes were counted from another number."""
        some = [one for one in records if one["truth"]][:200]
        for offset in (self.label_offset - 1, self.label_offset + 1):
            if (ap50 := coco_ap.average_precision(some, "bbox", offset)["ap50"]) > 2 * _HARDLY:
                text = f"hardly a label fits; with --task-arg label_offset={offset} AP50 of {len(some)} images is {ap50:.1f}"
                warnings.warn(f"{text}: do the model and the data number their classes alike?", stacklevel=3)


def map_distance(ours: dict[str, Tensor], goal: dict[str, Tensor]) -> Tensor:
    """Binary cross entropy of the probabilities, and how far all other maps are, weighted by the teacher's.

    ``logits`` are [B, classes, h, w], other maps [B, ?, h, w]; maps of another size are compared everywhere. The cross
    entropy has that of the teacher with itself taken off, so that the distance between equals is zero. Of ``classes``, whose
    softmax over the channels says which one it is, the divergence from the teacher's is taken, of all others the L1
    distance. All is a mean per object that the teacher sees.
    """
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in goal.items()}:
        raise DataError("teacher and model disagree on their raw maps: is the teacher the same architecture?")
    theirs = goal["logits"].float().sigmoid()
    excess = F.binary_cross_entropy_with_logits(ours["logits"].float(), theirs, reduction="none")
    excess = excess - F.binary_cross_entropy_with_logits(goal["logits"].float(), theirs, reduction="none")
    weight = theirs.amax(1, keepdim=True)
    total = excess.sum()
    for name in ours.keys() - {"logits"}:
        distance = _distance(name, ours[name].float(), goal[name].float())
        if distance.shape[2:] == weight.shape[2:]:
            total = total + (weight * distance).sum()
        else:
            total = total + weight.sum() * distance.mean()
    return total / weight.sum().clamp(min=1)


def _distance(name: str, ours: Tensor, goal: Tensor) -> Tensor:
    """[B, 1, h, w] of maps [B, ?, h, w]."""
    if name == "classes":
        return F.kl_div(ours.log_softmax(1), goal.log_softmax(1), reduction="none", log_target=True).sum(1, keepdim=True)
    return (ours - goal).abs().mean(1, keepdim=True)


def _gives_maps(model: Any) -> bool:
    return "raw" in inspect.signature(unwrapped(model).forward).parameters


def _predict(model: Any, names: Sequence[str], images: list[Tensor]) -> list[Found]:
    if isinstance(model, nn.Module):
        output = model(images)
    else:
        if len({image.shape for image in images}) > 1:
            raise DataError("an ONNX file takes images of one size: set size, e.g. --task-arg size=320")
        output = model(torch.stack(images))
    found = _per_image(output, len(images))
    lacking = [name for name in names if any(name not in one for one in found)]
    if lacking or len(found) != len(images):
        raise DataError(f"the model returned no {', '.join(lacking) or 'result for every image'}: is it of another task?")
    return found


def _per_image(output: Any, size: int) -> list[Found]:
    if isinstance(output, dict) and all(isinstance(value, Tensor) and len(value) == size for value in output.values()):
        return [{name: value[i] for name, value in output.items()} for i in range(size)]
    if isinstance(output, list | tuple) and all(isinstance(one, dict) for one in output):
        return list(output)
    raise DataError(f"the model returned {type(output).__name__}, not boxes, labels and scores: is it of another task?")


_COUNTS = (  # ours, Hugging Face's, and torchvision's R-CNNs, RetinaNet and FCOS, and SSDs
    "num_classes",
    "config.num_labels",
    "roi_heads.box_predictor.cls_score.out_features",
    "head.classification_head.num_classes",
    "head.classification_head.num_columns",
)
_WITH_BACKGROUND = _COUNTS[2], _COUNTS[4]  # R-CNNs and SSDs keep label 0 for what is none


def _check_labels(model: Any, targets: Sequence[Target]) -> None:
    model = unwrapped(model)
    classes, labels = _class_count(model), [int(label) for t in targets for label in t["labels"]]
    first = int(any(_found(model, place) is not None for place in _WITH_BACKGROUND))
    lowest, highest = min(labels, default=first), max(labels, default=first)
    if lowest < first or (classes is not None and highest >= classes):
        known = "" if classes is None else f": the model has {classes} classes, {first} to {classes - 1}"
        background = ", 0 being the background" if first else ""
        remedy = "; --task-arg label_offset=N is added to the data's category ids"
        raise DataError(f"label {lowest if lowest < first else highest} is out of range{known}{background}{remedy}")


def _class_count(model: Any) -> int | None:
    """How many labels a model tells apart, where it or a part of it says so."""
    return next((count for place in _COUNTS if isinstance(count := _found(model, place), int)), None)


def _found(model: Any, place: str) -> Any:
    """The attribute of an attribute … of ``model``, None where there is none."""
    return reduce(lambda part, name: getattr(part, name, None), place.split("."), model)
