"""The channels of an ONNX graph: what each of its nodes does to its values' dimensions.

The graph is run once, node by node: the shapes of its values, and the numbers that say how it reshapes, slices and picks, are
those of that run. Nodes with graphs in their attributes, and all others that no rule describes, freeze what they touch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto
from torch import Tensor

from nmconvert.calibrate.atoms import Ints, Proof
from nmconvert.calibrate.axes import Value, Walk
from nmconvert.calibrate.onnx_ops import Runtime, constant_values
from nmconvert.onnx_graph import Constants, attribute, named_tensors, opset, reads

_STANDARD = ("", "ai.onnx")
_ALONG_ALL = 13  # the first opset in which Softmax acts along one dimension alone


def find_channels(model: ModelProto, feeds: Mapping[str, Tensor]) -> Proof:
    """Which channels of the constants of ``model`` may change places; ``feeds`` are an example of its inputs.

    Raises:
        ModelError: onnxruntime cannot run one of its nodes.
    """
    tensors = {name: t for name, t in Constants.of(model.graph).tensors.items() if t.data_type != TensorProto.STRING}
    known = {**{name: constant_values(tensor) for name, tensor in tensors.items()}, **feeds}
    unique = {name for name, count in Counter(name for name, _ in named_tensors(model)).items() if count == 1}
    graph = _Graph(opset(model), set(tensors), unique)
    runtime = Runtime(model)
    left = Counter(name for node in model.graph.node for name in reads(node))
    for node in model.graph.node:
        names = [name for name in node.output if name]
        if not all(name in tensors for name in names):
            found = runtime(node, {name: known[name] for name in reads(node) if name in known})
            known.update(zip(names, found, strict=True))
            graph.visit(node, known)
        left.subtract(reads(node))
        for name in {*reads(node), *names} - set(tensors):
            if not left[name]:
                known.pop(name, None)
    outputs = [graph.values[value.name] for value in model.graph.output if value.name in graph.values]
    graph.walk.freeze("the graph's output", *outputs)
    return graph.walk.proof()


@dataclass
class Step:
    """A node and what it computes with: ``inputs`` by position (None where left out), and its results' shapes.

    ``numbers`` are the inputs' own values where every run has the same, or they follow from shapes alone; else None.
    """

    node: NodeProto
    opset: int
    inputs: list[Value | None]
    numbers: list[Tensor | None]
    shapes: list[tuple[int, ...]]

    @property
    def x(self) -> Value:
        """The first input, which is there."""
        value = self.inputs[0]
        assert value is not None
        return value

    @property
    def shape(self) -> tuple[int, ...]:
        """The first result's."""
        return self.shapes[0]

    @property
    def given(self) -> list[Value]:
        """The inputs that are there."""
        return [value for value in self.inputs if value is not None]

    def integers(self, position: int, name: str) -> list[int] | None:
        """What input ``position`` says, or, in older opsets, the attribute ``name``.

        Raises:
            _Unsettled: the input is computed from the graph's inputs.
        """
        if len(self.inputs) > position and self.inputs[position] is not None:
            self.settled(position)
            said = self.numbers[position]
            assert said is not None
            return [int(number) for number in said.reshape(-1).tolist()]
        found: list[int] | None = attribute(self.node, name, None)
        return found

    def settled(self, position: int) -> None:
        """Raises _Unsettled where the input is there and not the same in every run."""
        if len(self.inputs) > position and self.inputs[position] is not None and self.numbers[position] is None:
            raise _Unsettled

    def dim(self, default: int, name: str = "axis") -> int:
        """An attribute that is a dimension of the first input."""
        return int(attribute(self.node, name, default)) % max(self.x.rank, 1)


class _Unsettled(Exception):
    """How a node works depends on the graph's inputs."""


