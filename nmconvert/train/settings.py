"""What a run is told, and what follows from that alone: the optimiser, the learning rate, the random numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import cos, inf, pi
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from nmconvert.errors import UsageError
from nmconvert.srste import DECOUPLED_DECAY, Anneal, Method

OptimizerName = Literal["sgd", "adamw"]
Precision = Literal["fp32", "bf16", "fp16"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Usual:
    """What goes well with an optimiser, in a few epochs from a dense model: found on the sample models."""

    lr: float
    decay: float
    """λ: in SGD's gradient, where a momentum of 0.9 makes it act tenfold, or decoupled in AdamW."""


USUAL: dict[OptimizerName, Usual] = {"sgd": Usual(0.02, 0.1), "adamw": Usual(1e-3, DECOUPLED_DECAY)}
OPTIMIZER_OF: dict[str, OptimizerName] = {"classification": "sgd"}
"""By task; of all others it is AdamW."""


MOST_EPOCHS, MOST_WORKERS = 1_000_000, 256  # what is beyond is a slip of the finger
MOST_FLOAT = 3e38  # of float32


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        epochs: passes over the training data.
        batch: samples per optimiser step, over all processes and accumulated parts.
        accumulate: in how many parts, one after the other, each process takes its share of a batch.
        optimizer: ``sgd`` (Nesterov momentum 0.9) or ``adamw``; left out: sgd for classification, adamw for all else.
        lr: the highest learning rate; left out: 0.02 for sgd, 1e-3 for adamw.
        weight_decay: of weights with two dimensions or more.
        warmup: share of the steps over which the learning rate rises; then it falls to 0 along half a cosine.
        clip: the largest norm of the gradient of all weights.
        precision: of the forward pass (autocast); weights stay as they are. fp16 scales the loss.
        ema: decay per step of the averaged weights, which are then validated and kept, with batch norms estimated anew after
            each epoch.
        distill: share of the distillation loss where there is a teacher; the rest is the task's own loss.
        method: ``sr-ste``, ``ste`` or ``fixed-mask``.
        decay: λ of SR-STE; left out: 0.1 for sgd, 10 for adamw. The paper's 2e-4 is for a hundred epochs from scratch; within
            a few it hardly acts: ResNet-20 at 1:4 had 74.9 % after the first of five epochs with it, and 83.2 % with 0.1.
        anneal: how λ goes over the steps.
        freeze_masks: share of the steps, at the end, for which masks stand still.
        patience: stop after so many epochs without a better metric, and keep the best epoch; left out: keep the last.
        augment: random changes of the training data, as usual for the task.
        workers: processes that read data, for each training process.
        seed: of everything random.
        save_minutes: time between checkpoints within an epoch.
        shard: spread weights and optimiser over the processes (FSDP2) instead of copying them (DDP).
    """

    epochs: int = 3
    batch: int = 64
    accumulate: int = 1
    optimizer: OptimizerName | None = None
    lr: float | None = None
    weight_decay: float = 1e-4
    warmup: float = 0.05
    clip: float | None = None
    precision: Precision = "fp32"
    ema: float | None = None
    distill: float = 1.0
    method: Method = "sr-ste"
    decay: float | None = None
    anneal: Anneal = "constant"
    freeze_masks: float = 0.0
    patience: int | None = None
    augment: bool = True
    workers: int = 0
    seed: int = 0
    save_minutes: float = 10.0
    shard: bool = False

    def __post_init__(self) -> None:
        checks = {
            "epochs": (1 <= self.epochs <= MOST_EPOCHS, f"from 1 to {MOST_EPOCHS:,}"),
            "batch": (self.batch >= 1, "at least 1"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "optimizer": (self.optimizer in (None, *OPTIMIZERS), f"one of {', '.join(OPTIMIZERS)}"),
            "precision": (self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            "lr": (self.lr is None or 0 < self.lr <= MOST_FLOAT, f"above 0, at most {MOST_FLOAT:.0e}"),
            "weight_decay": (0 <= self.weight_decay <= MOST_FLOAT, f"from 0 to {MOST_FLOAT:.0e}"),
            "warmup": (0 <= self.warmup <= 1, "from 0 to 1"),
            "clip": (self.clip is None or 0 < self.clip < inf, "above 0, and finite"),
            "ema": (self.ema is None or 0 <= self.ema < 1, "from 0 to below 1"),
            "distill": (0 <= self.distill <= 1, "from 0 to 1"),
            "decay": (self.decay is None or 0 <= self.decay <= MOST_FLOAT, f"from 0 to {MOST_FLOAT:.0e}"),
            "freeze_masks": (0 <= self.freeze_masks <= 1, "from 0 to 1"),
            "patience": (self.patience is None or self.patience >= 1, "at least 1"),
            "workers": (0 <= self.workers <= MOST_WORKERS, f"from 0 to {MOST_WORKERS}"),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2⁶³"),
            "save_minutes": (0 <= self.save_minutes < inf, "0 or more, and finite"),
        }
        for name, (holds, words) in checks.items():
            if not holds:
                raise UsageError(f"{name.replace('_', '-')} cannot be {getattr(self, name)}: it has to be {words}")
        if self.ema is not None and self.shard:
            raise UsageError("averaged weights (--ema) cannot be sharded: leave out --ema or --shard")

    @property
    def usual(self) -> Usual:
        """What goes well with the optimiser."""
        return USUAL[self.optimizer or "adamw"]

    @property
    def peak_lr(self) -> float:
        """The highest learning rate."""
        return self.usual.lr if self.lr is None else self.lr

    def for_task(self, task: str) -> Settings:
        """With the usual numbers of ``task`` for all that was left out."""
        told = replace(self, optimizer=self.optimizer or OPTIMIZER_OF.get(task, "adamw"))
        return replace(told, lr=told.peak_lr, decay=told.usual.decay if told.decay is None else told.decay)

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of ``step`` (from 0) of ``steps``."""
        warm = round(self.warmup * steps)
        if step < warm:
            return self.peak_lr * (step + 1) / warm
        return self.peak_lr * (1 + cos(pi * (step - warm) / max(1, steps - warm))) / 2

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimiser of everything in ``model`` that can be trained; norms and biases have no weight decay."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.peak_lr, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.peak_lr)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch, NumPy and Python for one step: a function of these three, so that a resumed run needs no saved state."""
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
