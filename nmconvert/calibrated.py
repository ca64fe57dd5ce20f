"""A checkpoint and its plan → every tensor that calibrated pruning changes, by the checkpoint's own names.

What :func:`nmconvert.prune.prune` takes as its ``solver``: with a module for a file of weights, without one for an ONNX file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from nmconvert.calibrate import Recipe, prune_model
from nmconvert.calibrate_onnx import prune_onnx
from nmconvert.checkpoint import Checkpoint
from nmconvert.checkpoint.onnx_file import read_whole_model
from nmconvert.errors import UsageError
from nmconvert.model import fill, matched_names
from nmconvert.plan import Plan
from nmconvert.replay import Batch

Solver = Callable[[Checkpoint, Plan], dict[str, Tensor]]


def module_solver(
    model: nn.Module, batches: Sequence[Batch], recipe: Recipe, progress: Callable[[str], None] = lambda line: None
) -> Solver:
    """Fill ``model`` from the checkpoint and prune it with :func:`nmconvert.calibrate.prune_model`; in float32."""

    def solve(checkpoint: Checkpoint, plan: Plan) -> dict[str, Tensor]:
        fill(model, checkpoint)
        model.float()
        names = matched_names([row.name for row in plan.rows if not row.info.secondary], model.state_dict())
        sites = {}
        for row in plan.pruned:
            if row.pattern and row.axis and row.name in names:
                sites[names[row.name]] = (row.pattern, row.axis)
        pruned = prune_model(model, batches, sites, recipe, progress)
        return {name: pruned.state[own] for name, own in names.items() if own in pruned.state}

    return solve


def onnx_solver(batches: Sequence[Batch], recipe: Recipe, progress: Callable[[str], None] = lambda line: None) -> Solver:
    """Prune with :func:`nmconvert.calibrate_onnx.prune_onnx`, the layer inputs computed by onnxruntime."""

    def solve(checkpoint: Checkpoint, plan: Plan) -> dict[str, Tensor]:
        if checkpoint.format != "ONNX":
            raise UsageError(f"{checkpoint.path}: --calib needs the module that the weights belong to: give --model")
        return prune_onnx(read_whole_model(checkpoint.path), batches, plan.pruned, recipe, progress)

    return solve
