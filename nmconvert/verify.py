"""The verify stage: whether a file is what it says, and whether it agrees with another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession

from nmconvert.arrays import Array, as_array, digest
from nmconvert.checkpoint import Checkpoint, open_checkpoint
from nmconvert.checkpoint.onnx_file import OnnxCheckpoint, read_whole_model
from nmconvert.detect import satisfies, tightest
from nmconvert.errors import ExportError, NmconvertError, UsageError, first_line
from nmconvert.export.calls import PackedLayer, inlined_layers, packed_layers
from nmconvert.export.check import compare, free_memory, memory_to_fold, run, stock_session
from nmconvert.export.trace import run_module
from nmconvert.inputs import InputSpec, example_feed
from nmconvert.manifest import Layer, Manifest
from nmconvert.model import load
from nmconvert.onnx_graph import named_tensors
from nmconvert.packing import dequantize, quantize

_KEPT = "identical where it is kept"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it holds, and what was seen."""

    what: str
    holds: bool
    seen: str
    pruned: bool = False  # of a weight: it holds because it is the other side's where it is not zero


@dataclass(frozen=True)
class Verification:
    """All checks of one file."""

    path: Path
    against: Path | None
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.holds)


def verify(
    path: Path,
    against: Path | None = None,
    *,
    model: str | None = None,
    model_arguments: Mapping[str, str] | None = None,
    inputs: Sequence[InputSpec] = (),
    trust: bool = False,
) -> Verification:
    """Hold ``path`` against its own manifest, the ONNX checker and onnxruntime, and against another file.

    Two checkpoints are compared tensor by tensor, two ONNX files by their outputs and weights, an ONNX file and a checkpoint
    by their outputs (``model`` and ``inputs`` are taken from the manifest where they are not given). A weight may be pruned
    from the other side's; outputs that differ for that reason differ all the same, and the check says why.

    Raises:
        CheckpointError: a file cannot be read at all.
        UsageError: the comparison needs a model and none is known.
    """
    checkpoint = open_checkpoint(path, trust=trust)
    manifest = Manifest.of(checkpoint)
    checks = list(_own_checks(checkpoint, manifest))
    if isinstance(checkpoint, OnnxCheckpoint):
        checks += _onnx_checks(checkpoint, manifest, inputs)
    if against is not None:
        other = open_checkpoint(against, trust=trust)
        checks += _comparison(checkpoint, other, manifest, model, model_arguments, inputs, trust=trust)
    return Verification(path, against, tuple(checks))


def _own_checks(checkpoint: Checkpoint, manifest: Manifest | None) -> Iterator[Check]:
    """The pattern and hash of every sparse tensor."""
    weights = _Weights(checkpoint, manifest)
    if manifest is None or not manifest.layers:
        yield from _without_manifest(weights)
        return
    for layer in manifest.layers:
        yield _check_layer(layer, weights)
    promised = {layer.name for layer in manifest.layers}
    for name in [name for name in weights.packed if name not in promised]:
        yield Check(name, False, "packed, but the manifest does not know it")


def _check_layer(layer: Layer, weights: _Weights) -> Check:
    try:
        weight = weights.read(layer.name)
        if tuple(weight.shape) != layer.info.shape:
            return Check(layer.name, False, f"shape {list(weight.shape)}, the manifest says {list(layer.info.shape)}")
        packed = weights.packed.get(layer.name)
        if packed is not None and (packed.pattern, packed.axis, packed.view) != (layer.pattern, layer.axis, layer.view):
            said = f"{packed.pattern} along the {packed.axis} axis"
            return Check(
                layer.name, False, f"packed as {said}, which is not what the manifest says: {layer.pattern} {layer.axis}"
            )
        if not satisfies(layer.view.to_matrix(weight), layer.pattern):
            return Check(layer.name, False, f"not {layer.pattern} along the {layer.axis} axis")
    except NmconvertError as error:
        return Check(layer.name, False, str(error))
    if digest(_as_stored(weight, layer)) != layer.digest:
        return Check(layer.name, False, f"{layer.pattern}, but its values are not those of the manifest (SHA-256)")
    return Check(layer.name, True, f"{layer.pattern} along the {layer.axis} axis, SHA-256 as in the manifest")


def _as_stored(weight: Array, layer: Layer) -> Array:
    """``weight`` in the type of the manifest, where that holds it exactly: what `bench --tuned` unpacks is as wide as it is
    computed.
    """
    narrow = weight.astype(layer.info.dtype)
    return narrow if np.array_equal(narrow.astype(weight.dtype), weight) else weight


