"""Fusing what follows a sparse layer into its call, so that a kernel finishes the output while it is in registers.

Only what the functions of :mod:`nmconvert.export.functions` offer, only in float32, and only where nothing else reads the value
in between. The bodies of the functions hold the same operators, so a stock onnxruntime computes what it did before.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nmconvert.export.functions import FUNCTIONS, called_functions
from nmconvert.export.gelu import spelt_gelu
from nmconvert.onnx_graph import DOMAIN, Constants, attribute, graphs, remove_unused_constants, used_names

_INFINITY = float("inf")


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
    others = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend([*others, *called_functions(model)])
    return fused


_UNKNOWN = ("?", "*", "none", "null", "unk", "unknown", "dynamic")


def _size(name: str) -> str:
    """The name of an open dimension; nothing for what some exporters call every one of them."""
    return "" if name.lower() in _UNKNOWN else name


class _Fuser:
    def __init__(self, graph: GraphProto, scope: Constants, reads: Mapping[str, int]) -> None:
        self.graph = graph
        self.scope = scope
        self.reads = reads
        self.shapes = {
            value.name: [dim.dim_value or _size(dim.dim_param) for dim in value.type.tensor_type.shape.dim]
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
            return *gelu, {}
        node = self._only_reader(value)
        if node is None:
            return None
        if node.op_type == "Relu":
            return "Relu", [node], {}
        if node.op_type == "Gelu":
            return ("GeluTanh" if attribute(node, "approximate", b"none") == b"tanh" else "Gelu"), [node], {}
        limits = self._limits(node)
        return None if limits is None else ("Clip", [node], limits)

    def _spelt_gelu(self, value: str) -> tuple[str, list[NodeProto]] | None:
        """What `spelt_gelu` finds after ``value``, where nothing else reads what lies in between."""
        found = spelt_gelu(value, self.readers, self._number)
        if found is None:
            return None
        nodes = found[1]
        inside = [name for node in nodes for name in node.input]
        names = [value, *(node.output[0] for node in nodes[:-1])]
        alone = all(self.reads.get(name) == inside.count(name) for name in names)
        return found if alone and not any(id(node) in self.gone for node in nodes) else None

    def _number(self, name: str) -> float | None:
        """The one number that the constant ``name`` holds, if it is one."""
        if name not in self.scope.tensors:
            return None
        found = numpy_helper.to_array(self.scope.tensors[name])
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