class _Graph:
    """The values of a graph as the walk knows them; those of ``constants`` are parameters if their names are ``unique``."""

    def __init__(self, version: int, constants: set[str], unique: set[str]) -> None:
        self.walk = Walk()
        self.version, self.parameters = version, constants & unique
        self.values: dict[str, Value] = {}
        self.settled = set(constants)

    def visit(self, node: NodeProto, known: Mapping[str, Tensor]) -> None:
        """Take in one node; ``known`` are its inputs and results."""
        names = [name for name in node.output if name]
        shapes = [() if isinstance(known[name], list) else tuple(known[name].shape) for name in names]  # of a sequence: none
        rule, count = RULES.get(node.op_type, (None, 0)) if node.domain in _STANDARD else (None, 0)
        results = None if rule is None else self._results(rule, node, shapes, known)
        understood = set(node.input if node.op_type in _LOOKED_AT else node.input[:count] if results is not None else [])
        for name in dict.fromkeys(reads(node)):
            if name in known and name not in understood:
                self.walk.freeze(node.op_type, self.value(name, known))
        results = results or []
        new = [self.walk.fresh(shape, node.op_type) for shape in shapes[len(results) :]]
        self.values.update(zip(names, [*results, *new], strict=True))
        if node.op_type in (*_LOOKED_AT, "Constant") or (node.input and all(name in self.settled for name in reads(node))):
            self.settled.update(names)

    def _results(
        self, rule: Rule, node: NodeProto, shapes: list[tuple[int, ...]], known: Mapping[str, Tensor]
    ) -> Sequence[Value] | None:
        inputs = [self.value(name, known) if name else None for name in node.input]
        numbers = [known[name] if name in self.settled else None for name in node.input]
        try:
            results = rule(self.walk, Step(node, self.version, inputs, numbers, shapes))
        except (_Unsettled, ValueError):  # of a weight that is a view of another: sizes are not those of what it is a view of
            return None
        return [results] if isinstance(results, Value) else results

    def value(self, name: str, known: Mapping[str, Tensor]) -> Value:
        """By its name."""
        if name not in self.values:
            shape, other = (
                tuple(known[name].shape),
                "a name that is not unique" if name in self.settled else "the graph's input",
            )
            parameter = name in self.parameters
            self.values[name] = self.walk.parameter(name, shape) if parameter else self.walk.fresh(shape, other)
        return self.values[name]


# ── one rule for each kind of operator; None: it is not understood, and freezes what it touches ───────────────────────

Result = Value | Sequence[Value] | None


def _pointwise(walk: Walk, step: Step) -> Result:
    return walk.pointwise(step.shape, step.given)


def _same(walk: Walk, step: Step) -> Result:
    return step.x


def _matrix_product(walk: Walk, step: Step) -> Result:
    a, b = step.given
    return None if a.rank < 2 or b.rank < 2 else walk.product(step.shape, a, b)


def _gemm(walk: Walk, step: Step) -> Result:
    a, b, *bias = step.given
    a = walk.transposed(a, [1, 0]) if attribute(step.node, "transA", 0) else a
    b = walk.transposed(b, [1, 0]) if attribute(step.node, "transB", 0) else b
    return walk.pointwise(step.shape, [walk.product(step.shape, a, b), *bias])


def _convolution(walk: Walk, step: Step) -> Result:
    x, weight, *bias = step.given
    transposed, groups = step.node.op_type == "ConvTranspose", attribute(step.node, "group", 1)
    return walk.convolution(step.shape, x, weight, bias[0] if bias else None, groups, transposed=transposed)


def _channel_norm(walk: Walk, step: Step) -> Result:
    """Norms with parameters for each channel, which is dimension 1."""
    x, *parameters = step.given
    over = range(2, x.rank) if step.node.op_type == "InstanceNormalization" else []
    if step.node.op_type == "GroupNormalization":
        over = range(2, x.rank)
        walk.grouped(x, attribute(step.node, "num_groups", 1))
        if parameters[0].shape[0] != x.shape[1]:  # before opset 21 there is one for each group
            return None
    return walk.normalized(x, over, parameters, 1)


def _last_norm(walk: Walk, step: Step) -> Result:
    first = step.dim(-1)
    return walk.normalized(step.x, range(first, step.x.rank), step.given[1:], first)


def _softmax(walk: Walk, step: Step) -> Result:
    if step.opset >= _ALONG_ALL:
        return walk.apart(step.x, [step.dim(-1)])
    return walk.apart(step.x, range(step.dim(1), step.x.rank))


def _reduction(walk: Walk, step: Step) -> Result:
    axes = step.integers(1, "axes") or []
    if not axes and attribute(step.node, "noop_with_empty_axes", 0):
        return step.x
    dims = [d % step.x.rank for d in axes] or range(step.x.rank)
    return walk.reduced(step.x, dims, keep=bool(attribute(step.node, "keepdims", 1)))


def _global_pool(walk: Walk, step: Step) -> Result:
    return walk.reduced(step.x, range(2, step.x.rank), keep=True)


def _windowed(walk: Walk, step: Step) -> Result:
    return walk.windowed(step.x, step.shape, step.node.op_type, 2)


def _concatenation(walk: Walk, step: Step) -> Result:
    return walk.joined(step.given, step.dim(0))


