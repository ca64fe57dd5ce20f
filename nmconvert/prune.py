"""The prune stage: a checkpoint → its N:M-sparse copy, tensor by tensor, with a plan and a manifest."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

import numpy as np

from nmconvert.arrays import Array, as_array, as_tensor, canonical_bytes, digest
from nmconvert.checkpoint import Checkpoint, beside, check_copy, has_manifest, open_checkpoint
from nmconvert.errors import ModelError, UsageError, WeightError
from nmconvert.magnitude import has_negative_zero, keep_largest
from nmconvert.manifest import Layer, Manifest
from nmconvert.matrix import MatrixView
from nmconvert.pattern import Axis, Pattern
from nmconvert.plan import NOT_INCLUDED, Plan, make_plan
from nmconvert.rules import COMPUTED, is_embedding, unready
from nmconvert.tensor import Row, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nmconvert.calibrate.permute import Permutation
    from nmconvert.calibrate.stage import Calibration, Choice

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class PruneResult:
    """The new file, what the plan was, and what was done; ``permutations`` and ``choice`` are what was asked for."""

    source: Path
    output: Path
    format: str
    plan: Plan
    manifest: Manifest
    permutations: tuple[Permutation, ...] = ()
    choice: Choice | None = None

    def layer(self, name: str) -> Layer:
        """What was done to a pruned tensor."""
        layer = self.manifest.layer(name)
        assert layer is not None
        return layer


def prune(
    source: Path,
    pattern: Pattern,
    axis: Axis = "channel",
    *,
    output: Path | None = None,
    layers: Sequence[tuple[str, Pattern | None]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    target: str = "generic",
    criterion: str = "magnitude",
    model: torch.nn.Module | None = None,
    calibration: Calibration | None = None,
    settings: Settings | None = None,
    trust: bool = False,
) -> PruneResult:
    """Write a copy of ``source`` whose convolutions and linear layers keep n of every m weights.

    Layers are chosen by :func:`nmconvert.plan.make_plan`. ``model`` tells what each tensor is; without it names and shapes do.
    With ``calibration`` patterns may be chosen and weights solved on data; what it leaves out is pruned by magnitude.
    ``criterion`` and ``settings`` are kept in the manifest. The copy is written as a stream: without calibration, memory is
    bounded by the largest tensor.

    Raises:
        UsageError: nothing would be pruned, or ``output`` is the input, called what it is not, or in no folder.
        WeightError: a weight is NaN or infinite, or what calibration gives its layer.
        CheckpointError: the file cannot be read or the copy not written; ``output`` is then as it was before.
    """
    checkpoint = open_checkpoint(source, trust=trust)
    if output is not None:
        check_copy(source, output, has_manifest)
    solved_too = calibration is not None and bool(calibration.batches)
    planned = partial(
        plan_for, checkpoint, axis=axis, model=model, include=include, exclude=exclude, target=target, solved=solved_too
    )
    plan = planned(pattern, layers=layers)
    choice = calibration.choose(checkpoint, plan, model, calibration.budget) if calibration and calibration.budget else None
    if choice:
        chosen = [(escape(name), chosen_pattern) for name, chosen_pattern in choice.patterns]
        plan = _left_by_budget(planned(pattern, layers=[*layers, *chosen]), choice)
        pattern = mode([row.pattern for row in plan.pruned if row.pattern] or [pattern])
    need_pruned(source, plan)
    if output is None:
        output = default_output(source, pattern)
        check_copy(source, output, has_manifest)
    resume = output.with_name(f"{output.name}.calibration")
    changes = calibration.solve(checkpoint, plan, model, resume) if calibration else None
    solved, reordered = (changes.tensors, changes.reordered) if changes else ({}, {})
    edits = {row.name: _edit(row, solved.get(row.name), reordered.get(row.name)) for row in plan.pruned}
    others = {name: partial(_replace, tensor) for name, tensor in solved.items() if name not in edits}
    base = (Manifest.of(checkpoint) or Manifest()).with_settings(source=str(source.resolve()), **(settings or {}))
    base = base.after("prune", pattern=str(pattern), axis=axis, criterion=criterion)
    dense = {row.name: row.reason or "" for row in plan.rows if row.pattern is None and len(row.info.shape) > 1}

    def manifest() -> Manifest:
        return replace(base, layers=tuple(edit.layer() for edit in edits.values()), dense=dense)

    try:
        checkpoint.write_copy(output, {**edits, **others}, lambda: manifest().to_json())
    except WeightError as error:
        raise WeightError(f"{source}: {error}") from error
    if calibration:
        resume.unlink(missing_ok=True)
    return PruneResult(source, output, checkpoint.format, plan, manifest(), changes.permutations if changes else (), choice)


def plan_for(
    checkpoint: Checkpoint,
    pattern: Pattern,
    axis: Axis,
    model: torch.nn.Module | None = None,
    *,
    layers: Sequence[tuple[str, Pattern | None]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    target: str = "generic",
    solved: bool = False,
) -> Plan:
    """The plan for a checkpoint: what its container knows, what ``model`` knows, and equal copies of embeddings.

    With ``solved`` weights are to be calibrated: what ``model`` holds in another form stays dense, and of an ONNX graph what is
    in a body or has further dimensions.

    Raises:
        UsageError: as :func:`nmconvert.plan.make_plan`, or the checkpoint is quantised, or an adapter.
        ModelError: no tensor is a weight of ``model``.
        CheckpointError: a tensor cannot be read.
    """
    tensors = checkpoint.tensors()
    if checkpoint.format != "ONNX" and (reason := unready(info.name for info in tensors)):
        raise UsageError(f"{checkpoint.path}: {reason}")
    if model is not None:
        tensors = _with_kinds(checkpoint, tensors, model, include, solved=solved)
    elif solved:
        tensors = _calibrated(checkpoint, tensors)
    tensors = _mark_copies(checkpoint, tensors)
    return make_plan(tensors, pattern, axis, layers=layers, include=include, exclude=exclude, target=target)


def _left_by_budget(plan: Plan, choice: Choice) -> Plan:
    """``plan``, in which the tensors that ``choice`` leaves dense have the budget as a reason, and no --layer."""
    left = {name for name, pattern in choice.patterns if pattern is None}
    rows = (replace(row, reason="left so by --budget") if row.name in left else row for row in plan.rows)
    return Plan(tuple(rows))


def need_pruned(source: Path, plan: Plan) -> None:
    """Raise where ``plan`` leaves all tensors of ``source`` dense."""
    if not plan.pruned:
        raise UsageError(f"{source}: nothing to prune among its {len(plan.rows)} tensors; {_commonest_reason(plan)}")


def default_output(source: Path, pattern: Pattern) -> Path:
    """``resnet50.pth`` → ``resnet50.nm2-4.pth``; a folder gets the same ending."""
    return beside(source, f".nm{pattern.n}-{pattern.m}")


def _edit(row: Row, solved: Tensor | None, reordered: Tensor | None) -> Magnitude | Solved:
    return Magnitude(row, reordered) if solved is None else Solved(row, solved, reordered)


class Magnitude:
    """The edit of one tensor: keeps the n largest magnitudes of each group, and adds up what that kept.

    Convolutions and linear layers are pruned in blocks of rows (:class:`nmconvert.checkpoint.base.BlockEdit`), unless the
    tensor comes in another order, ``dense``.
    """

    def __init__(self, row: Row, dense: Tensor | None = None) -> None:
        self.dense = dense
        assert row.pattern is not None
        self.row = row
        self.pattern: Pattern = row.pattern
        by_rows = dense is None and row.info.kind in ("conv", "linear") and row.info.transposed is None
        self.block_rows = 1 if by_rows else 0
        self._hash = hashlib.sha256()
        self._kept: list[float] = []  # of each block, in any order
        self._total: list[float] = []

    def __call__(self, weight: Tensor) -> Tensor:
        """Prune a whole tensor; in place where it can."""
        return as_tensor(self._pruned(as_array(weight if self.dense is None else _replace(self.dense, weight))))

    def edit_rows(self, block: Array) -> None:
        """Prune some rows in place, in several threads at once."""
        pruned = self._pruned(block)
        if not np.may_share_memory(pruned, block):
            block[...] = pruned

    def seal(self, pruned: Array) -> None:
        """Add what was made of a block to the hash; the blocks come in order."""
        plain = pruned.flags.c_contiguous and not has_negative_zero(pruned)
        self._hash.update(pruned.reshape(-1).view(np.uint8).data if plain else canonical_bytes(pruned).data)

    def _pruned(self, weight: Array) -> Array:
        view = self._view(weight)
        matrix = np.ascontiguousarray(view.to_matrix(weight))
        total, kept = keep_largest(matrix, self.pattern)
        if math.isnan(total):
            raise WeightError(f"{self.row.name}: holds NaN or infinite weights; repair the checkpoint or --exclude the tensor")
        self._total.append(total)
        self._kept.append(kept)
        return view.from_matrix(matrix)

    def layer(self) -> Layer:
        """The manifest's entry, once the whole tensor has gone through."""
        assert self.row.axis is not None
        total, kept = math.fsum(self._total), math.fsum(self._kept)
        energy = None if math.isinf(total) else kept / total if total > 0 else 1.0
        return Layer(self.row.info, self.pattern, self.row.axis, self._hash.hexdigest(), self.row.assumed, energy)

    def _view(self, weight: Array) -> MatrixView:
        if weight.shape == self.row.info.shape:
            return self.row.view
        assert self.row.axis is not None
        return replace(self.row.info, shape=weight.shape).view(self.row.axis)


