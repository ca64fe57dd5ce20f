"""Reading an ONNX graph: which constants are the weights of convolutions and matrix products, and how they get there.

A weight may be an initialiser or a Constant node, and may pass through Identity, Transpose and Cast nodes on its way; the
same constant may serve several nodes. Bodies of If, Loop and Scan are read as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from nmconvert.errors import ModelError
from nmconvert.matrix import Kind
from nmconvert.tensor import TensorInfo

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
DOMAIN = "nmconvert"  # of the functions that stand for packed layers (nmconvert.export.functions)
SCALED = "Scaled"  # what the names of those begin with whose values have a scale
VALUES_SUFFIX = ".values"  # behind a weight's name: the initialiser of its kept values
DENSE = "Dense"  # what is appended to the name of a call whose weight was unpacked
T = TypeVar("T")
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Source:
    """Where a value comes from: constant ``name``, by way of a transpose (None: as it is) and casts to ``element_type``."""

    name: str
    element_type: int
    shape: tuple[int, ...]
    transposed: tuple[int, ...] | None = None
    obstacle: str | None = None  # an operator on the way that cannot be followed

    def through_transpose(self, perm: Sequence[int]) -> Source:
        """The same value after one more transpose."""
        before = self.transposed or tuple(range(len(self.shape)))
        return replace(self, transposed=tuple(before[p] for p in perm))

    @property
    def operator_shape(self) -> tuple[int, ...]:
        """The shape after the transpose."""
        return self.shape if self.transposed is None else tuple(self.shape[p] for p in self.transposed)


@dataclass(frozen=True)
class WeightUse:
    """``node`` takes the constant ``source`` as its weight, input number ``position``."""

    node: NodeProto
    position: int
    source: Source
    kind: Kind
    groups: int = 1

    @property
    def layout(self) -> tuple[Kind, int, tuple[int, ...] | None]:
        """How the weight is read: uses of one weight that differ in this have no matrix in common."""
        return self.kind, self.groups, self.source.transposed


@dataclass
class Constants:
    """The constants that are visible in a graph and in the graphs around it, and the nodes that make values."""

    tensors: dict[str, TensorProto] = field(default_factory=dict)
    producers: dict[str, NodeProto] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: GraphProto, outer: Constants | None = None) -> Constants:
        """Constants of ``graph`` within the scope ``outer``, whose names its own inputs and values hide."""
        scope = cls(dict(outer.tensors), dict(outer.producers)) if outer else cls()
        for name in [*(value.name for value in graph.input), *(name for node in graph.node for name in node.output)]:
            scope.tensors.pop(name, None)
            scope.producers.pop(name, None)
        scope.tensors.update({tensor.name: tensor for tensor in graph.initializer})
        for node in graph.node:
            if (tensor := constant_tensor(node)) is not None:
                scope.tensors[node.output[0]] = tensor
            scope.producers.update({name: node for name in node.output if name})
        return scope

    def trace(self, name: str, depth: int = 16) -> Source | None:
        """Follow a value back to the constant it comes from; None where it is computed."""
        if (tensor := self.tensors.get(name)) is not None:
            return Source(name, tensor.data_type, tuple(tensor.dims))
        node = self.producers.get(name)
        if node is None or depth == 0 or not node.input or node.domain not in _STANDARD:
            return None
        source = self.trace(node.input[0], depth - 1)
        if source is None or node.op_type == "Identity":
            return source
        if node.op_type == "Transpose":
            dims = list(range(len(source.shape)))
            perm = attribute(node, "perm", dims[::-1])
            if source.obstacle or sorted(perm) != dims:  # what was reshaped before has other dimensions
                return replace(source, obstacle=source.obstacle or "Transpose")
            return source.through_transpose(perm)
        if node.op_type == "Cast":
            to = attribute(node, "to", source.element_type)
            if source.element_type not in (self.tensors[source.name].data_type, to):  # the cast before may have rounded
                return replace(source, element_type=to, obstacle=source.obstacle or "Cast")
            return replace(source, element_type=to)
        if node.op_type in ("DequantizeLinear", "QuantizeLinear", "Reshape", "Squeeze", "Unsqueeze", "Flatten"):
            return replace(source, obstacle=source.obstacle or node.op_type)
        return None


def packed_inputs(node: NodeProto) -> tuple[str, ...]:
    """The inputs of a call in :data:`DOMAIN` that hold its weight: values, mask, table and, where it has one, scale."""
    return tuple(node.input[1 : 5 if node.op_type.startswith(SCALED) else 4])


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant node that holds one."""
    if node.op_type == "Constant" and node.domain in _STANDARD:
        for attr in node.attribute:
            if attr.name == "value" and attr.type == AttributeProto.TENSOR:
                tensor: TensorProto = attr.t
                return tensor
    return None