def _split(walk: Walk, step: Step) -> Result:
    step.settled(1)
    dim = step.dim(0)
    ends = np.cumsum([shape[dim] for shape in step.shapes])
    return [walk.taken(step.x, dim, part) for part in np.split(np.arange(step.x.shape[dim]), ends[:-1])]


def _slice(walk: Walk, step: Step) -> Result:
    starts, ends = step.integers(1, "starts"), step.integers(2, "ends")
    assert starts is not None
    assert ends is not None
    axes = step.integers(3, "axes") or list(range(len(starts)))
    steps = step.integers(4, "steps") or [1] * len(starts)
    value = step.x
    for axis, start, end, stride in zip(axes, starts, ends, steps, strict=True):
        dim = axis % value.rank
        value = walk.taken(value, dim, _sliced(value.shape[dim], start, end, stride))
    return value


def _sliced(size: int, start: int, end: int, step: int) -> Ints:
    """The places that ONNX means: ends beyond the dimension are those of the dimension, in either direction."""
    low, high = (0, size) if step > 0 else (-1, size - 1)
    first, last = (min(max(place + size if place < 0 else place, low), high) for place in (start, end))
    return np.arange(first, last, step)


def _gather(walk: Walk, step: Step) -> Result:
    index, value, dim = step.numbers[1], step.inputs[1], step.dim(0)
    assert value is not None
    if index is None:
        return walk.embedding(step.shape, step.x, value, dim)
    places = index.long().numpy() % step.x.shape[dim]
    if not places.ndim:
        return walk.picked(step.x, dim, int(places))
    return walk.reshaped(walk.taken(step.x, dim, places.ravel()), step.shape)


def _padding(walk: Walk, step: Step) -> Result:
    pads = step.integers(1, "pads") or []
    rank = len(pads) // 2
    if attribute(step.node, "mode", b"constant") != b"constant" or min(pads, default=0) < 0:
        return None
    axes = step.integers(3, "axes") or list(range(rank))
    value = step.x
    for place, axis in enumerate(axes):
        value = walk.padded(value, axis % value.rank, pads[place], pads[place + rank])
    return value


def _transpose(walk: Walk, step: Step) -> Result:
    return walk.transposed(step.x, attribute(step.node, "perm", list(range(step.x.rank))[::-1]))


def _reshaped(walk: Walk, step: Step) -> Result:
    step.settled(1)
    return walk.reshaped(step.x, step.shape)


def _expand(walk: Walk, step: Step) -> Result:
    step.settled(1)
    return walk.pointwise(step.shape, [step.x])


Rule = Callable[[Walk, Step], Result]
_LOOKED_AT = ("Shape", "Size")  # they read no values, and give what follows from shapes


def _rules() -> dict[str, tuple[Rule, int]]:
    """Each operator's rule, and how many of its inputs it is about: the others are frozen."""
    every = 1 << 10
    table: Sequence[tuple[Rule, int, str]] = [
        (
            _pointwise,
            every,
            "Add Sub Mul Div Pow Min Max Mean Sum Where PRelu Clip Equal Greater GreaterOrEqual Less LessOrEqual And Or Not "
            "Mod",
        ),
        (
            _same,
            1,
            "Relu LeakyRelu Sigmoid Tanh HardSigmoid HardSwish Elu Selu Celu Gelu Erf Exp Log Sqrt Abs Neg Reciprocal Softplus "
            "Softsign Mish Swish ThresholdedRelu Floor Ceil Round Sign Cast CastLike Identity Dropout IsNaN IsInf Sin Cos",
        ),
        (_matrix_product, 2, "MatMul"),
        (_gemm, 3, "Gemm"),
        (_convolution, 3, "Conv ConvTranspose"),
        (_channel_norm, every, "BatchNormalization InstanceNormalization GroupNormalization"),
        (_last_norm, every, "LayerNormalization RMSNormalization"),
        (_softmax, 1, "Softmax LogSoftmax"),
        (
            _reduction,
            1,
            "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp ReduceProd",
        ),
        (_global_pool, 1, "GlobalAveragePool GlobalMaxPool"),
        (_windowed, 1, "MaxPool AveragePool LpPool Resize Upsample"),
        (_concatenation, every, "Concat"),
        (_split, 1, "Split"),
        (_slice, 1, "Slice"),
        (_gather, 2, "Gather"),
        (_padding, 1, "Pad"),
        (_transpose, 1, "Transpose"),
        (_reshaped, 1, "Reshape Flatten Squeeze Unsqueeze"),
        (_expand, 1, "Expand"),
    ]
    return {name: (rule, count) for rule, count, names in table for name in names.split()}


RULES = _rules()
