"""The fine-tuning stage: SR-STE in one loop for all tasks. `nmconvert.train.loop` is the loop."""

from __future__ import annotations

from nmconvert.train.loop import Training, train
from nmconvert.train.settings import Settings
from nmconvert.train.stage import FinetuneResult, finetune

__all__ = ["FinetuneResult", "Settings", "Training", "finetune", "train"]
