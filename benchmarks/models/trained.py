"""The modules of the dense models that nobody published: those of sample_models, in sizes that fit the real data.

`benchmarks.dense` trains them; nmconvert finds them as ``benchmarks.models.trained:bccd``, ….
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.detector import Detector, block
from sample_models.gpt import GPT
from sample_models.segmenter import PROTOTYPES, Segmenter
from sample_models.translator import Translator

WORDS = 4000  # pieces of the vocabulary that both languages of Multi30k share


class CoarseSegmenter(Segmenter):
    """Narrower prototypes, and masks compared at their resolution, as YOLACT does: less work where images hold many."""

    def __init__(self, classes: int, width: int, detections: int) -> None:
        super().__init__(classes, width, detections)
        self.draw = nn.Sequential(block(width + 32, 24), nn.Conv2d(24, PROTOTYPES, 1))

    def losses(self, found: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The segmenter's, on masks of half the size."""
        return super().losses(found, [{**t, "masks": F.avg_pool2d(t["masks"].float(), 2)} for t in targets])


def bccd() -> nn.Module:
    """Cells in blood: three classes, up to 48 an image."""
    return Detector(classes=3, width=32, detections=48)


def nuclei() -> nn.Module:
    """Nuclei of cells: one class, up to 100 an image."""
    return CoarseSegmenter(classes=1, width=32, detections=100)


def multi30k() -> nn.Module:
    """Captions, English to German."""
    return Translator(WORDS, width=128, depth=2, heads=4, length=64, dropout=0.1)


def tinyshakespeare() -> nn.Module:
    """Shakespeare, byte by byte."""
    return GPT(width=128, depth=4, heads=4, context=128)
