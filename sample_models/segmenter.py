"""A small instance segmenter of digits: the detector, and for each digit a mix of shared prototypes (YOLACT, Bolya 2019).

As `sample_models.detector`, with ``masks`` [D, H, W] of each image: probabilities, zero outside the box.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.detector import STRIDE, Detector, at, block, centres

PROTOTYPES = 16


class Segmenter(Detector):
    """Adds ``mix``, how much of each prototype a point's mask has, and the ``prototypes``, at every second pixel."""

    def __init__(self, classes: int = 10, width: int = 64, detections: int = 16) -> None:
        super().__init__(classes, width, detections)
        self.head["mix"] = self.branch(width, PROTOTYPES)
        self.draw = nn.Sequential(block(width + 32, 48), nn.Conv2d(48, PROTOTYPES, 1))

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of the detector, ``mix`` [B, 16, H/4, W/4], and ``prototypes`` [B, 16, H/2, W/2]."""
        fine = self.stem[:2](images * 2 - 1)
        features = self.body(self.stem[2](fine))
        wide = F.interpolate(features, scale_factor=2.0, mode="nearest")
        found = {name: branch(features).float() for name, branch in self.head.items()}
        return found | {"prototypes": self.draw(torch.cat([wide, fine], 1)).float()}

    def decode(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The detector's, and ``masks`` [B, D, H, W]."""
        detections = super().decode(found)
        _, _, points = self.peaks(found["logits"])
        planes = torch.einsum("bdp,bphw->bdhw", at(found["mix"], points), found["prototypes"])
        masks = F.interpolate(planes, scale_factor=2.0, mode="bilinear", align_corners=False).sigmoid()
        return detections | {"masks": masks * inside(detections["boxes"], masks.shape[2], masks.shape[3])}

    def losses(self, found: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The detector's, and the cross entropy of each mask within its box; the masks may be coarser than the image."""
        images, points, boxes = centres(targets, *found["logits"].shape[2:])
        mix = at(found["mix"], points[:, None], images)[:, 0]
        planes = torch.einsum("np,nphw->nhw", mix, found["prototypes"][images])
        goal = torch.cat([t["masks"] for t in targets]).to(planes.dtype)
        masks = F.interpolate(planes[:, None], goal.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        scale = goal.shape[-1] / (STRIDE * found["logits"].shape[-1])
        within = inside(boxes[None] * scale, *goal.shape[-2:])[0]
        wrong = F.binary_cross_entropy_with_logits(masks, goal, reduction="none") * within
        each = wrong.sum((1, 2)) / within.sum((1, 2)).clamp(min=1)
        return super().losses(found, targets) | {"masks": 2 * each.sum() / max(len(boxes), 1)}


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """``boxes`` [B, D, 4] → 1.0 for the pixels [B, D, height, width] whose middle a box contains, else 0.0."""
    rows = (torch.arange(height, device=boxes.device) + 0.5)[:, None]
    columns = (torch.arange(width, device=boxes.device) + 0.5)[None]
    x1, y1, x2, y2 = (side[..., None, None] for side in boxes.unbind(-1))
    return ((columns > x1) & (columns < x2) & (rows > y1) & (rows < y2)).to(boxes.dtype)


def segmenter() -> Segmenter:
    """The segmenter that ``segmenter.pt`` belongs to."""
    return Segmenter()
