"""A small detector of digits on canvases: one point a digit, as in CenterNet (Zhou et al. 2019, "Objects as Points").

torchvision's convention: in training mode ``model(images, targets)`` → losses, in eval mode ``model(images)`` → for each
image its boxes, labels and scores. Given one tensor [B, 3, H, W] it returns these stacked, D = 16 detections an image, in one
dict: that is how it is exported to ONNX. Label d + 1 is the digit d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4
SCALE = 16.0  # pixels: the unit of the predicted sizes


def block(inputs: int, width: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """3×3 convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(inputs, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Detector(nn.Module):
    """Convolutions down to every fourth pixel, then for each point: ten classes, and a box."""

    def __init__(self, classes: int = 10, width: int = 64, detections: int = 16) -> None:
        super().__init__()
        self.detections = detections
        self.num_classes = classes + 1  # the background is label 0
        self.stem = nn.Sequential(block(3, 24), block(24, 32, stride=2), block(32, width, stride=2))
        self.body = nn.Sequential(*(block(width, width, dilation=d) for d in (1, 2, 1, 2)))
        self.head = nn.ModuleDict({name: self.branch(width, size) for name, size in (("logits", classes), ("box", 4))})
        nn.init.constant_(self.head["logits"].get_parameter("1.bias"), -4.0)  # few points are a digit

    @staticmethod
    def branch(width: int, outputs: int) -> nn.Sequential:
        """A 3×3 block and a 1×1 convolution."""
        return nn.Sequential(block(width, width), nn.Conv2d(width, outputs, 1))

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The raw maps [B, ?, H/4, W/4]: ``logits``, and ``box``, the distances from the point to its four sides / 16."""
        features = self.body(self.stem(images * 2 - 1))
        return {name: branch(features).float() for name, branch in self.head.items()}  # pixels need more than bf16 has

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        raw: bool = False,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in eval mode, or with ``raw`` the maps."""
        found = self.maps(images if isinstance(images, Tensor) else torch.stack([*images]))
        if raw:
            return found
        if self.training:
            if targets is None:
                raise ValueError("a detector in training mode needs targets; call eval() for detections")
            return self.losses(found, targets)
        detections = self.decode(found)
        if isinstance(images, Tensor):
            return detections
        return [{name: value[i] for name, value in detections.items()} for i in range(len(images))]

    def decode(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The D highest local maxima: ``boxes`` [B, D, 4], ``labels`` and ``scores`` [B, D]."""
        scores, labels, points = self.peaks(found["logits"])
        width = found["logits"].shape[3]
        sides = at(found["box"], points) * SCALE
        centre = (torch.stack([points % width, points // width], -1) + 0.5) * STRIDE
        boxes = torch.cat([centre - sides[..., :2], centre + sides[..., 2:]], -1)
        return {"boxes": boxes, "labels": labels, "scores": scores}

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score, label and flat position [B, D] of the highest local maxima of ``logits`` [B, classes, h, w]."""
        heat = logits.sigmoid()
        peaks = heat * (F.max_pool2d(heat, 3, stride=1, padding=1) == heat)
        scores, places = peaks.flatten(1).topk(self.detections)
        area = heat.shape[2] * heat.shape[3]
        return scores, places // area + 1, places % area

    def losses(self, found: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The penalty-reduced focal loss of the points, and the L1 distance of the boxes, both per digit."""
        logits = found["logits"]
        heat = torch.zeros_like(logits)
        for number, target in enumerate(targets):
            splat(heat[number], target["boxes"], target["labels"])
        count = sum(len(t["boxes"]) for t in targets)
        images, points, boxes = centres(targets, logits.shape[2], logits.shape[3])
        sides = at(found["box"], points[:, None], images)[:, 0]
        middle = (torch.stack([points % logits.shape[3], points // logits.shape[3]], -1) + 0.5) * STRIDE
        goal = torch.cat([middle - boxes[:, :2], boxes[:, 2:] - middle], -1) / SCALE
        return {"points": focal(logits, heat) / max(count, 1), "boxes": (sides - goal).abs().sum() / max(count, 1)}


def at(values: Tensor, points: Tensor, images: Tensor | None = None) -> Tensor:
    """``values`` [B, C, h, w] at the flat positions ``points`` [B, D] (of ``images`` [B]) → [B, D, C]."""
    flat = values.flatten(2).transpose(1, 2)
    flat = flat if images is None else flat[images]
    return flat.gather(1, points[..., None].expand(-1, -1, flat.shape[2]))


def centres(targets: Sequence[dict[str, Tensor]], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """For all boxes of a batch: the number of the image [n], the flat position of its centre [n], the box [n, 4]."""
    images = torch.cat([t["labels"].new_full((len(t["boxes"]),), i) for i, t in enumerate(targets)])
    boxes = torch.cat([t["boxes"] for t in targets])
    columns, rows = ((boxes[:, :2] + boxes[:, 2:]) / 2 / STRIDE).long().unbind(1)
    return images, rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1), boxes


def splat(heat: Tensor, boxes: Tensor, labels: Tensor) -> None:
    """Draw into ``heat`` [classes, h, w] a Gaussian of a tenth of the box for each box, 1 at its centre."""
    rows = torch.arange(heat.shape[1], device=heat.device)[:, None]
    columns = torch.arange(heat.shape[2], device=heat.device)[None]
    for box, label in zip(boxes, labels, strict=True):
        x, y = ((box[:2] + box[2:]) / 2 / STRIDE).long()
        x, y = x.clamp(0, heat.shape[2] - 1), y.clamp(0, heat.shape[1] - 1)
        sigma = ((box[2:] - box[:2]).mean() / STRIDE / 8).clamp(min=0.5)
        drawn = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))
        heat[label - 1] = torch.maximum(heat[label - 1], drawn)


def focal(logits: Tensor, heat: Tensor) -> Tensor:
    """CenterNet's equation (1), summed: α = 2, β = 4."""
    chance = logits.sigmoid()
    hit = (1 - chance) ** 2 * F.logsigmoid(logits)
    miss = (1 - heat) ** 4 * chance**2 * F.logsigmoid(-logits)
    return -torch.where(heat == 1, hit, miss).sum()


def detector() -> Detector:
    """The detector that ``detector.pt`` belongs to."""
    return Detector()
