"""A checkpoint and its plan → every tensor that calibrated pruning changes, by the checkpoint's own names.

With a module for a file of weights, without one for an ONNX file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from nmconvert.calibrate.budget import PATTERNS, Budget, Clock, Sensitivity, measure, meet, top1_drop
from nmconvert.calibrate.driver import DEFAULT, Recipe, prune_model
from nmconvert.calibrate.onnx_driver import prune_onnx
from nmconvert.calibrate.permute import Permutation, permute_model
from nmconvert.calibrate.replay import Batch
from nmconvert.checkpoint import Checkpoint
from nmconvert.checkpoint.onnx_file import read_whole_model
from nmconvert.errors import UsageError
from nmconvert.model import fill, matched_names
from nmconvert.pattern import Pattern
from nmconvert.plan import Plan

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Changes:
    """What calibration makes of a checkpoint; tensors are under the checkpoint's names.

    Attributes:
        tensors: every one that changes.
        reordered: those of the plan whose channels were put into another order: their dense values, in that order.
        permutations: for which layers an order was sought, what it keeps, and why some keep theirs.
    """

    tensors: Mapping[str, Tensor]
    reordered: Mapping[str, Tensor] = field(default_factory=dict)
    permutations: tuple[Permutation, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """How :func:`nmconvert.prune.prune` prunes with data.

    Attributes:
        batches: unlabelled inputs, each as :data:`nmconvert.calibrate.replay.Batch` says.
        recipe: criterion and corrections.
        budget: chooses a pattern for each layer; None: the plan's own patterns.
        permute: put channels into a better order first (:mod:`nmconvert.calibrate.permute`).
        progress: called with one line for each layer.
        clock: measures a model that is called with such a batch; needed for a budget of speed (`nmconvert.pace.Pace`).
    """

    batches: Sequence[Batch]
    recipe: Recipe = DEFAULT
    budget: Budget | None = None
    permute: bool = False
    progress: Progress = lambda line: None
    clock: Callable[[nn.Module, Batch], Clock] | None = None

    def choose(self, checkpoint: Checkpoint, plan: Plan, model: nn.Module | None) -> list[tuple[str, Pattern | None]]:
        """The pattern (None: dense) of each tensor that ``plan`` prunes, by its checkpoint's name, so that the budget is met.

        Raises:
            UsageError: no choice meets it, or there is no model.
        """
        if self.budget is None:
            return []
        model = _needed(model, "--budget", checkpoint)
        found = sensitivities(model, checkpoint, plan, self.batches, PATTERNS, self.progress)
        drop = top1_drop(model, self.batches, Recipe(criterion="exact", block_steps=0, model_steps=0, copies=1))
        chosen = meet(self.budget, found, drop, partial(self._clock, model))
        names = _filled(model, checkpoint, plan)
        return [(escape(row.name), chosen.get(names[row.name], (None, None))[0]) for row in plan.pruned if row.name in names]

    def _clock(self, model: nn.Module) -> Clock:
        if self.clock is None:
            raise UsageError("a speedup is measured: give Calibration a clock, for example nmconvert.pace.Pace")
        return self.clock(model, self.batches[0])

    def solve(self, checkpoint: Checkpoint, plan: Plan, model: nn.Module | None, resume: Path) -> Changes:
        """What changes, computed in float32.

        ``model`` is filled from the checkpoint and pruned (:func:`nmconvert.calibrate.driver.prune_model`, whose ``resume``
        is the same); without one the checkpoint has to be an ONNX file, whose graph is made a module
        (:func:`nmconvert.calibrate.onnx_driver.prune_onnx`).

        Raises:
            UsageError: there is no model, and it is needed.
        """
        if model is None and checkpoint.format == "ONNX" and not self.permute:
            read = read_whole_model(checkpoint.path)
            return Changes(prune_onnx(read, self.batches, plan.pruned, self.recipe, self.progress, resume))
        model = _needed(model, "--permute" if self.permute else "--calib", checkpoint)
        names = _filled(model, checkpoint, plan)
        before = _copy(model)
        sites = {names[r.name]: (r.pattern, r.axis) for r in plan.pruned if r.pattern and r.axis and r.name in names}
        done = permute_model(model, self.batches[0], sites, seed=self.recipe.seed) if self.permute else []
        ordered = _copy(model) if self.permute else before
        prune_model(model, self.batches, sites, self.recipe, self.progress, resume)
        after, own = model.state_dict(), {name: theirs for theirs, name in names.items()}

        def changed(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: new[name] for n, name in names.items() if name in new and not torch.equal(old[name], new[name])}

        permutations = (replace(p, names=tuple(own[name] for name in p.names)) for p in done)
        return Changes(changed(before, after), changed(before, ordered), tuple(permutations))


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def sensitivities(
    model: nn.Module,
    checkpoint: Checkpoint,
    plan: Plan,
    batches: Sequence[Batch],
    patterns: Sequence[Pattern],
    progress: Progress = lambda line: None,
) -> list[Sensitivity]:
    """:func:`nmconvert.calibrate.budget.measure` for the tensors that ``plan`` prunes, under the model's names."""
    names = _filled(model, checkpoint, plan)
    axes = {names[row.name]: row.axis for row in plan.pruned if row.name in names and row.axis}
    return measure(model, batches, axes, patterns, progress)


def _needed(model: nn.Module | None, option: str, checkpoint: Checkpoint) -> nn.Module:
    if model is None:
        raise UsageError(f"{checkpoint.path}: {option} needs the module that the weights belong to: give --model")
    return model


def _filled(model: nn.Module, checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """Fill ``model``, in float32; the checkpoint's names → the model's."""
    fill(model, checkpoint)
    model.float()
    return matched_names([row.name for row in plan.rows if not row.info.secondary], model.state_dict())
