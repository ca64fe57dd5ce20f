"""Instance segmentation: detection (`nmconvert.tasks.detection`) with a mask for each box, measured by COCO's mask AP.

Targets have ``masks`` uint8 [n, H, W]; what the model returns has ``masks`` [d, 1, H, W] or [d, H, W], probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nmconvert.tasks.detection import Detection


@dataclass(frozen=True)
class Segmentation(Detection):
    """The task; its settings are those of detection."""

    name: ClassVar[str] = "segmentation"
    metric: ClassVar[str] = "mask_ap"
    with_masks: ClassVar[bool] = True
