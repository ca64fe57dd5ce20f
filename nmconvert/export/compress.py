"""Dense zeros → packed calls: replace every operator whose weight satisfies an N:M pattern by a call of its function.

The weights are found on the graph, by their zeros, not by name: exporters rename, transpose and fold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nmconvert.arrays import digest
from nmconvert.detect import satisfies
from nmconvert.errors import WeightError
from nmconvert.export.calls import call_node, initializer, mask_name, scale_name, table_name, values_name
from nmconvert.export.find import sparsest_first
from nmconvert.export.functions import DOMAIN_VERSION, FUNCTIONS, IR_VERSION, called_functions
from nmconvert.manifest import Layer
from nmconvert.matrix import MatrixView
from nmconvert.onnx_graph import (
    DOMAIN,
    DTYPES,
    FLOATS,
    Constants,
    WeightUse,
    graphs,
    remove_unused_constants,
    tensor_infos,
    used_names,
    value_names,
    weight_uses,
)
from nmconvert.packing import Packed, pack
from nmconvert.pattern import Axis, Pattern
from nmconvert.tensor import TensorInfo

NO_PATTERN = "satisfies no pattern of the plan"


@dataclass
class Compressed:
    """What :func:`compress` did: the sparse layers now in the model, and why other weights stayed dense."""

    layers: list[Layer] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    dense_bytes: int = 0
    packed_bytes: int = 0


def compress(
    model: ModelProto,
    patterns: Sequence[tuple[Pattern, Axis]],
    *,
    quantized: Collection[str] = (),
    dense: Mapping[str, str] = {},
) -> Compressed:
    """Pack, in place, every weight of ``model`` that satisfies one of ``patterns`` (the sparsest that fits is taken).

    Those named in ``quantized``, float32, are packed as int8 with a scale for each row, which has to hold them exactly. The
    model needs opset 13 or later; ``dense`` are reasons that are known for weights which satisfy none. Its initialisers must
    hold their data (no external references).
    """
    result = Compressed()
    packer = _Packer(model, sparsest_first(patterns), quantized, dense, result)
    for graph, scope in graphs(model):
        packer.replace_in(graph, scope)
    if result.layers:
        model.functions.extend(called_functions(model))
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
        model.ir_version = max(model.ir_version, IR_VERSION)
    remove_unused_constants(model)
    return result


class _Packer:
    """Packs each weight once, however many operators share it, and adds its constants to the main graph."""

    def __init__(
        self,
        model: ModelProto,
        patterns: Sequence[tuple[Pattern, Axis]],
        quantized: Collection[str],
        dense: Mapping[str, str],
        result: Compressed,
    ) -> None:
        self.model = model
        self.patterns = patterns
        self.quantized = quantized
        self.dense = dense
        self.result = result
        self.reads, self.names = used_names(model), value_names(model)
        self.reasons = {info.name: info.reason for info in tensor_infos(model) if info.reason is not None}
        self.packed: dict[str, tuple[Packed, MatrixView, Axis] | None] = {}
        self.tables: dict[bytes, str] = {}
        self.zeros: set[str] = set()

    def replace_in(self, graph: GraphProto, scope: Constants) -> None:
        """Replace the operators of one graph."""
        calls: dict[int, NodeProto] = {}
        merged: set[int] = set()
        for use in list(weight_uses(graph, scope)):
            packed = self._pack(use, scope)
            if packed is None:
                continue
            bias = None
            if use.node.op_type == "MatMul" and use.position:
                bias = _bias_after(use.node, use.source.operator_shape[-1], graph, scope, self.reads)
            if bias is not None:  # in the place of the Add, where the bias is known to be there
                merged.add(id(use.node))
            calls[id(bias[0] if bias else use.node)] = self._call(use, *packed, bias=bias)
        nodes = [calls.get(id(node), node) for node in graph.node if id(node) not in merged]
        del graph.node[:]
        graph.node.extend(nodes)

    def _pack(self, use: WeightUse, scope: Constants) -> tuple[Packed, MatrixView, Axis] | None:
        name = use.source.name  # all its uses have one layout, or there is a reason against it
        if name not in self.packed:
            self.packed[name] = self._try_patterns(use, scope)
        return self.packed[name]

    def _try_patterns(self, use: WeightUse, scope: Constants) -> tuple[Packed, MatrixView, Axis] | None:
        source, tensor = use.source, scope.tensors[use.source.name]
        floats = tensor.data_type in FLOATS and source.element_type in FLOATS
        if reason := self.reasons.get(source.name, None if floats else "not a float weight"):
            self.result.dense[source.name] = reason
            return None
        weight = numpy_helper.to_array(tensor)
        if not weight.size:
            self.result.dense[source.name] = "has no entries"
            return None
        weight = weight if source.transposed is None else weight.transpose(source.transposed)
        for pattern, axis in self.patterns:
            view = MatrixView.of(use.kind, weight.shape, axis, use.groups)
            matrix = view.to_matrix(weight)
            if view.columns > pattern.n and satisfies(matrix, pattern):
                return self._keep(use, tensor, weight, pattern, axis, view)
        self.result.dense[source.name] = self.dense.get(source.name, NO_PATTERN)
        return None

    def _keep(
        self,
        use: WeightUse,
        tensor: TensorProto,
        weight: npt.NDArray[np.generic],
        pattern: Pattern,
        axis: Axis,
        view: MatrixView,
    ) -> tuple[Packed, MatrixView, Axis] | None:
        try:
            packed = pack(view.to_matrix(weight), pattern)
        except WeightError as error:
            raise WeightError(f"{use.source.name}: {error}") from error
        if use.source.name in self.quantized:
            packed = packed.quantized()
        if {name(use.source.name) for name in (values_name, mask_name, scale_name)} & self.names:
            self.result.dense[use.source.name] = f"{values_name(use.source.name)}, its packed name, is another value's"
            return None
        if packed.nbytes >= weight.nbytes:
            self.result.dense[use.source.name] = f"packed at {pattern} it would be no smaller"
            return None
        info = TensorInfo(use.source.name, view.shape, DTYPES[tensor.data_type], kind=use.kind, groups=use.groups)
        self.result.layers.append(Layer(info, pattern, axis, digest(weight)))
        self.result.dense_bytes += weight.nbytes
        self.result.packed_bytes += packed.nbytes
        arrays = {values_name: packed.values, mask_name: packed.mask, scale_name: packed.scale}
        self.model.graph.initializer.extend(
            initializer(name(use.source.name), array) for name, array in arrays.items() if array is not None
        )
        return packed, view, axis

    def _table(self, packed: Packed) -> str:
        content = packed.coding.table.tobytes()
        if content not in self.tables:
            self.tables[content] = f"{table_name(packed.coding)}{len(self.tables)}"
            self.model.graph.initializer.append(initializer(self.tables[content], packed.coding.table))
        return self.tables[content]

    def _zeros(self, length: int, element_type: int) -> str:
        """A bias of zeros, shared by all that need one of its length and type."""
        name = f"nmconvert.zeros.{length}.{TensorProto.DataType.Name(element_type).lower()}"
        if name not in self.zeros:
            self.zeros.add(name)
            dtype = helper.tensor_dtype_to_np_dtype(element_type)
            self.model.graph.initializer.append(initializer(name, np.zeros(length, dtype)))
        return name

    def _call(
        self, use: WeightUse, packed: Packed, view: MatrixView, axis: Axis, bias: tuple[NodeProto, str] | None
    ) -> NodeProto:
        node, weight = use.node, use.source.name
        left = use.kind in ("linear", "matmul") and use.position == 0
        function = f"Sparse{'Linear' if bias else node.op_type}{'Left' if left else ''}"
        parts = [values_name(weight), mask_name(weight), self._table(packed)]
        if packed.scale is not None:
            function = FUNCTIONS[function].with_scale.name
            parts.append(scale_name(weight))
        takes_bias = "B" in FUNCTIONS[function].inputs
        own = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "Conv" and not own:
            own = self._zeros(view.shape[0], use.source.element_type)
        third = [bias[1]] if bias else [own] if takes_bias else []
        return call_node(
            function,
            [node.input[0 if use.position else 1], *parts, *third],
            bias[0].output[0] if bias else node.output[0],
            packed=packed,
            view=view,
            axis=axis,
            compute=use.source.element_type,
            operator_attributes=node.attribute,
            name=node.name or f"{function}_{node.output[0]}",
        )


def _bias_after(
    node: NodeProto, width: int, graph: GraphProto, scope: Constants, reads: Mapping[str, int]
) -> tuple[NodeProto, str] | None:
    """The Add that follows a MatMul and nothing else reads, and its other operand: constants for ``width`` columns, or one."""
    if reads.get(node.output[0]) != 1:
        return None
    for user in graph.node:
        if node.output[0] in user.input:
            if user.op_type != "Add" or user.domain not in ("", "ai.onnx"):
                return None
            other = user.input[1] if user.input[0] == node.output[0] else user.input[0]
            constant = scope.trace(other)
            return (user, other) if constant is not None and constant.shape in ((1,), (width,)) else None
    return None
