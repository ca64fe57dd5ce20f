"""Batch norms: which ones a module has, and their running statistics estimated anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms of ``module`` that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def estimated_anew(found: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within, each of ``found`` uses its batch's statistics; the running ones are then a plain mean over the batches."""
    before = [(norm.momentum, norm.training, norm.state_dict()["num_batches_tracked"].clone()) for norm in found]
    for norm in found:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    try:
        yield
    finally:
        for norm, (momentum, training, seen) in zip(found, before, strict=True):
            norm.momentum = momentum
            norm.state_dict()["num_batches_tracked"].copy_(seen)
            norm.train(training)
