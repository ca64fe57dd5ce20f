"""A checkpoint and its plan → every tensor that calibrated pruning changes, by the checkpoint's own names.

With a module for a file of weights, without one for an ONNX file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from onnx import ModelProto
from torch import Tensor, nn

from nmconvert.calibrate.budget import PATTERNS, Budget, Clock, Sensitivity, meet
from nmconvert.calibrate.driver import DEFAULT, Recipe, prune_model
from nmconvert.calibrate.onnx_driver import prune_onnx
from nmconvert.calibrate.onnx_permute import example_inputs, permute_onnx, with_tensors
from nmconvert.calibrate.permute import Permutation, permute_model
from nmconvert.calibrate.replay import Batch
from nmconvert.calibrate.subject import Subject, filled, needed
from nmconvert.checkpoint import Checkpoint
from nmconvert.checkpoint.onnx_file import read_whole_model
from nmconvert.errors import UsageError
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
class Choice:
    """What a budget chose: the pattern (None: dense) of each tensor, by the checkpoint's names, and what that comes to."""

    patterns: tuple[tuple[str, Pattern | None], ...]
    budget: Budget
    reached: float


@dataclass(frozen=True)
class Calibration:
    """How :func:`nmconvert.prune.prune` prunes with data.

    Attributes:
        batches: unlabelled inputs, each as :data:`nmconvert.calibrate.replay.Batch` says; without any, an ONNX file's channels
            can be permuted, and nothing is solved.
        recipe: criterion and corrections.
        budget: chooses a pattern for each layer; None: the plan's own patterns.
        permute: put channels into a better order first (:mod:`nmconvert.calibrate.permute`).
        progress: called with one line for each layer.
        clock: measures a model, or a graph, that is called with such a batch; needed for a budget of speed
            (`nmconvert.pace.Pace`).
    """

    batches: Sequence[Batch]
    recipe: Recipe = DEFAULT
    budget: Budget | None = None
    permute: bool = False
    progress: Progress = lambda line: None
    clock: Callable[[nn.Module | ModelProto, Batch], Clock] | None = None

    def choose(self, checkpoint: Checkpoint, plan: Plan, model: nn.Module | None, budget: Budget) -> Choice:
        """A pattern for each tensor that ``plan`` prunes, so that ``budget`` is met.

        Raises:
            UsageError: no choice meets it, or there is no model, and it is needed.
        """
        subject = Subject.of(model, checkpoint, plan, self.batches, "--budget")
        found = subject.sensitivities(plan, PATTERNS, self.progress)
        met = meet(budget, found, subject.drop(), partial(self._clock, subject.source))
        shown = {row.name: subject.shown[row.name] for row in plan.pruned if row.name in subject.shown}
        return Choice(tuple((name, met.plan.get(own, (None, None))[0]) for name, own in shown.items()), budget, met.reached)

    def _clock(self, model: nn.Module | ModelProto) -> Clock:
        if self.clock is None:
            raise UsageError("a speedup is measured: give Calibration a clock, for example nmconvert.pace.Pace")
        return self.clock(model, self.batches[0])

    def solve(self, checkpoint: Checkpoint, plan: Plan, model: nn.Module | None, resume: Path) -> Changes:
        """What changes, computed in float32.

        ``model`` is filled from the checkpoint and pruned (:func:`nmconvert.calibrate.driver.prune_model`, whose ``resume``
        is the same); without one the checkpoint has to be an ONNX file, whose graph is made a module
        (:func:`nmconvert.calibrate.onnx_driver.prune_onnx`).

        Raises:
            UsageError: there is no model, or there are no batches, and they are needed.
        """
        if model is None and checkpoint.format == "ONNX":
            return self._solve_graph(checkpoint, plan, resume)
        model = needed(model, "--permute" if self.permute else "--calib", checkpoint)
        if not self.batches:
            raise UsageError(f"{checkpoint.path}: --permute exports the module with an example: give --calib")
        names = filled(model, checkpoint, plan)
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

    def _solve_graph(self, checkpoint: Checkpoint, plan: Plan, resume: Path) -> Changes:
        graph = read_whole_model(checkpoint.path)
        ordered: dict[str, Tensor] = {}
        done: list[Permutation] = []
        if self.permute:
            ordered, done = permute_onnx(graph, plan.pruned, example_inputs(graph, self.batches), seed=self.recipe.seed)
            graph = with_tensors(graph, ordered)
        if self.batches:
            solved = prune_onnx(graph, self.batches, plan.pruned, self.recipe, self.progress, resume)
            return Changes({**ordered, **solved}, ordered, tuple(done))
        pruned = {row.name for row in plan.pruned}
        return Changes({n: tensor for n, tensor in ordered.items() if n not in pruned}, ordered, tuple(done))


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def sensitivities(
    model: nn.Module | None,
    checkpoint: Checkpoint,
    plan: Plan,
    batches: Sequence[Batch],
    patterns: Sequence[Pattern],
    progress: Progress = lambda line: None,
) -> list[Sensitivity]:
    """:func:`nmconvert.calibrate.budget.measure` for the tensors that ``plan`` prunes, under the model's names.

    Without a model the checkpoint has to be an ONNX file, and the names are its own.

    Raises:
        UsageError: there is no model, and it is needed, or the data does not reach a layer.
        ModelError: the checkpoint does not fit the model.
        DataError: the data does not fit the graph's inputs.
    """
    return Subject.of(model, checkpoint, plan, batches, "sensitivity").sensitivities(plan, patterns, progress)
