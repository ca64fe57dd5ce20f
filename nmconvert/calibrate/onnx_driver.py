"""Pruning a bare ONNX file with calibration data: the graph as a module, by the driver for modules.

What is compared are the graph's outputs, before a last Concat puts them together, and what its last layers say. Where outputs
are probabilities, by a Sigmoid or Softmax, :mod:`nmconvert.calibrate.distance` says how far two of them are apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from nmconvert.calibrate.correct import AGREES, AGREES_IN_HALF, disagreement
from nmconvert.calibrate.distance import Said
from nmconvert.calibrate.driver import DEFAULT, Recipe, prune_model
from nmconvert.calibrate.onnx_module import GraphModule
from nmconvert.calibrate.onnx_ops import session, single
from nmconvert.calibrate.replay import Batch, as_call
from nmconvert.errors import DataError, ModelError, WeightError, first_line
from nmconvert.onnx_graph import DTYPES, Constants, attribute, weight_uses
from nmconvert.tensor import Row

_CHOOSING = ("TopK", "NonMaxSuppression", "NonZero", "ArgMax", "If", "Loop")  # outputs after these are not compared
_AT_ONCE = 256 << 20  # bytes for gradients: twelve images of FastestDet, 20 MB each; more at once are no faster
_SERIAL = (1 << 31) - 1  # bytes: larger models cannot be handed to onnxruntime in one piece


def prune_onnx(
    model: ModelProto,
    batches: Iterable[Batch],
    rows: Sequence[Row],
    recipe: Recipe = DEFAULT,
    progress: Callable[[str], None] = lambda line: None,
    resume: Path | None = None,
) -> dict[str, Tensor]:
    """Prune the tensors of ``rows`` in ``model`` (which is left as it is): every constant that changes, by name.

    All is as :func:`nmconvert.calibrate.driver.prune_model` does it. Nothing is fitted where an operator lets no gradients
    through, which ``progress`` is told.

    Raises:
        DataError: there are fewer than two batches, or they do not fit the graph's inputs.
        ModelError: a row's weight is in a nested graph, or is used in a way that cannot be calibrated.
    """
    module, names, inputs, said = as_module(model, rows, list(batches))
    plan = {names[row.name]: (row.pattern, row.axis) for row in rows if row.pattern and row.axis}
    if (opaque := module.opaque()) and (recipe.block_steps or recipe.model_steps):
        progress(f"nothing is fitted: no gradients through {', '.join(opaque)}")
        recipe = replace(recipe, block_steps=0, model_steps=0)
    own = {place.name: name for name, place in module.places.items()}
    tell = in_own_names(progress, own)
    recipe = replace(recipe, relative_rates=True, at_once=_AT_ONCE)
    with errors_in_own_names(own):
        result = prune_model(module, inputs, plan, recipe, tell, resume, said)
    dtypes = {name: getattr(torch, DTYPES[tensor.data_type]) for name, tensor in Constants.of(model.graph).tensors.items()}
    changed = {own[name]: tensor for name, tensor in result.state.items() if name in own}  # a shared weight has several names
    return {name: module.places[name].back(tensor).to(dtypes[name]) for name, tensor in changed.items()}


class AsModule(NamedTuple):
    """A graph as a module that gives the values by which it is judged.

    Attributes:
        module: called with one of ``inputs``.
        names: the weights → its parameters.
        inputs: what it is called with.
        said: the values.
    """

    module: GraphModule
    names: dict[str, str]
    inputs: list[Batch]
    said: list[Said]


def as_module(model: ModelProto, rows: Sequence[Row], batches: Sequence[Batch]) -> AsModule:
    """``model`` as a module with the weights of ``rows`` as parameters.

    Raises:
        DataError: ``batches`` do not fit the graph's inputs.
        ModelError: onnxruntime cannot run the graph on them, a weight is in a nested graph, or the module gives something else
            than onnxruntime.
    """
    inputs = graph_inputs(model.graph, batches)
    if inputs:
        check_runs(model, dict(zip(input_types(model.graph), as_call(inputs[0]).args, strict=True)))
    said = compared(model)
    module = GraphModule(model, [one.name for one in said])
    names = {}
    for row in rows:
        place = module.places.get(row.name)
        if place is None or not place.name.startswith("parts.") or ".layers." not in place.name:
            raise ModelError(
                f"'{row.name}' is not the weight of one convolution or product of two dimensions in the main graph, which is "
                f"what can be calibrated: --exclude '{row.name}'"
            )
        names[row.name] = place.name
    if inputs:
        check(module, model, inputs[0])
    return AsModule(module, names, inputs, said)


def in_own_names(progress: Callable[[str], None], own: Mapping[str, str]) -> Callable[[str], None]:
    """``progress`` of a module, for which its parameters have the names ``own``."""

    def tell(line: str) -> None:
        first, gap, rest = line.partition("  ")
        progress(own.get(first, first) + gap + rest)

    return tell


@contextmanager
def errors_in_own_names(own: Mapping[str, str]) -> Iterator[None]:
    """The same for errors about one weight."""
    try:
        yield
    except WeightError as error:
        name, colon, rest = str(error).partition(": ")
        raise WeightError(own.get(name, name) + colon + rest) from error


def check(module: GraphModule, model: ModelProto, batch: Batch) -> None:
    """Compare the module with onnxruntime on one batch.

    Raises:
        ModelError: they differ.
    """
    args = as_call(batch).args
    with torch.no_grad():
        ours = module(*args)
    if model.ByteSize() > _SERIAL:
        return  # each operator was compared on its own
    theirs = computed(model, dict(zip(module.inputs, args, strict=True)), module.outputs)
    apart = disagreement(ours, [t.to(x.dtype) for t, x in zip(theirs, ours, strict=True)])
    if not apart <= tolerance(model):
        raise ModelError(
            f"the graph gives something else in torch than in onnxruntime (relative error {apart:.1e}): use magnitude"
        )


def check_runs(model: ModelProto, feeds: Mapping[str, Tensor]) -> None:
    """Run a graph that is not too large for it once.

    Raises:
        ModelError: onnxruntime does not take it, or fails.
    """
    if model.ByteSize() > _SERIAL:
        return
    types = input_types(model.graph)
    try:
        session(model).run(None, {name: x.numpy().astype(types[name]) for name, x in feeds.items()})
    except Exception as error:  # onnxruntime's errors have no common base
        shapes = ", ".join(f"{name} {[*x.shape]}" for name, x in feeds.items())
        raise ModelError(f"onnxruntime cannot run the graph on {shapes}: {first_line(error)}") from error


def computed(model: ModelProto, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The values ``names`` of the graph as onnxruntime computes them; ``feeds`` are its inputs, in any precision."""
    whole = ModelProto()
    whole.CopyFrom(model)
    there = {value.name for value in whole.graph.output}
    whole.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in there)
    types = input_types(model.graph)
    arrays = session(whole).run(list(names), {name: x.numpy().astype(types[name]) for name, x in feeds.items()})
    return [torch.from_numpy(array) for array in arrays]


