"""One packed layer in an ONNX graph: writing the call of its function, and reading it back.

Whatever reads a compressed file (inspect, verify, a test) goes through :func:`packed_layers`; only
:mod:`nmconvert.export.functions` knows the bodies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nmconvert.errors import CheckpointError, NmconvertError, WeightError
from nmconvert.export.functions import FUNCTIONS, default_attributes
from nmconvert.manifest import Layer
from nmconvert.matrix import MatrixView
from nmconvert.onnx_graph import DENSE, DOMAIN, SCALED, VALUES_SUFFIX, Constants, attribute, graphs, packed_inputs
from nmconvert.packing import Coding, Packed, coding_for, unpack
from nmconvert.pattern import AXES, Axis, Pattern

VALUES = 1  # position in a call


@dataclass(frozen=True)
class PackedLayer:
    """The call of one function, with its constants; ``view`` is of the weight as the operator takes it."""

    node: NodeProto
    name: str
    pattern: Pattern
    axis: Axis
    view: MatrixView
    parts: int
    values: npt.NDArray[Any]
    mask: npt.NDArray[np.uint8]
    table: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values, mask and scale."""
        return int(self.values.nbytes + self.mask.nbytes + (0 if self.scale is None else self.scale.nbytes))

    def matrix(self) -> npt.NDArray[Any]:
        """The dense matrix [rows, K].

        Raises:
            WeightError: the arrays contradict each other.
        """
        try:
            return unpack(self.values, self.mask, self.table, self.parts, self.view.rows, self.view.columns, self.scale)
        except WeightError as error:
            raise WeightError(f"{self.name}: {error}") from error


def initializer(name: str, array: npt.NDArray[Any]) -> TensorProto:
    """A named tensor with ``array``'s values, any dtype of ONNX."""
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def call_node(
    function: str,
    inputs: Sequence[str],
    output: str,
    *,
    packed: Packed,
    view: MatrixView,
    axis: Axis,
    compute: int,
    operator_attributes: Sequence[Any],
    name: str,
) -> NodeProto:
    """The call of ``nmconvert.<function>`` that stands for an operator with a packed weight.

    ``compute`` is the ONNX element type of the operator; ``operator_attributes`` are the AttributeProtos of the operator,
    of which those that the function passes on are kept.
    """
    node = helper.make_node(
        function,
        list(inputs),
        [output],
        name=name,
        domain=DOMAIN,
        n=packed.pattern.n,
        m=packed.pattern.m,
        axis=axis,
        shape=view.shape,
        permuted=view.permuted,
        perm=view.inverse_perm,
        code_shape=[-1, packed.coding.parts, packed.coding.width],
        stored=helper.np_dtype_to_tensor_dtype(packed.values.dtype),
        compute=compute,
    )
    given = {attr.name: attr for attr in operator_attributes if attr.name in FUNCTIONS[function].attributes}
    node.attribute.extend(given.values())
    defaults = default_attributes(FUNCTIONS[function].op_type, view.shape, given)
    node.attribute.extend(helper.make_attribute(name, defaults[name]) for name in sorted(defaults.keys() - given.keys()))
    return node


def packed_layers(model: ModelProto, source: str = "the model") -> Iterator[PackedLayer]:
    """Every packed layer of a model, each set of constants once.

    Raises:
        CheckpointError: a call is malformed.
    """
    seen = set()
    for graph, scope in graphs(model):
        for node in graph.node:
            packed = node.domain == DOMAIN and not node.op_type.endswith(DENSE)
            if packed and packed_inputs(node) not in seen:
                seen.add(packed_inputs(node))
                yield read_call(node, scope, source)


def inlined_layers(model: ModelProto, layers: Iterable[Layer]) -> Iterator[PackedLayer]:
    """The packed weights of a model whose functions were expanded: found by the names that ``layers`` promise."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for layer in layers:
        coding = coding_for(layer.pattern, layer.view.columns)
        parts = [values_name(layer.name), mask_name(layer.name)]
        parts += [name for name in tensors if name.startswith(table_name(coding))][:1]
        if len(parts) == 3 and all(name in tensors for name in parts):
            parts += [name for name in [scale_name(layer.name)] if name in tensors]
            values, mask, table, *scale = (numpy_helper.to_array(tensors[name]) for name in parts)
            node = helper.make_node(f"{SCALED if scale else ''}Inlined", ["", *parts], [])
            yield PackedLayer(
                node,
                layer.name,
                layer.pattern,
                layer.axis,
                layer.view,
                coding.parts,
                values.reshape(-1),
                mask.reshape(-1),
                table,
                *scale,
            )


def read_call(node: NodeProto, scope: Constants, source: str) -> PackedLayer:
    """Read one call.

    Raises:
        CheckpointError: it is malformed.
    """
    try:
        tensors = [scope.tensors[name] for name in packed_inputs(node)]
        axis: Axis = attribute(node, "axis", b"").decode()  # type: ignore[assignment]
        permuted, perm = attribute(node, "permuted", [0]), attribute(node, "perm", [0])
        shape, (_, parts, _) = attribute(node, "shape", [0]), attribute(node, "code_shape", [0, 0, 0])
        pattern = Pattern(attribute(node, "n", 0), attribute(node, "m", 0))
        if axis not in AXES or sorted(perm) != list(range(len(permuted))) or prod(shape) != prod(permuted) or min(shape) < 1:
            raise ValueError("its attributes contradict each other")
        split = tuple(permuted[p] for p in perm)
        columns = _columns(node, shape, split)
        view = MatrixView(tuple(shape), split, tuple(perm.index(d) for d in range(len(perm))), prod(shape) // columns, columns)
        values, mask, table, *scale = (numpy_helper.to_array(tensor) for tensor in tensors)
    except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError, NmconvertError) as error:
        raise CheckpointError(f"{source}: node '{node.name}' ({node.op_type}) is malformed: {error}") from error
    name = tensors[0].name.removesuffix(VALUES_SUFFIX)
    return PackedLayer(node, name, pattern, axis, view, int(parts), values.reshape(-1), mask.reshape(-1), table, *scale)


def _columns(node: NodeProto, shape: Sequence[int], split: Sequence[int]) -> int:
    """K, the length of the grouped axis, from the dense shape."""
    operator = FUNCTIONS[node.op_type].op_type
    if operator == "Conv":
        return prod(shape[1:])
    if operator == "ConvTranspose":
        return split[1] * prod(split[3:])
    left = node.op_type.endswith("Left")
    flipped = operator == "Gemm" and bool(attribute(node, "transA" if left else "transB", 0))
    return shape[-1] if left != flipped else shape[-2]


def values_name(weight: str) -> str:
    """The initialiser that holds the values of ``weight``."""
    return weight + VALUES_SUFFIX


def mask_name(weight: str) -> str:
    """The initialiser that holds the mask of ``weight``."""
    return f"{weight}.mask"


def scale_name(weight: str) -> str:
    """The initialiser that holds the scale of ``weight``, where its values are int8."""
    return f"{weight}.scale"


def table_name(coding: Coding) -> str:
    """What the name of a coding's table starts with; a number follows."""
    return f"nmconvert.{coding.name}.{'x'.join(map(str, coding.table.shape))}."
