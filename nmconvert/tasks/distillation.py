"""How far one distribution over classes is from another (Hinton, Vinyals and Dean 2015, section 2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nmconvert.errors import DataError


def kl(ours: Tensor, goal: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(goal / T) ‖ softmax(ours / T)) of logits [..., classes], in float32, a mean over all but the last axis.

    Raises:
        DataError: they differ in shape.
    """
    if ours.shape != goal.shape:
        raise DataError(f"teacher and model disagree on the shape of the logits: {[*goal.shape]}, {[*ours.shape]}")
    student, teacher = (F.log_softmax(logits.float().flatten(0, -2) / temperature, -1) for logits in (ours, goal))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
