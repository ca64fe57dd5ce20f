"""Fusing what follows a sparse layer into its call, so that a kernel finishes the output while it is in registers.

Only what the functions of :mod:`nmconvert.export.functions` offer, only in float32, and only where nothing else reads the value
in between. The bodies of the functions hold the same operators, so a stock onnxruntime computes what it did before.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nmconvert.export.functions import FUNCTIONS, function_proto
from nmconvert.onnx_graph import DOMAIN, Constants, attribute, graphs, opset, remove_unused_constants, used_names

_INFINITY = float("inf")
_ROOT_HALF = 0.707107  # √½, as far as _factor() reads


def fuse(model: ModelProto) -> int:
    """Fuse, in place, activations and residual additions into the calls before them; returns how many operators went.

    An addition is fused where the file says (``value_info``) that both operands have the same shape: the kernels do not
    broadcast. The functions of the model become those that are called now; constants that nothing reads any longer go, because
    onnxruntime warns of each.
    """
    before = sum(len(graph.node) for graph, _ in graphs(model))
    for graph, scope in graphs(model):
        _Fuser(graph, scope, used_names(model)).run()
    fused = before - sum(len(graph.node) for graph, _ in graphs(model))
    remove_unused_constants(model)
    used = {node.op_type for graph, _ in graphs(model) for node in graph.node if node.domain == DOMAIN}
    del model.functions[:]
    model.functions.extend(function_proto(name, opset(model)) for name in sorted(used))
    return fused


class _Fuser:
    def __init__(self, graph: GraphProto, scope: Constants, reads: Mapping[str, int]) -> None:
        self.graph = graph
        self.scope = scope
        self.reads = reads
        self.shapes = {
            value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
            for value in [*graph.value_info, *graph.input, *graph.output]
            if value.type.tensor_type.HasField("shape")
        }
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in set(node.input):
                self.readers.setdefault(name, []).append(node)
        self.gone: set[int] = set()

    def run(self) -> None:
        """Additions first, then activations, so that an activation may follow an addition."""
        place = {id(node): position for position, node in enumerate(self.graph.node)}
        for node in self.graph.node:
            if node.domain == DOMAIN and attribute(node, "compute", 0) == TensorProto.FLOAT:
                self._fuse_residual(node, place)
                self._fuse_activation(node, place)
        nodes = sorted((node for node in self.graph.node if id(node) not in self.gone), key=lambda node: place[id(node)])
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _only_reader(self, name: str) -> NodeProto | None:
        found = self.readers.get(name, [])
        if len(found) != 1 or self.reads.get(name) != 1 or id(found[0]) in self.gone:  # gone: into the other operand's call
            return None
        return found[0] if found[0].domain == "" else None

    def _fuse_residual(self, call: NodeProto, place: dict[int, int]) -> None:
        add = self._only_reader(call.output[0])
        if add is None or add.op_type != "Add" or call.op_type + "Add" not in FUNCTIONS:
            return
        other = add.input[1] if add.input[0] == call.output[0] else add.input[0]
        shape = self.shapes.get(call.output[0])
        if not shape or "" in shape or shape != self.shapes.get(other) or other in self.scope.tensors:
            return
        call.op_type += "Add"
        call.input.append(other)
        self._replace(call, [add], place)

    def _fuse_activation(self, call: NodeProto, place: dict[int, int]) -> None:
        found = self._activation_after(call.output[0])
        if found is None:
            return
        name, nodes, limits = found
        if call.op_type + name not in FUNCTIONS:
            return
        call.op_type += name
        call.attribute.extend(helper.make_attribute(key, value) for key, value in limits.items())
        self._replace(call, nodes, place)

    def _activation_after(self, value: str) -> tuple[str, list[NodeProto], dict[str, float]] | None:
        """The activation that ``value`` goes through: its name, its nodes, the last of them last, and the limits of a Clip."""
        readers = [node for node in self.readers.get(value, []) if node.domain == ""]
        if [node.op_type for node in readers] in (["Sigmoid", "Mul"], ["Mul", "Sigmoid"]) and self.reads.get(value) == 2:
            gate, product = sorted(readers, key=lambda node: node.op_type, reverse=True)
            if self._only_reader(gate.output[0]) is product and set(product.input) == {value, gate.output[0]}:
                return "Silu", [gate, product], {}
        gelu = self._spelt_gelu(value)
        if gelu is not None:
            return "Gelu", gelu, {}
        node = self._only_reader(value)
        if node is None:
            return None
        if node.op_type == "Relu":
            return "Relu", [node], {}
        if node.op_type == "Gelu":
            return ("GeluTanh" if attribute(node, "approximate", b"none") == b"tanh" else "Gelu"), [node], {}
        limits = self._limits(node)
        return None if limits is None else ("Clip", [node], limits)

    def _spelt_gelu(self, value: str) -> list[NodeProto] | None:
        """The nodes of x · (1 + erf(x / √2)) · ½, the products in any order: what exporters write below opset 20."""
        readers = self.readers.get(value, [])
        if len(readers) != 2 or self.reads.get(value) != 2 or any(node.domain for node in readers):
            return None
        scaled, other = sorted(readers, key=lambda node: self._factor(node, value) != _ROOT_HALF)
        erf = self._only_reader(scaled.output[0])
        plus = None if erf is None or erf.op_type != "Erf" else self._only_reader(erf.output[0])
        if self._factor(scaled, value) != _ROOT_HALF or erf is None or plus is None:
            return None
        if plus.op_type != "Add" or self._constant(plus, erf.output[0]) != 1:
            return None
        nodes = [scaled, erf, plus]
        if self._factor(other, value) == 0.5:  # the half is taken of x first
            last = self._only_reader(other.output[0])
            if last is None or last.op_type != "Mul" or set(last.input) != {other.output[0], plus.output[0]}:
                return None
            return [*nodes, other, last] if self._only_reader(plus.output[0]) is last else None
        left: set[str | float] = {value, 0.5}
        while left:
            product = self._only_reader(nodes[-1].output[0])
            if product is None or product.op_type != "Mul":
                return None
            factor: str | float | None = value if value in product.input else self._factor(product, nodes[-1].output[0])
            if factor not in left:
                return None
            left.remove(factor)
            nodes.append(product)
        return nodes

    def _factor(self, node: NodeProto, value: str) -> float | None:
        """The constant that ``node`` multiplies ``value`` by, to six digits."""
        constant = self._constant(node, value)
        if constant is None or node.op_type not in ("Mul", "Div") or (node.op_type == "Div" and node.input[0] != value):
            return None
        return float(f"{constant if node.op_type == 'Mul' or constant == 0 else 1 / constant:.6g}")

    def _constant(self, node: NodeProto, value: str) -> float | None:
        """The other operand of ``node``, where it is one constant number."""
        others = [name for name in node.input if name != value]
        if len(others) != 1 or len(node.input) != 2 or others[0] not in self.scope.tensors:
            return None
        found = numpy_helper.to_array(self.scope.tensors[others[0]])
        return float(found.reshape(())) if found.size == 1 and found.ndim <= 1 else None

    def _limits(self, node: NodeProto) -> dict[str, float] | None:
        if node.op_type != "Clip" or node.attribute:
            return None
        limits = {"low": -_INFINITY, "high": _INFINITY}
        for key, name in zip(limits, node.input[1:], strict=False):
            if name and name not in self.scope.tensors:
                return None
            if name:
                limits[key] = float(numpy_helper.to_array(self.scope.tensors[name]).reshape(-1)[0])
        return limits

    def _replace(self, call: NodeProto, nodes: list[NodeProto], place: dict[int, int]) -> None:
        """``call`` gives what the last of ``nodes`` gave, in its place, where all inputs are there."""
        last = nodes[-1]
        self.gone.update(id(node) for node in nodes)
        call.output[0] = last.output[0]
        place[id(call)] = place[id(last)]