def tolerance(model: ModelProto) -> float:
    """The relative squared error of its outputs up to which two computations of a graph agree."""
    half = any(t.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for t in model.graph.initializer)
    return AGREES_IN_HALF if half else AGREES


def compared(model: ModelProto) -> list[Said]:
    """The values by which a graph is judged: see the module's docstring."""
    scope = Constants.of(model.graph)
    outputs = [value.name for value in model.graph.output]
    used = set(_before(outputs, scope, lambda node: True))
    layers = [use.node for use in weight_uses(model.graph, scope) if use.node.output[0] in used]
    passed = set(_before([name for node in layers for name in node.input], scope, lambda node: True))
    heads = [node.output[0] for node in layers if node.output[0] not in passed]
    if heads and chooses(model):
        return [Said(name) for name in heads]
    ends = [_meant(name, axis, scope) for name, axis in _joined(outputs, scope)]
    logits = [end.name for end in ends if end.kind != "value"]
    shown = set(_before(logits, scope, lambda node: node.output[0] not in heads))
    found = {said.name: said for said in [*(Said(name) for name in heads if name not in shown), *ends]}
    return list(found.values())


def _joined(outputs: Sequence[str], scope: Constants) -> Iterator[tuple[str, int]]:
    """What Concats make ``outputs`` of, and along which axis."""
    pending = [(name, 1) for name in outputs]
    while pending:
        name, axis = pending.pop(0)
        node = scope.producers.get(name)
        if node is not None and node.op_type == "Concat":
            pending.extend((part, attribute(node, "axis", 1)) for part in node.input)
        elif node is not None:
            yield name, axis


