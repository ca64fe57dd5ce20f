"""Pruning a bare ONNX file with calibration data: onnxruntime computes the layer inputs, no module is needed.

The graph is walked once, weight by weight in the order of its nodes. For each the part of the graph between what is
already known and the layer's input is run as a model of its own, once with the dense weights and once with the pruned
ones; then the layer itself is, and its output is known from there on. So nothing is computed twice, and what no later
layer needs is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from nmconvert.calibrate.correct import held_out_error, keep_if_better, output_error, reconstruct
from nmconvert.calibrate.driver import DEFAULT, Recipe
from nmconvert.calibrate.moments import Moments, solve_rows
from nmconvert.calibrate.onnx_module import OnnxModule, key
from nmconvert.calibrate.replay import Batch, Call, as_call
from nmconvert.calibrate.store import Store
from nmconvert.calibrate.unfold import conv_columns, transposed_columns
from nmconvert.errors import DataError, ModelError
from nmconvert.onnx_graph import Constants, WeightUse, attribute, weight_uses
from nmconvert.tensor import Row

_AGREES = 1e-6  # relative squared error between torch and onnxruntime
_BATCH = 64  # samples at which the graph is fitted at the full rate
_PASSES = 10  # over the data, for graphs whose batch is one sample

Known = dict[str, list[NDArray[Any]]]
"""Values of the graph by name, one array a batch."""


def prune_onnx(
    model: ModelProto,
    batches: Iterable[Batch],
    rows: Sequence[Row],
    recipe: Recipe = DEFAULT,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Tensor]:
    """Prune the tensors of ``rows`` in ``model`` (which is left as it is): every initialiser that changes, by name.

    Biases take up the means. At the end the graph is fitted as a whole to what its last weighted layers computed before, where
    :class:`nmconvert.calibrate.onnx_module.OnnxModule` knows its operators and agrees with onnxruntime, and where the
    held-out batches say that it helps.

    Raises:
        DataError: no batches, or they do not fit the graph's inputs.
        ModelError: a row's weight is in a nested graph, or is used in a way that cannot be calibrated.
    """
    feeds = _feeds(model.graph, list(batches))
    count = len(next(iter(feeds.values())))
    held = min(count - 1, max(1, round(count * recipe.held_out)))
    walk = _Walk(model, {name: arrays[: count - held] for name, arrays in feeds.items()}, recipe)
    todo = {row.name: row for row in rows}
    for use in walk.uses:
        row = todo.pop(use.source.name, None)
        if row is not None:
            error = walk.prune(use, row)
            progress(f"{row.name}  {row.pattern} {row.axis}  error {error:.4f}")
    if todo:
        raise ModelError(f"'{next(iter(todo))}' is not used in the main graph and cannot be calibrated: exclude it")
    if recipe.model_steps:
        progress(_fit(walk, feeds, held, {row.name: row for row in rows}))
    return walk.changed


def _fit(walk: _Walk, feeds: Known, held: int, rows: Mapping[str, Row]) -> str:
    """Fit all floating constants of the pruned graph, the masks fixed; what came of it, for people."""
    heads = _heads(walk)
    count = len(next(iter(feeds.values())))
    inputs = [{name: torch.from_numpy(arrays[n]) for name, arrays in feeds.items()} for n in range(count)]
    dense = _Side(walk.scope.tensors, dict(feeds))
    for head in heads:
        walk.compute(dense, head)
    targets = [[torch.from_numpy(dense.known[head][n]) for head in heads] for n in range(count)]
    try:
        module = OnnxModule(walk.model, heads)
        with torch.no_grad():
            apart = float(output_error(module(**inputs[0]), targets[0]))
    except (NotImplementedError, KeyError, RuntimeError) as error:
        return f"not fitted as a whole: {error}"
    if apart > _AGREES:
        return f"not fitted as a whole: torch and onnxruntime differ by {apart:.1e}"
    with torch.no_grad():
        for name, tensor in walk.changed.items():
            module.weights[key(name)].copy_(tensor)
    masks = {f"weights.{key(name)}": walk.changed[name] != 0 for name in rows if name in walk.changed}
    calls, recipe = [Call((), x) for x in inputs], walk.recipe
    generator = torch.Generator().manual_seed(recipe.seed)
    samples = len(next(iter(inputs[0].values())))
    rate = recipe.model_rate * min(1.0, (samples / _BATCH) ** 0.5)  # gradients of few samples are noisy
    steps = max(recipe.model_steps, _PASSES * (count - held))
    order = [n for _ in range(-(-steps // (count - held))) for n in torch.randperm(count - held, generator=generator).tolist()]

    def change() -> None:
        reconstruct(module, module, lambda step: (calls[order[step]], targets[order[step]]), masks, steps=steps, rate=rate)

    split = count - held
    before, after = keep_if_better(
        module, change, lambda: held_out_error(module, [[c] for c in calls[split:]], [[t] for t in targets[split:]])
    )
    if after < before:
        for name in walk.scope.tensors:
            if key(name) in module.weights and not torch.equal(module.weights[key(name)], walk.tensor(name)):
                walk.changed[name] = module.weights[key(name)].detach().clone()
    return f"the whole graph: reconstruction  {before:.4f} -> {after:.4f}"


def _heads(walk: _Walk) -> list[str]:
    """The outputs of the weighted nodes that no other weighted node comes after; those of the graph where there is none."""
    by_output = {use.node.output[0] for use in walk.uses}
    seen: set[str] = set()
    heads, pending = [], [value.name for value in walk.model.graph.output]
    while pending:
        name = pending.pop()
        node = walk.scope.producers.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        if name in by_output:
            heads.append(name)
        else:
            pending.extend(node.input)
    return sorted(heads) or [value.name for value in walk.model.graph.output]


def _feeds(graph: GraphProto, batches: list[Batch]) -> Known:
    constants = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in constants]
    types = {v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in graph.input}
    if not batches:
        raise DataError("calibration needs at least 1 batch; there is none")
    feeds: Known = {name: [] for name in names}
    for batch in batches:
        call = as_call(batch)
        given = dict(zip(names, call.args, strict=False)) | call.kwargs
        if missing := [name for name in names if name not in given]:
            raise DataError(f"the graph has an input '{missing[0]}', which the calibration data does not give")
        for name in names:
            feeds[name].append(np.asarray(given[name]).astype(types[name]))
    return feeds


@dataclass
class _Side:
    """The dense or the pruned model on its way through the graph: its constants, and what is known of its values."""

    constants: dict[str, TensorProto]
    known: Known


class _Walk:
    """The state of one walk over a graph."""

    def __init__(self, model: ModelProto, feeds: Known, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.scope = Constants.of(model.graph)
        self.uses = list(weight_uses(model.graph, self.scope))
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.dense = _Side(self.scope.tensors, dict(feeds))
        self.pruned = _Side(dict(self.scope.tensors), dict(feeds))
        self.changed: dict[str, Tensor] = {}
        self.store = Store(recipe.memory)

    def prune(self, use: WeightUse, row: Row) -> float:
        """Solve one layer, and go on to its output on both sides."""
        assert row.pattern is not None
        source = use.node.input[1 - use.position] if use.kind in ("linear", "matmul") else use.node.input[0]
        for side in (self.dense, self.pruned):
            self.compute(side, source)
        bias = self._bias(use.node)
        solved = solve_rows(
            row.view.to_matrix(self.tensor(row.name)),
            self._moments(use, row, source),
            row.pattern,
            self.recipe.criterion,
            self.recipe.damping,
            centred=bias is not None,
        )
        self._change(row.name, row.view.from_matrix(solved.weight))
        if bias is not None:
            self._change(bias, self.tensor(bias) - solved.shift)
        for side in (self.dense, self.pruned):
            self.compute(side, use.node.output[0])
            self._forget(side)
        return solved.error

    def _moments(self, use: WeightUse, row: Row, source: str) -> list[Moments]:
        limit = -(-self.recipe.tokens // len(self.dense.known[source]))
        moments: list[Moments] = []
        for x, dense in zip(self.pruned.known[source], self.dense.known[source], strict=True):
            blocks, others = (_columns(use, row, torch.from_numpy(a), limit) for a in (x, dense))
            moments = moments or [Moments() for _ in blocks]
            for block, a, b in zip(moments, blocks, others, strict=True):
                block.add(a, b if self.recipe.against_dense else a)
        return moments

    def _bias(self, node: NodeProto) -> str | None:
        """The constant that is added to each output channel of ``node``, where nothing else uses it."""
        if not self.recipe.correct_means:
            return None
        name = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "MatMul" and len(self.consumers.get(node.output[0], [])) == 1:
            after = self.consumers[node.output[0]][0]
            name = next((n for n in after.input if n != node.output[0]), "") if after.op_type == "Add" else ""
        tensor = self.dense.constants.get(name)
        alone = len(self.consumers.get(name, [])) == 1
        scaled = node.op_type == "Gemm" and (attribute(node, "beta", 1.0) != 1.0 or attribute(node, "alpha", 1.0) != 1.0)
        return name if tensor is not None and len(tensor.dims) == 1 and alone and not scaled else None

    def tensor(self, name: str) -> Tensor:
        """The dense constant ``name``."""
        tensor = self.scope.tensors[name]
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
            raise ModelError(f"'{name}' is of a type that cannot be calibrated in onnxruntime: use a float32 export")
        return torch.from_numpy(numpy_helper.to_array(tensor).copy())

    def _change(self, name: str, tensor: Tensor) -> None:
        self.changed[name] = tensor.to(self.tensor(name).dtype).contiguous()
        self.pruned.constants[name] = numpy_helper.from_array(self.changed[name].numpy(), name)

    # -------------------------------------------------------------------------------------- parts of the graph

    def compute(self, side: _Side, name: str) -> None:
        """Make ``name`` known on ``side``."""
        if name in side.known:
            return
        part, inputs = _extract(self.model, side, self._needed([name], side), name)
        session = _session(part)
        count = len(next(iter(side.known.values())))
        feeds = ({i: side.known[i][n] for i in inputs} for n in range(count))
        side.known[name] = [self.store.keep(session.run([name], feed)[0]) for feed in feeds]

    def _needed(self, names: Sequence[str], side: _Side) -> set[str]:
        """What must be computed or known to get ``names``: the names of all values on the way, back to the known ones."""
        seen: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name in seen or not name:
                continue
            seen.add(name)
            producer = self.scope.producers.get(name)
            if name not in side.known and name not in side.constants and producer is not None:
                pending.extend(_inputs(producer))
        return seen

    def _forget(self, side: _Side) -> None:
        outputs = [value.name for value in self.model.graph.output]
        needed = self._needed(outputs, side)
        side.known = {name: arrays for name, arrays in side.known.items() if name in needed}


def _inputs(node: NodeProto) -> Iterable[str]:
    """The values that a node reads, those that the graphs in its attributes take from outside included."""
    yield from node.input
    for attr in node.attribute:
        for graph in [*attr.graphs, *([attr.g] if attr.HasField("g") else [])]:
            for inner in graph.node:
                yield from _inputs(inner)


def _extract(model: ModelProto, side: _Side, needed: set[str], output: str) -> tuple[ModelProto, list[str]]:
    """The part of ``model`` that computes ``output`` from what ``side`` knows, and the names of its inputs."""
    nodes = [
        node
        for node in model.graph.node
        if any(name in needed and name not in side.known and name not in side.constants for name in node.output)
    ]
    read = {name for node in nodes for name in _inputs(node)}
    inputs = [name for name in side.known if name in read]
    constants = []
    for name in sorted(read & side.constants.keys()):
        constant = TensorProto()
        constant.CopyFrom(side.constants[name])
        constant.name = name  # that of a Constant node has none
        constants.append(constant)
    graph = helper.make_graph(
        nodes, "part", [_value(name, side.known[name][0]) for name in inputs], [ValueInfoProto(name=output)], constants
    )
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions)
    return part, inputs


def _value(name: str, array: NDArray[Any]) -> ValueInfoProto:
    value: ValueInfoProto = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
    return value


def _session(model: ModelProto) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _columns(use: WeightUse, row: Row, x: Tensor, limit: int) -> list[Tensor]:
    """As :func:`nmconvert.calibrate.unfold.columns`, for a node of a graph."""
    assert row.axis is not None
    if use.kind in ("linear", "matmul"):
        across = not use.position or attribute(use.node, "transA", 0)  # tokens are x's columns
        x = x.mT if across and x.dim() > 1 else x
        flat = x.reshape(-1, x.shape[-1])
        return [flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(len(flat)))[:limit]]]
    rank = x.dim() - 2
    kernel = use.source.operator_shape[2:]
    stride = attribute(use.node, "strides", [1] * rank)
    dilation = attribute(use.node, "dilations", [1] * rank)
    pads = _pads(use.node, x.shape[2:], kernel, stride, dilation)
    if use.kind == "conv_transpose":
        extra = attribute(use.node, "output_padding", [0] * rank)
        crops = [(low, high - more) for (low, high), more in zip(pads, extra, strict=True)]
        return transposed_columns(x, kernel, stride, crops, dilation, use.groups, row.axis, limit)
    padded = F.pad(x, [p for pair in reversed(pads) for p in pair])
    return conv_columns(padded, kernel, stride, dilation, use.groups, row.axis, limit)


def _pads(
    node: NodeProto, space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Begin and end padding of each dimension, ``auto_pad`` worked out as the specification of Conv says."""
    mode = attribute(node, "auto_pad", b"NOTSET").decode()
    rank = len(kernel)
    if mode == "NOTSET":
        pads = attribute(node, "pads", [0] * 2 * rank)
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * rank
    if node.op_type == "ConvTranspose":
        raise ModelError(f"'{node.name}': a ConvTranspose with auto_pad cannot be calibrated: exclude its weight")
    result = []
    for size, k, s, d in zip(space, kernel, stride, dilation, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return result
