"""Batch norms of averaged weights: what they saw on the way are activations of weights that spread further."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nmconvert.tasks import Batch


@torch.no_grad()
def renew_norms(model: nn.Module, predict: Callable[[Any], Any], batches: Iterable[Batch]) -> None:
    """Estimate the statistics of ``model``'s batch norms anew, each a plain mean over ``batches`` that ``predict`` runs.

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, section 3.2.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    before = [(norm.momentum, norm.state_dict()["num_batches_tracked"].clone()) for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        if batch.size:
            predict(batch.inputs)
    for norm, (momentum, seen) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.state_dict()["num_batches_tracked"].copy_(seen)
        norm.eval()