def _meant(name: str, axis: int, scope: Constants) -> Said:
    """A value, or where it is a probability, what this is computed from; ``axis`` is where its channels are."""
    below, channels = name, axis
    node = scope.producers[below]
    while node.op_type == "Transpose" and node.input[0] in scope.producers:
        below, order = node.input[0], attribute(node, "perm", ())
        channels = order[channels] if order else channels
        node = scope.producers[below]
    if node.op_type == "Sigmoid":
        return Said(node.input[0], "chance", channels)
    if node.op_type in ("Softmax", "LogSoftmax"):
        return Said(node.input[0], "choice", attribute(node, "axis", -1))
    return Said(name, "value", axis)


def chooses(model: ModelProto) -> bool:
    """Whether the outputs may jump where the values before them change a little."""
    return any(node.op_type in _CHOOSING for node in model.graph.node)


def _before(names: Sequence[str], scope: Constants, through: Callable[[NodeProto], bool]) -> list[str]:
    """``names`` and all values before them, going back through the nodes for which ``through`` holds."""
    seen: dict[str, None] = {}
    pending = list(names)
    while pending:
        name = pending.pop(0)
        if name and name not in seen:
            seen[name] = None
            node = scope.producers.get(name)
            pending.extend(node.input if node is not None and through(node) else [])
    return list(seen)


def graph_inputs(graph: GraphProto, batches: Sequence[Batch]) -> list[Batch]:
    """The graph's inputs of every batch: a tensor where there is one, else a tuple in the graph's order.

    A graph for a fixed number of samples gets batches of so many.

    Raises:
        DataError: the data does not give an input, or samples of another shape.
    """
    types = input_types(graph)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    found: list[list[Tensor]] = []
    for batch in batches:
        call = as_call(batch)
        given = dict(zip(types, call.args, strict=False)) | call.kwargs
        if missing := [name for name in types if name not in given]:
            raise DataError(f"the graph has an input '{missing[0]}', which the calibration data does not give")
        found.append([_typed(name, given[name], types[name], shapes[name]) for name in types])
    parts = _cut(found, [shapes[name] for name in types])
    return [part[0] if len(part) == 1 else part for part in parts]


def _typed(name: str, value: Any, dtype: Any, shape: Sequence[int]) -> Tensor:
    """One input, whose dimensions are ``shape`` (0: any)."""
    try:
        tensor = torch.from_numpy(np.asarray(value).astype(dtype))
    except ValueError as error:  # a list of images of different sizes
        raise DataError(f"the samples for the graph's input '{name}' differ in size: give one (--task-arg size=…)") from error
    fits = tensor.dim() == len(shape) and all(n in (0, size) for n, size in zip(shape[1:], tensor.shape[1:], strict=True))
    if shape and not fits:
        wanted = [size or "any" for size in shape]
        raise DataError(
            f"the graph's input '{name}' is {wanted}, a batch of the data {[*tensor.shape]}: samples come first, "
            "and the rest has to be equal (--task-arg size=…)"
        )
    return single(tensor)


def _cut(batches: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[int]]) -> list[tuple[Tensor, ...]]:
    """Batches of as many samples as the graph takes; what is left of a batch goes to the next where their sizes are equal.

    Raises:
        DataError: there are too few samples for one.
    """
    fixed = next((shape[0] for shape in shapes if shape and shape[0]), None)
    if not fixed or not batches or not batches[0][0].dim():
        return [tuple(values) for values in batches]
    if len({tuple(value.shape[1:] for value in values) for values in batches}) == 1:
        batches = [[torch.cat(parts) for parts in zip(*batches, strict=True)]]
    cut = []
    for values in batches:
        whole = len(values[0]) // fixed * fixed
        cut += list(zip(*(value[:whole].split(fixed) for value in values), strict=True)) if whole else []
    if not cut:
        raise DataError(f"the graph takes {fixed} samples at once, the data has {len(batches[0][0])}: give more")
    return cut


def input_types(graph: GraphProto) -> dict[str, Any]:
    """NumPy's types of the graph's inputs, in order."""
    constants = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in constants]
    return {value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in values}