def attribute(node: NodeProto, name: str, default: T) -> T:
    """The value of an attribute, or ``default``.

    Raises:
        ModelError: it is no whole number where ``default`` is one.
    """
    for attr in node.attribute:
        if attr.name == name:
            value: T = helper.get_attribute_value(attr)
            if isinstance(default, int) and not isinstance(value, int):
                raise ModelError(f"{node.op_type} '{node.name or node.output[0]}': {name} is {value!r}, and no whole number")
            return value
    return default


def reads(node: NodeProto) -> Iterator[str]:
    """The values that a node reads, those that the graphs in its attributes take from outside included."""
    yield from (name for name in node.input if name)
    for attr in node.attribute:
        for graph in [*attr.graphs, *([attr.g] if attr.HasField("g") else [])]:
            for inner in graph.node:
                yield from reads(inner)


def sort_nodes(graph: GraphProto) -> None:
    """Put each node behind those that it reads, as the format wants it and onnxruntime does not; a cycle stays as it is."""
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    before = {place: [makers[n] for n in reads(node) if n in makers] for place, node in enumerate(graph.node)}
    if all(maker < place for place, found in before.items() for maker in found):
        return
    with suppress(CycleError):
        nodes = [graph.node[place] for place in TopologicalSorter(before).static_order()]
        del graph.node[:]
        graph.node.extend(nodes)


def graphs(model: ModelProto) -> Iterator[tuple[GraphProto, Constants]]:
    """Every graph of a model, the bodies of If, Loop and Scan included, with the constants visible in it."""
    yield from _graphs(model.graph, None)


def _graphs(graph: GraphProto, outer: Constants | None) -> Iterator[tuple[GraphProto, Constants]]:
    scope = Constants.of(graph, outer)
    yield graph, scope
    for node in graph.node:
        for attr in node.attribute:
            for body in [attr.g] if attr.type == AttributeProto.GRAPH else attr.graphs:
                yield from _graphs(body, scope)


def is_layer(use: WeightUse) -> bool:
    """Whether a weight can be calibrated: a convolution's, or a matrix, that is read as it is."""
    ranks = (3, 4, 5) if use.kind in ("conv", "conv_transpose") else (2,)
    source = use.source
    return source.obstacle is None and len(source.shape) in ranks and source.element_type in FLOATS


def layer_weights(model: ModelProto) -> set[str]:
    """The constants that are weights of layers of the main graph, each read in one way alone."""
    layouts: dict[str, set[object]] = {}
    for use in weight_uses(model.graph, Constants.of(model.graph)):
        if is_layer(use):
            layouts.setdefault(use.source.name, set()).add(use.layout)
    return {name for name, found in layouts.items() if len(found) == 1}


def weight_uses(graph: GraphProto, scope: Constants) -> Iterator[WeightUse]:
    """The weights of the convolutions and matrix products of one graph."""
    for node in graph.node:
        if node.domain not in _STANDARD:
            continue
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) > 1:
            source = scope.trace(node.input[1])
            if source and not scope.trace(node.input[0]):
                kind: Kind = "conv" if node.op_type == "Conv" else "conv_transpose"
                yield WeightUse(node, 1, source, kind, attribute(node, "group", 1))
        elif node.op_type in ("MatMul", "Gemm"):
            yield from _product_weight(node, scope)


def _product_weight(node: NodeProto, scope: Constants) -> Iterator[WeightUse]:
    sources = [scope.trace(name) for name in node.input[:2]]
    if (sources[0] is None) == (sources[1] is None):
        return  # two activations, or a product of constants that any runtime folds
    position = 0 if sources[0] else 1
    source = sources[position]
    assert source is not None
    if len(source.operator_shape) < 2:
        return
    flipped = bool(attribute(node, "transB" if position else "transA", 0)) if node.op_type == "Gemm" else False
    # The right operand is [K, N] (inputs first) unless it is flipped, the left one [M, K].
    kind: Kind = "matmul" if bool(position) != flipped else "linear"
    yield WeightUse(node, position, source, kind)


def tensor_infos(model: ModelProto) -> list[TensorInfo]:
    """All constants of the model as the plan sees them, weights with their kind, the others with the reason why not."""
    uses: dict[str, list[WeightUse]] = {}
    others: dict[str, str] = {}
    tensors: dict[str, TensorProto] = {}
    for graph, scope in graphs(model):
        tensors |= {name: tensor for name, tensor in scope.tensors.items() if name not in tensors}
        as_weight = set()
        for use in weight_uses(graph, scope):
            uses.setdefault(use.source.name, []).append(use)
            as_weight.add((id(use.node), use.position))
        for node in graph.node:
            for position, name in enumerate(node.input):
                if (id(node), position) not in as_weight and not _passes_on(node):
                    source = scope.trace(name)
                    if source is not None:
                        others.setdefault(source.name, node.op_type)
    last = _output_weight(model)
    counts = Counter(name for name, _ in named_tensors(model))
    return [
        _info(name, tensor, uses.get(name, []), others.get(name), last)
        if counts[name] == 1
        else replace(_info(name, tensor, [], None, None), reason="its name is not unique in the model")
        for name, tensor in tensors.items()
    ]


