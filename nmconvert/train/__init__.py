"""The fine-tuning stage: SR-STE in one loop for all tasks. `nmconvert.train.loop` is the loop."""

from __future__ import annotations

from nmconvert.train.loop import Training, train
from nmconvert.train.settings import OPTIMIZERS, PRECISIONS, Settings

__all__ = ["OPTIMIZERS", "PRECISIONS", "Settings", "Training", "train"]