class Solved:
    """The edit of one tensor whose pruned values are known; ``dense`` are the old ones where their order has changed."""

    def __init__(self, row: Row, tensor: Tensor, dense: Tensor | None = None) -> None:
        self.row = row
        self.tensor = tensor
        self.dense = dense
        self._digest = ""
        self._energy = 1.0

    def __call__(self, weight: Tensor) -> Tensor:
        """The new values, in the old one's dtype."""
        new = _replace(self.tensor, weight)
        dense = weight if self.dense is None else self.dense
        from nmconvert.masks import sum_of_squares

        total = sum_of_squares(dense)
        self._energy = sum_of_squares(dense.masked_fill(new == 0, 0)) / total if total > 0 else 1.0
        self._digest = digest(as_array(new))
        return new

    def layer(self) -> Layer:
        """The manifest's entry, once the tensor has been written."""
        assert self.row.pattern is not None
        assert self.row.axis is not None
        return Layer(self.row.info, self.row.pattern, self.row.axis, self._digest, self.row.assumed, self._energy)


def _replace(new: Tensor, old: Tensor) -> Tensor:
    return new.to(old.dtype).reshape(old.shape)


def _with_kinds(
    checkpoint: Checkpoint, tensors: Sequence[TensorInfo], model: torch.nn.Module, include: Sequence[str], *, solved: bool
) -> list[TensorInfo]:
    """``tensors`` with the kind and groups that the model's layers give them; the others are no layer's weight.

    What transformers merges into another parameter, such as a mixture's experts, is told by its name, as are other parameters
    that ``include`` names; ``solved`` says that weights are to be calibrated, which these cannot be.

    Raises:
        ModelError: no tensor is a layer's weight, or one has another shape: it is another model.
    """
    from nmconvert.hugging_face import is_model
    from nmconvert.model import has_shape, matched_names, named_layers

    known, own = named_layers(model), model.state_dict(keep_vars=True)
    names = matched_names([info.own_name for info in tensors], model)
    result = []
    for info in tensors:
        name, reason = names[info.own_name], None
        layer = known.get(name)
        if layer is not None:
            if not is_model(model) and not has_shape(layer.weight, info.shape):
                sizes = f"'{info.name}' is {list(info.shape)}, and {list(layer.weight.shape)} in the model"
                raise ModelError(f"{checkpoint.path}: {sizes}; name the right one with --model, or its size with --model-arg")
            info = replace(info, kind=layer.kind, groups=layer.groups)
        elif name in own:
            reason = _no_layer(model, name, included=any(fnmatchcase(info.name, glob) for glob in include), solved=solved)
        elif not is_model(model):
            reason = "the model has no such weight"
        elif solved:
            reason = "part of a larger parameter of the model, which is not calibrated; pruned without --calib"
        result.append(replace(info, reason=reason) if reason and len(info.shape) > 1 and info.reason is None else info)
    if not any(info.kind for info in result):
        raise ModelError(f"{checkpoint.path}: none of its tensors is a weight of the model; name the right one with --model")
    return result


