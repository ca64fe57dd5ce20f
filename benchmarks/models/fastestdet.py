"""FastestDet (dog-qiuqiu, BSD-3): the module that the published COCO checkpoint belongs to, and torchvision's convention.

    nmconvert eval fastestdet_coco_ap05_0.2532.pth --model benchmarks/models/fastestdet.py:fastestdet \\
        --task detection --data coco128        # of `benchmarks/data.py coco128`: AP50 35.67, AP 19.07

Its input is BGR in 0..1, 352×352 by plain bilinear resizing; both are done here. Its 22×22 cells each say one box.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, CELLS = 352, 22
SCORE, OVERLAP = 0.001, 0.45


def unit(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = True) -> list[nn.Module]:
    """Convolution, BatchNorm and, if wanted, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else [])]


class Shuffle(nn.Module):
    """A ShuffleNetV2 block; one with a projection halves the size and doubles the channels."""

    def __init__(self, width: int, *, halves: bool) -> None:
        super().__init__()
        stride = 2 if halves else 1
        self.branch_main = nn.Sequential(
            *unit(width, width, 1),
            *unit(width, width, 3, stride=stride, groups=width, relu=False),
            *unit(width, width, 1),
        )
        depthwise = unit(width, width, 3, stride=2, groups=width, relu=False)
        self.branch_proj = nn.Sequential(*depthwise, *unit(width, width, 1)) if halves else None

    def forward(self, x: Tensor) -> Tensor:
        """Of a block that keeps the size, every other channel passes through untouched."""
        if self.branch_proj is not None:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        return torch.cat([x[:, 0::2], self.branch_main(x[:, 1::2])], 1)


class Backbone(nn.Module):
    """ShuffleNetV2 with 4, 8 and 4 blocks."""

    stage2: nn.Sequential
    stage3: nn.Sequential
    stage4: nn.Sequential

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*unit(3, 24, 3, stride=2))
        for stage, width, count in ((2, 24, 4), (3, 48, 8), (4, 96, 4)):
            blocks = [Shuffle(width, halves=number == 0) for number in range(count)]
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """The three stages' outputs, of 44, 22 and 11 cells."""
        x = F.max_pool2d(self.first_conv(x), 3, 2, 1)
        found = []
        for stage in (self.stage2, self.stage3, self.stage4):
            x = stage(x)
            found.append(x)
        return found


class Conv1x1(nn.Module):
    """A 1×1 unit under the name that the checkpoint has for it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Sequential(*unit(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The same number of cells."""
        cells: Tensor = self.conv1x1(x)
        return cells


