"""A checkpoint and its plan → every tensor that calibrated pruning changes, by the checkpoint's own names.

What :func:`nmconvert.prune.prune` takes as its ``solver``: with a module for a file of weights, without one for an ONNX file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from nmconvert.calibrate.budget import PATTERNS, Budget, Sensitivity, measure, meet, top1_drop
from nmconvert.calibrate.driver import Recipe, prune_model
from nmconvert.calibrate.onnx_driver import prune_onnx
from nmconvert.calibrate.permute import permute_model
from nmconvert.calibrate.replay import Batch
from nmconvert.checkpoint import Checkpoint
from nmconvert.checkpoint.onnx_file import read_whole_model
from nmconvert.errors import UsageError
from nmconvert.model import fill, matched_names
from nmconvert.pattern import Pattern
from nmconvert.plan import Plan

Solver = Callable[[Checkpoint, Plan], dict[str, Tensor]]


def module_solver(
    model: nn.Module,
    batches: Sequence[Batch],
    recipe: Recipe,
    progress: Callable[[str], None] = lambda line: None,
    *,
    permute: bool = False,
    resume: Path | None = None,
) -> Solver:
    """Fill ``model`` from the checkpoint and prune it with :func:`nmconvert.calibrate.driver.prune_model`; in float32.

    With ``permute``, channels are put into a better order first (:mod:`nmconvert.calibrate.permute`); ``resume`` is as there.
    """

    def solve(checkpoint: Checkpoint, plan: Plan) -> dict[str, Tensor]:
        names = _filled(model, checkpoint, plan)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        sites = {}
        for row in plan.pruned:
            if row.pattern and row.axis and row.name in names:
                sites[names[row.name]] = (row.pattern, row.axis)
        if permute:
            for done in permute_model(model, batches[0], sites, seed=recipe.seed):
                gain = f"keeps {done.before:.2%}, then {done.after:.2%}"
                progress(f"{', '.join(done.names)}: {gain if done.reason is None else f'not permuted: {done.reason}'}")
        prune_model(model, batches, sites, recipe, progress, resume)
        after = model.state_dict()
        return {name: after[own] for name, own in names.items() if own in after and not torch.equal(before[own], after[own])}

    return solve


def onnx_solver(batches: Sequence[Batch], recipe: Recipe, progress: Callable[[str], None] = lambda line: None) -> Solver:
    """Prune with :func:`nmconvert.calibrate.onnx_driver.prune_onnx`, the layer inputs computed by onnxruntime."""

    def solve(checkpoint: Checkpoint, plan: Plan) -> dict[str, Tensor]:
        if checkpoint.format != "ONNX":
            raise UsageError(f"{checkpoint.path}: --calib needs the module that the weights belong to: give --model")
        return prune_onnx(read_whole_model(checkpoint.path), batches, plan.pruned, recipe, progress)

    return solve


def sensitivities(
    model: nn.Module,
    checkpoint: Checkpoint,
    plan: Plan,
    batches: Sequence[Batch],
    patterns: Sequence[Pattern],
    progress: Callable[[str], None] = lambda line: None,
) -> list[Sensitivity]:
    """:func:`nmconvert.calibrate.budget.measure` for the tensors that ``plan`` prunes, under the model's names."""
    names = _filled(model, checkpoint, plan)
    axes = {names[row.name]: row.axis for row in plan.pruned if row.name in names and row.axis}
    return measure(model, batches, axes, patterns, progress)


def layers_under(
    budget: Budget,
    model: nn.Module,
    checkpoint: Checkpoint,
    plan: Plan,
    batches: Sequence[Batch],
    progress: Callable[[str], None] = lambda line: None,
) -> list[tuple[str, Pattern | None]]:
    """The pattern (None: dense) of each tensor that ``plan`` prunes, by its checkpoint's name, so that ``budget`` is met."""
    found = sensitivities(model, checkpoint, plan, batches, PATTERNS, progress)
    drop = top1_drop(model, batches, Recipe(criterion="exact", block_steps=0, model_steps=0, copies=1))
    chosen = meet(budget, found, drop)
    names = _filled(model, checkpoint, plan)
    return [(escape(row.name), chosen.get(names[row.name], (None, None))[0]) for row in plan.pruned if row.name in names]


def _filled(model: nn.Module, checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """Fill ``model``, in float32; the checkpoint's names → the model's."""
    fill(model, checkpoint)
    model.float()
    return matched_names([row.name for row in plan.rows if not row.info.secondary], model.state_dict())