def named_tensors(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """The initialisers of every graph, and the tensors of its Constant nodes under the name of their output."""
    for graph, _ in graphs(model):
        yield from ((tensor.name, tensor) for tensor in graph.initializer)
        for node in graph.node:
            if (tensor := constant_tensor(node)) is not None:
                yield node.output[0], tensor


def _passes_on(node: NodeProto) -> bool:
    return node.op_type in ("Identity", "Transpose", "Cast", "DequantizeLinear")


def _info(name: str, tensor: TensorProto, uses: list[WeightUse], other: str | None, last: str | None) -> TensorInfo:
    known = tensor.data_type in TensorProto.DataType.values()  # a newer ONNX may have more
    dtype = TensorProto.DataType.Name(tensor.data_type).lower() if known else f"element type {tensor.data_type}"
    if tensor.data_type not in DTYPES:
        return TensorInfo(name, tuple(tensor.dims), "uint8", reason=f"{dtype}: left as it is")
    info = TensorInfo(name, tuple(tensor.dims), DTYPES[tensor.data_type])
    if not uses:
        if len(tensor.dims) < 2:
            return info
        return replace(info, reason=f"used by {other}: not a weight" if other else "not used by any operator")
    use = uses[0]
    layouts = {u.layout for u in uses}
    info = replace(info, kind=use.kind, groups=use.groups, transposed=use.source.transposed, output=name == last)
    obstacle = next((u.source.obstacle for u in uses if u.source.obstacle), None)
    if obstacle:
        return replace(info, reason=f"{dtype} behind {obstacle}: left as it is")
    if other:
        return replace(info, reason=f"tied: also used by {other}")
    shape = use.source.operator_shape
    if use.kind in ("conv", "conv_transpose") and (len(shape) < 3 or use.groups < 1 or shape[0] % use.groups):
        return replace(info, kind=None, groups=1, reason=f"no convolution: of shape {list(shape)} in {use.groups} groups")
    if len(layouts) > 1:
        return replace(info, reason="shared by operators that would group it differently")
    return info


def _output_weight(model: ModelProto) -> str | None:
    """The matrix whose product reaches a graph output with no other weight on the way."""
    graph = model.graph
    scope = Constants.of(graph)
    by_node = {id(use.node): use for use in weight_uses(graph, scope)}
    pending, seen = [value.name for value in graph.output], set()
    found = []
    while pending:
        name = pending.pop()
        node = scope.producers.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        use = by_node.get(id(node))
        if use is not None:
            found.append(use)
        else:
            pending.extend(node.input)
    matrices = [use.source.name for use in found if use.kind in ("linear", "matmul")]
    return matrices[0] if len(found) == 1 and matrices else None


def opset(model: ModelProto) -> int:
    """The version of the standard operators that a model uses."""
    return max((imported.version for imported in model.opset_import if imported.domain in _STANDARD), default=1)


def used_names(model: ModelProto) -> Mapping[str, int]:
    """How often each value name is read, by nodes of any graph or as an output."""
    count: dict[str, int] = {}
    for graph, _ in graphs(model):
        for name in [*(n for node in graph.node for n in node.input), *(value.name for value in graph.output)]:
            count[name] = count.get(name, 0) + 1
    return count


def value_names(model: ModelProto) -> set[str]:
    """The names of all values of a model."""
    found = set(used_names(model))
    for graph, _ in graphs(model):
        found.update(output for node in graph.node for output in node.output)
        found.update(value.name for value in (*graph.input, *graph.initializer))
    return found


def remove_unused_constants(model: ModelProto) -> None:
    """Drop initialisers that nothing reads, and the Constant, Identity, Transpose and Cast nodes that led from them."""
    constants = {tensor.name for graph, _ in graphs(model) for tensor in graph.initializer}
    while True:
        reads = used_names(model)
        removed = 0
        for graph, _ in graphs(model):
            for index in reversed(range(len(graph.node))):
                node = graph.node[index]
                leads_on = constant_tensor(node) is not None or node.op_type in ("Identity", "Transpose", "Cast")
                if leads_on and not any(reads.get(name) for name in node.output):
                    del graph.node[index]
                    removed += 1
            for entries in (graph.initializer, graph.input):  # old models list their initialisers as inputs, too
                for index in reversed(range(len(entries))):
                    if entries[index].name in constants and not reads.get(entries[index].name):
                        del entries[index]
                        removed += 1
        if not removed:
            return
