"""The batches of an epoch: which samples each process takes at each step, whoever was killed in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from nmconvert import dist
from nmconvert.errors import DataError, NmconvertError, UsageError
from nmconvert.tasks import Batch, Task
from nmconvert.train.settings import Settings


class Batches:
    """Batches of ``dataset`` for this process; the order is a function of (seed, epoch), and of nothing that went before.

    Batch ``k`` of an epoch is the same samples however many processes share it, and in however many parts. Samples left
    over at the end of an epoch, fewer than a batch, are not used in it.

    Raises:
        UsageError: processes and parts do not divide the batch.
        DataError: the data has fewer samples than a batch.
    """

    def __init__(self, dataset: Any, task: Task, settings: Settings, device: torch.device) -> None:
        shares = dist.world() * settings.accumulate
        if settings.batch % shares:
            raise UsageError(
                f"a batch of {settings.batch} cannot be shared by {dist.world()} processes times {settings.accumulate} "
                f"accumulated parts: give a multiple of {shares}"
            )
        if len(dataset) < settings.batch:
            raise DataError(
                f"the data has {len(dataset)} samples, fewer than a batch of {settings.batch}: give a smaller --batch"
            )
        self.dataset, self.task, self.settings, self.device = dataset, task, settings, device
        self.part = settings.batch // shares
        self.steps = len(dataset) // settings.batch

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[Batch]]:
        """For each step from ``first`` on, this process's share of the batch in ``accumulate`` parts, on the device."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch, seed=self.settings.seed)
        loader = DataLoader(
            self.dataset,
            batch_sampler=_Order(self, epoch, first),
            num_workers=self.settings.workers,
            collate_fn=self.task.collate,
            pin_memory=self.device.type == "cuda",
        )
        parts = iter(loader)
        for _ in range(first, self.steps):
            with _worker_errors():
                read = [next(parts) for _ in range(self.settings.accumulate)]
            yield [batch.to(self.device) for batch in read]


class _Order(Sampler[list[int]]):
    def __init__(self, batches: Batches, epoch: int, first: int) -> None:
        self.batches, self.epoch, self.first = batches, epoch, first

    def __iter__(self) -> Iterator[list[int]]:
        seed, part = self.batches.settings.seed, self.batches.part
        order = np.random.default_rng((seed, self.epoch)).permutation(len(self.batches.dataset))
        for step in range(self.first, self.batches.steps):
            for accumulated in range(self.batches.settings.accumulate):
                share = (step * self.batches.settings.accumulate + accumulated) * dist.world() + dist.rank()
                yield order[share * part : (share + 1) * part].tolist()

    def __len__(self) -> int:
        return (self.batches.steps - self.first) * self.batches.settings.accumulate


def validation_loader(dataset: Any, task: Task, settings: Settings, device: torch.device) -> Iterator[Batch]:
    """The samples that fall to this process: every world-th, all of them where the model is sharded."""
    ranks, rank = (1, 0) if settings.shard else (dist.world(), dist.rank())
    subset = torch.utils.data.Subset(dataset, range(rank, len(dataset), ranks))
    batch = max(1, settings.batch // settings.accumulate // dist.world())
    with _worker_errors():
        for loaded in DataLoader(subset, batch, num_workers=settings.workers, collate_fn=task.collate):
            yield loaded.to(device)


@contextmanager
def _worker_errors() -> Iterator[None]:
    """An error of ours in a process that reads data, which arrives as its whole traceback, becomes one line again."""
    try:
        yield
    except NmconvertError as error:
        last = str(error).strip().splitlines()[-1]
        name = f"{type(error).__name__}: "
        if name not in last:
            raise
        raise type(error)(last.partition(name)[2]) from error