class Pyramid(nn.Module):
    """One, two and three 5×5 depthwise units side by side."""

    S1: nn.Sequential
    S2: nn.Sequential
    S3: nn.Sequential

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.Conv1x1 = Conv1x1(inputs, width)
        for depth in (1, 2, 3):
            units = [module for _ in range(depth) for module in unit(width, width, 5, groups=width)]
            self.add_module(f"S{depth}", nn.Sequential(*units))
        self.output = nn.Sequential(*unit(3 * width, width, 1, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, 22, 22]."""
        x = self.Conv1x1(x)
        return F.relu(x + self.output(torch.cat([self.S1(x), self.S2(x), self.S3(x)], 1)))


class Branch(nn.Module):
    """A 5×5 depthwise unit and a 1×1 convolution, under the name that the checkpoint has for it."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.conv5x5 = nn.Sequential(*unit(width, width, 5, groups=width), *unit(width, outputs, 1, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, outputs, 22, 22]."""
        cells: Tensor = self.conv5x5(x)
        return cells


class Head(nn.Module):
    """Whether there is something, where, and what."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1x1 = Conv1x1(width, width)
        self.obj_layers, self.reg_layers, self.cls_layers = (Branch(width, size) for size in (1, 4, classes))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``logits`` [B, 1, 22, 22], ``box`` [B, 4, 22, 22], and the class scores [B, 80, 22, 22] before the softmax."""
        x = self.conv1x1(x)
        return {"logits": self.obj_layers(x), "box": self.reg_layers(x), "classes": self.cls_layers(x)}


class FastestDet(nn.Module):
    """The names are the checkpoint's. Label c + 1 is its class c."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        self.num_classes = classes + 1
        self.backbone = Backbone()
        self.SPP = Pyramid(48 + 96 + 192, 96)
        self.detect_head = Head(96, classes)

    def maps(self, pixels: Tensor) -> dict[str, Tensor]:
        """The raw maps of BGR images [B, 3, 352, 352]."""
        fine, middle, coarse = self.backbone(pixels)
        pooled = F.avg_pool2d(fine, 3, 2, 1)
        wide = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        found: dict[str, Tensor] = self.detect_head(self.SPP(torch.cat([pooled, middle, wide], 1)))
        return found

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        raw: bool = False,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """RGB images of any size → losses, detections in their pixels, or with ``raw`` the maps."""
        resized = [F.interpolate(i[None], (SIDE, SIDE), mode="bilinear", align_corners=False) for i in images]
        found = self.maps(torch.cat(resized).flip(1))
        if raw:
            return found
        if self.training:
            assert targets is not None, "FastestDet in training mode needs targets"
            return self.losses(found, targets, [i.shape[-2:] for i in images])
        return [self.detections(*cells) for cells in zip(*self.decode(found), [i.shape[-2:] for i in images], strict=True)]

    def decode(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One relative box [B, 484, 4], score and label [B, 484] for each cell."""
        rows, columns = torch.meshgrid(*(torch.arange(CELLS, device=found["box"].device) for _ in range(2)), indexing="ij")
        dx, dy, w, h = found["box"].unbind(1)
        centre = torch.stack([(dx.tanh() + columns) / CELLS, (dy.tanh() + rows) / CELLS], -1)
        size = torch.stack([w, h], -1).sigmoid()
        chance, label = found["classes"].softmax(1).max(1)
        score = found["logits"].sigmoid()[:, 0] ** 0.6 * chance**0.4
        return torch.cat([centre - size / 2, centre + size / 2], -1).flatten(1, 2), score.flatten(1), label.flatten(1) + 1

    def detections(self, boxes: Tensor, scores: Tensor, labels: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        """What is left of the cells of one image of ``shape`` [h, w] after suppression, in its pixels."""
        boxes = boxes * boxes.new_tensor([shape[1], shape[0], shape[1], shape[0]])
        kept = suppressed(boxes, scores, labels)
        return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}

    def losses(
        self, found: dict[str, Tensor], targets: Sequence[dict[str, Tensor]], shapes: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        """The cell that holds an object's centre answers for it: cross entropies, and the L1 distance of its box."""
        boxes, _, _ = self.decode(found)
        goal = torch.zeros_like(found["logits"][:, 0]).flatten(1)
        distance, classes, count = boxes.sum() * 0, boxes.sum() * 0, 0
        for number, (target, shape) in enumerate(zip(targets, shapes, strict=True)):
            wanted = target["boxes"] / target["boxes"].new_tensor([shape[1], shape[0], shape[1], shape[0]])
            cell = ((wanted[:, :2] + wanted[:, 2:]) / 2 * CELLS).long().clamp(0, CELLS - 1)
            place = cell[:, 1] * CELLS + cell[:, 0]
            goal[number, place] = 1.0
            distance = distance + (boxes[number, place] - wanted).abs().sum()
            scores = found["classes"][number].flatten(1)[:, place].T
            classes = classes + F.cross_entropy(scores, target["labels"] - 1, reduction="sum")
            count += len(wanted)
        objects = F.binary_cross_entropy_with_logits(found["logits"][:, 0].flatten(1), goal, reduction="sum")
        return {"objects": objects / max(count, 1), "boxes": 4 * distance / max(count, 1), "classes": classes / max(count, 1)}


def suppressed(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """The numbers of the boxes that no better one of the same label overlaps by more than 0.45, the best first."""
    order = scores.argsort(descending=True)
    order = order[scores[order] > SCORE]
    boxes, labels = boxes[order], labels[order]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    clash = (shared / (area[:, None] + area[None] - shared) > OVERLAP) & (labels[:, None] == labels[None])
    keep = torch.ones(len(order), dtype=torch.bool)
    for number in range(len(order)):
        if keep[number]:
            keep[number + 1 :] &= ~clash[number, number + 1 :]
    return order[keep]


def fastestdet() -> FastestDet:
    """The module of ``fastestdet_coco_ap05_0.2532.pth``."""
    return FastestDet()