def _without_manifest(weights: _Weights) -> Iterator[Check]:
    for name, layer in weights.packed.items():
        try:
            holds = satisfies(layer.matrix(), layer.pattern)
            yield Check(name, holds, f"{layer.pattern} along the {layer.axis} axis" if holds else f"not {layer.pattern}")
        except NmconvertError as error:
            yield Check(name, False, str(error))
    seen = "only the patterns of its packed weights could be checked" if weights.packed else "see nmconvert inspect"
    yield Check("manifest", False, f"none: nothing in this file says what it should be; {seen}")


class _Weights:
    """The weights of a checkpoint or an ONNX file by name, packed ones unpacked."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest | None) -> None:
        self.checkpoint = checkpoint
        self.manifest = manifest
        self.packed: dict[str, PackedLayer] = {}
        if isinstance(checkpoint, OnnxCheckpoint):
            model = read_whole_model(checkpoint.path)
            layers = list(packed_layers(model, str(checkpoint.path)))
            self.packed = {layer.name: layer for layer in layers or inlined_layers(model, manifest.layers if manifest else ())}

    def read(self, name: str) -> Array:
        """One weight, in its operator's or its container's shape."""
        if name in self.packed:
            layer = self.packed[name]
            return layer.view.from_matrix(layer.matrix())
        return as_array(self.checkpoint.read(name))

    def rounded(self, name: str, weight: Array) -> Array:
        """``weight`` as this file would hold it under ``name``, where that is int8 with a scale for each row."""
        promised = self.manifest.layer(name) if self.manifest else None
        view = promised.view if promised else self.packed[name].view
        return view.from_matrix(dequantize(*quantize(view.to_matrix(weight)))) if weight.shape == view.shape else weight


def _session(checkpoint: OnnxCheckpoint) -> InferenceSession:
    """Stock onnxruntime; where there is no room to fold all packed weights at once, they are unpacked as it runs."""
    manifest = Manifest.of(checkpoint)
    layers = manifest.layers if manifest else ()
    return stock_session(checkpoint.path, fold=memory_to_fold(checkpoint.model, layers) <= free_memory())


def _onnx_checks(checkpoint: OnnxCheckpoint, manifest: Manifest | None, inputs: Sequence[InputSpec]) -> Iterator[Check]:
    path = checkpoint.path
    if inputs:
        _feed(checkpoint, manifest, inputs)  # raises: inputs that were given wrongly are no fault of the file
    yield _attempt("ONNX checker", lambda: onnx.checker.check_model(str(path), full_check=True), "accepts the file")

    def run_it() -> None:
        outputs = run(_session(checkpoint), _feed(checkpoint, manifest, inputs))
        if not all(np.isfinite(output).all() for output in outputs if output.dtype.kind == "f"):
            raise ExportError("an output holds NaN or infinite values for a random input")

    yield _attempt("stock onnxruntime", run_it, "loads and runs it")


def _attempt(what: str, action: Callable[[], object], success: str) -> Check:
    try:
        action()
    except Exception as error:  # the checker's and onnxruntime's errors have no common base; each is the finding itself
        return Check(what, False, first_line(error))
    return Check(what, True, success)


def _feed(checkpoint: OnnxCheckpoint, manifest: Manifest | None, inputs: Sequence[InputSpec]) -> dict[str, Array]:
    return example_feed(checkpoint.model, inputs or (manifest.said_inputs() if manifest else []))


def _comparison(
    checkpoint: Checkpoint,
    other: Checkpoint,
    manifest: Manifest | None,
    model: str | None,
    model_arguments: Mapping[str, str] | None,
    inputs: Sequence[InputSpec],
    *,
    trust: bool,
) -> Iterator[Check]:
    first, second = isinstance(checkpoint, OnnxCheckpoint), isinstance(other, OnnxCheckpoint)
    if not first and not second:
        yield from _compare_tensors(checkpoint, other, manifest)
        return
    graph = next(side for side in (checkpoint, other) if isinstance(side, OnnxCheckpoint))
    feed = _feed(graph, manifest, inputs)
    manifests = [m for m in (manifest, Manifest.of(other)) if m is not None]

    def outputs(side: Checkpoint) -> list[Array]:
        if isinstance(side, OnnxCheckpoint):
            return run(_session(side), feed)
        said = next((m for m in manifests if m.settings.get("model")), Manifest())
        spec, arguments = said.said_model(side.path, model, model_arguments)
        if spec is None:
            raise UsageError(f"{side.path}: holds weights only; name the module with --model package.module:callable")
        return run_module(load(spec, side.path, arguments, trust=trust), feed)

    stages = [stage for m in manifests for stage in m.history]
    stored = next((stage["values"] for stage in stages if "values" in stage), None)
    weights = list(_compare_graphs(checkpoint, other, manifest)) if first and second else []
    pruned = sum(check.pruned for check in weights)
    why = f"; {pruned} of its weights are pruned from that file's" if pruned else ""
    yield from _compare_outputs(outputs(checkpoint), outputs(other), other.path, stored, why)
    yield from weights


def _compare_outputs(
    found: Sequence[Array], expected: Sequence[Array], other: Path, stored: str | None, why: str
) -> Iterator[Check]:
    """``why`` is what is known of the reason, should they differ."""
    if len(found) != len(expected):
        yield Check("outputs", False, f"{len(found)}, {other} has {len(expected)}")
        return
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        try:
            difference = compare(mine, theirs, stored)
        except ExportError as error:
            yield Check(f"output {number}", False, str(error))
            continue
        seen = f"differs from {other} by at most {difference.absolute:.3g} (largest value {difference.scale:.3g})"
        yield Check(f"output {number}", difference.accepted, seen if difference.accepted else seen + why)


def _compare_graphs(checkpoint: Checkpoint, other: Checkpoint, manifest: Manifest | None) -> Iterator[Check]:
    """The weights of two ONNX files: packed ones by name, and all where neither has any and both have the same."""
    mine, theirs = _Weights(checkpoint, manifest), _Weights(other, Manifest.of(other))
    if mine.packed or theirs.packed:
        yield from _compare_weights(mine, theirs)
    elif {info.name for info in checkpoint.tensors()} == {info.name for info in other.tensors()}:
        yield from _compare_tensors(checkpoint, other, manifest)


def _compare_weights(mine: _Weights, theirs: _Weights) -> Iterator[Check]:
    """The packed weights of one ONNX file against the weights of the same name in another."""
    tensors = dict(named_tensors(theirs.checkpoint.model)) if isinstance(theirs.checkpoint, OnnxCheckpoint) else {}
    stored_turned = {info.name: info.transposed for info in theirs.checkpoint.tensors()}
    for name, layer in mine.packed.items():
        if name not in theirs.packed and name not in tensors:
            continue
        weight, other, said = layer.view.from_matrix(layer.matrix()), theirs.read(name), "the same weight, bit for bit"
        if name not in theirs.packed and (turned := stored_turned.get(name)):
            other = other.transpose(turned)
        if layer.scale is not None:
            other, said = mine.rounded(name, other), "the same weight, rounded to int8"
        elif weight.dtype.itemsize < other.dtype.itemsize:
            other, said = other.astype(weight.dtype), f"the same weight, rounded to {weight.dtype.name}"
        same = weight.size == other.size and digest(np.sort(weight, axis=None)) == digest(np.sort(other, axis=None))
        if weight.shape == other.shape:
            same = digest(weight) == digest(other)
            if not same and np.array_equal(weight[weight != 0], other[weight != 0]):
                yield Check(name, True, f"{_KEPT} ({layer.pattern})", pruned=True)
                continue
        yield Check(name, same, said if same else f"not the weight of {theirs.checkpoint.path}")


def _compare_tensors(checkpoint: Checkpoint, other: Checkpoint, manifest: Manifest | None) -> Iterator[Check]:
    """Every tensor of two checkpoints: identical, or, if it may be sparse, identical where it keeps anything.

    Which may be is what the manifest of ``checkpoint`` says; without one, all with two dimensions or more.
    """
    sparse = None if manifest is None else {layer.name for layer in manifest.layers}
    mine = {info.name: info for info in checkpoint.tensors()}
    theirs = {info.name: info for info in other.tensors()}
    for name in [name for name in [*mine, *theirs] if not (name in mine and name in theirs)]:
        yield Check(name, False, f"only in {checkpoint.path if name in mine else other.path}")
    for name in [name for name in mine if name in theirs]:
        if (mine[name].shape, mine[name].dtype) != (theirs[name].shape, theirs[name].dtype):
            yield Check(name, False, f"{mine[name].dtype} {list(mine[name].shape)} against another shape or type")
            continue
        if mine[name].unread or theirs[name].unread:
            yield Check(name, True, f"not compared: {mine[name].reason or theirs[name].reason}")
            continue
        first, second = checkpoint.read(name), other.read(name)
        if torch.equal(first, second):
            yield Check(name, True, "identical")
        elif (name in sparse if sparse is not None else first.ndim > 1) and torch.equal(first[first != 0], second[first != 0]):
            pruned = tightest(as_array(first.reshape(first.shape[0], -1)))
            yield Check(name, True, f"{_KEPT}{f' ({pruned} or sparser)' if pruned else ''}", pruned=True)
        else:
            changed = int((first != second).sum())
            yield Check(name, False, f"{changed:,} of {first.numel():,} values differ")
