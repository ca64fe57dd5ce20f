"""What sensitivities and budgets are measured on: a module with a checkpoint's weights, or a bare ONNX graph as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto
from torch import nn

from nmconvert.calibrate.budget import Chosen, Sensitivity, Stored, measure, top1_drop
from nmconvert.calibrate.driver import Recipe
from nmconvert.calibrate.onnx_driver import as_module, errors_in_own_names, in_own_names
from nmconvert.calibrate.onnx_module import GraphModule
from nmconvert.calibrate.replay import Batch
from nmconvert.checkpoint import Checkpoint
from nmconvert.checkpoint.onnx_file import read_whole_model
from nmconvert.errors import UsageError
from nmconvert.model import fill, matched_names
from nmconvert.pattern import Pattern
from nmconvert.plan import Plan

_PLAIN = Recipe(criterion="exact", block_steps=0, model_steps=0, copies=1)


@dataclass(frozen=True)
class Subject:
    """A model, in float32, and its inputs.

    Attributes:
        source: the module, or the graph itself.
        module: what is pruned and compared.
        judged: the same, returning the model's own outputs.
        batches: its inputs.
        parameters: the checkpoint's names → those of the parameters of ``module``.
        shown: the checkpoint's names → those in results: the module's, or the graph's own.
        stored: bytes in the file.
    """

    source: nn.Module | ModelProto
    module: nn.Module
    judged: nn.Module
    batches: Sequence[Batch]
    parameters: Mapping[str, str]
    shown: Mapping[str, str]
    stored: Stored

    @classmethod
    def of(cls, model: nn.Module | None, checkpoint: Checkpoint, plan: Plan, batches: Sequence[Batch], option: str) -> Subject:
        """``model`` filled from the checkpoint, or without one the graph of an ONNX file.

        Raises:
            UsageError: there is no model, and ``option`` needs it.
        """
        infos = [row.info for row in plan.rows if row.info.shared_with is None and not row.info.secondary]
        whole, itemsizes = sum(info.nbytes for info in infos), {row.name: row.info.itemsize for row in plan.rows}
        if model is not None or checkpoint.format != "ONNX":
            module = needed(model, option, checkpoint)
            names = filled(module, checkpoint, plan)
            stored = Stored(whole, {names[name]: size for name, size in itemsizes.items() if name in names})
            return cls(module, module, module, batches, names, names, stored)
        graph = read_whole_model(checkpoint.path)
        module, names, inputs, _ = as_module(graph, plan.pruned, batches)
        own = {name: name for name in names}
        stored = Stored(whole, {parameter: itemsizes[name] for name, parameter in names.items()})
        return cls(graph, module, GraphModule(graph), inputs, names, own, stored)

    def sensitivities(self, plan: Plan, patterns: Sequence[Pattern], progress: Callable[[str], None]) -> list[Sensitivity]:
        """:func:`nmconvert.calibrate.budget.measure` for the tensors that ``plan`` prunes, under the names that are shown."""
        axes = {self.parameters[row.name]: row.axis for row in plan.pruned if row.name in self.parameters and row.axis}
        own = {self.parameters[name]: shown for name, shown in self.shown.items()}
        with errors_in_own_names(own):
            found = measure(self.module, self.batches, axes, patterns, in_own_names(progress, own), self.stored)
        return [replace(s, name=own[s.name]) for s in found]

    def drop(self) -> Callable[[Chosen], float]:
        """:func:`nmconvert.calibrate.budget.top1_drop` of plans under the names that are shown."""
        names = {shown: self.parameters[name] for name, shown in self.shown.items()}
        measured = top1_drop(self.judged, self.batches, _PLAIN)
        return lambda plan: measured({names[name]: how for name, how in plan.items()})


def needed(model: nn.Module | None, option: str, checkpoint: Checkpoint) -> nn.Module:
    """``model``, or a UsageError where there is none."""
    if model is None:
        raise UsageError(f"{checkpoint.path}: {option} needs the module that the weights belong to: give --model")
    return model


def filled(model: nn.Module, checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """Fill ``model``, in float32; the checkpoint's names → the model's."""
    fill(model, checkpoint)
    model.float()
    return matched_names([row.name for row in plan.rows if not row.info.secondary], model)