def _no_layer(model: torch.nn.Module, name: str, *, included: bool, solved: bool) -> str | None:
    """Why a parameter that is no layer's weight stays dense; None where it is asked for by its name."""
    from nmconvert.model import is_part_of_weight

    if is_part_of_weight(model, name):
        return COMPUTED
    if solved:
        return "not the weight of a convolution or a linear layer, which alone are calibrated"
    return None if included else "not the weight of a convolution or a linear layer"


def _calibrated(checkpoint: Checkpoint, tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """``tensors`` of an ONNX graph; those that cannot be calibrated have this as a reason."""
    from nmconvert.checkpoint.onnx_file import OnnxCheckpoint
    from nmconvert.onnx_graph import layer_weights

    known = layer_weights(checkpoint.model) if isinstance(checkpoint, OnnxCheckpoint) else {info.name for info in tensors}
    reason = "in the body of an operator, or of further dimensions, which is not calibrated; pruned without --calib"
    return [replace(i, reason=reason) if i.kind and i.name not in known and i.reason is None else i for i in tensors]


def _mark_copies(checkpoint: Checkpoint, tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Matrices that are equal copies of an embedding (heads that were tied when saved) are left alone, with the reason."""
    embeddings = [info for info in tensors if len(info.shape) == 2 and is_embedding(info.name) and not info.unread]

    def equal(one: TensorInfo, other: TensorInfo) -> bool:
        import torch

        return torch.equal(checkpoint.read(one.name), checkpoint.read(other.name))

    result = []
    for info in tensors:
        alike = [e for e in embeddings if (e.shape, e.dtype) == (info.shape, info.dtype)]
        candidate = not is_embedding(info.name) and info.shared_with is None and not info.unread
        twin = next((e for e in alike if equal(info, e)), None) if candidate else None
        result.append(info if twin is None else replace(info, reason=f"tied: an equal copy of {twin.name}"))
    return result


def _commonest_reason(plan: Plan) -> str:
    reasons = [row.reason for row in plan.rows if row.reason and len(row.info.shape) > 1 and row.info.shared_with is None]
    if not reasons:
        return "none has two dimensions or more"
    found = Counter(reason for reason in reasons if reason != NOT_INCLUDED) or Counter(reasons)
    return "most often: " + "; then: ".join(reason for reason, _ in found.most_common(2))
