"""The model-local functions of domain ``nmconvert``: standard operators that rebuild a weight and then use it.

Every sparse layer of a compressed file is one call of such a function. A stock onnxruntime inlines the body and folds all of
it down to the dense weight when it loads the file; a session that has registered our library finds kernels of the same
domain and names and never looks at the body. Both read the same call::

    Y = nmconvert.SparseConv(X, values, mask, table, B)           B is always there, zeros if need be: see below
    Y = nmconvert.SparseConvTranspose(X, values, mask, table, B)  B may be "" (none)
    Y = nmconvert.SparseMatMul(X, values, mask, table)            X · W
    Y = nmconvert.SparseLinear(X, values, mask, table, B)         X · W + B
    Y = nmconvert.SparseGemm(X, values, mask, table, C)           alpha · X · W + beta · C, C may be ""
    Y = nmconvert.SparseMatMulLeft(X, values, mask, table)        W · X
    Y = nmconvert.SparseGemmLeft(X, values, mask, table, C)       alpha · W · X + beta · C, C may be ""

No name is that of a standard operator: quantisers and other tools look at a node's type and not at its domain.

What follows a layer in the graph can be fused into its call (:mod:`nmconvert.export.fuse`), so that a kernel does it while
the output is still in registers: ``SparseConvRelu``, ``SparseLinearAdd`` and so on, Conv, MatMul, Linear and Gemm with each
of ``Relu``, ``Clip``, ``Silu``, ``Gelu``, ``GeluTanh``, ``Add`` and ``AddRelu``. They take the inputs of their base, those with
Add a last one, ``Z``, of the output's shape, which is added before the activation; Clip has ``low`` and ``high``.

Each has a twin for int8 values, ``ScaledSparseConv`` and so on, with one more input, ``scale``, after the table.

``values``, ``mask``, ``table`` and ``scale`` are those of :mod:`nmconvert.packing`, always constant. Attributes of every call:

=============  ======  =========================================================================================
``n``, ``m``   int     the pattern: n kept of m
``axis``       string  ``channel`` or ``kernel``, the grouped axis
``shape``      ints    the dense weight as the operator takes it: Conv [O, I/g, k…], MatMul [K, N], Gemm before its trans
``permuted``   ints    the shape in which the flattened matrix [rows, K] is read (:class:`nmconvert.matrix.MatrixView`)
``perm``       ints    the transpose that leads from ``permuted`` to the order of ``shape``
``code_shape`` ints    [-1, parts, width] of the coding
``stored``     int     ONNX element type of ``values``
``compute``    int     ONNX element type in which the operator computes; the weight is cast where it differs
=============  ======  =========================================================================================

and those of the standard operator, also where the original left them out, for a function has no defaults. Only output_shape,
and with it or an auto_pad the pads and output_padding that these stand for, are left out where they were.

Why B: an input "" of a function becomes an input "" of its Conv, and onnxruntime neither turns such a Conv into its NCHWc
layout nor fuses a BatchNormalization or an Add into it. A bias of zeros costs nothing, and changes no bit.

Why this body: CumSum, Mul and Gather on int32, plus Cast, Concat, Reshape and Transpose on the values, are folded by every
onnxruntime tried for fp32, fp16, bf16, fp64 and int8, at any n:m and any K, and so is the product of float32 with a scale. Pad,
Where, Expand and arithmetic on fp16 or bf16 are not (shared FACTS), and ScatterElements would need the same number of values
for each byte.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import pi, sqrt
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, helper

from nmconvert.onnx_graph import DOMAIN, SCALED, graphs, opset

DOMAIN_VERSION = 1
OPSET = 18
FIRST_OPSET = 13  # Cast, Reshape, ReduceSum with axes as input: the body needs no later one
IR_VERSION = 8

CALL_ATTRIBUTES = ("n", "m", "axis", "shape", "permuted", "perm", "code_shape", "stored", "compute")
_CONV = {
    "auto_pad": AttributeProto.STRING,
    "dilations": AttributeProto.INTS,
    "group": AttributeProto.INT,
    "kernel_shape": AttributeProto.INTS,
    "pads": AttributeProto.INTS,
    "strides": AttributeProto.INTS,
}
_CONV_TRANSPOSE = _CONV | {"output_padding": AttributeProto.INTS, "output_shape": AttributeProto.INTS}
_CLIP = {"low": AttributeProto.FLOAT, "high": AttributeProto.FLOAT}
_GEMM = {
    "alpha": AttributeProto.FLOAT,
    "beta": AttributeProto.FLOAT,
    "transA": AttributeProto.INT,
    "transB": AttributeProto.INT,
}


@dataclass(frozen=True)
class Function:
    """One function: its standard operator, that operator's inputs in terms of ``X``, ``W`` and ``B``, and its attributes."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    attributes: dict[str, AttributeProto.AttributeType]
    adds_bias: bool = False  # the bias is an Add of its own: MatMul has none
    residual: bool = False  # Z is added
    activation: str = ""  # Relu, Clip, Silu, Gelu or GeluTanh comes last
    scaled: bool = False  # the values are int8, and the rows of the weight have a scale

    @property
    def takes_bias(self) -> bool:
        """Whether there is an input B."""
        return self.adds_bias or "B" in self.inputs

    @property
    def with_scale(self) -> Function:
        """The twin of a function that has no scale."""
        return replace(self, name=SCALED + self.name, scaled=True)


_TAILS = ("Relu", "Clip", "Silu", "Gelu", "GeluTanh", "Add", "AddRelu")  # an Add, an activation, or both
_BASES = (
    Function("SparseConv", "Conv", ("X", "W", "B"), _CONV),
    Function("SparseMatMul", "MatMul", ("X", "W"), {}),
    Function("SparseLinear", "MatMul", ("X", "W"), {}, adds_bias=True),
    Function("SparseGemm", "Gemm", ("X", "W", "B"), _GEMM),
)
_ALONE = (
    Function("SparseConvTranspose", "ConvTranspose", ("X", "W", "B"), _CONV_TRANSPOSE),
    Function("SparseMatMulLeft", "MatMul", ("W", "X"), {}),
    Function("SparseGemmLeft", "Gemm", ("W", "X", "B"), _GEMM),
)


def _fused(base: Function, tail: str) -> Function:
    """``base`` with ``tail`` fused in."""
    return replace(
        base,
        name=base.name + tail,
        attributes=base.attributes | (_CLIP if tail == "Clip" else {}),
        residual=tail.startswith("Add"),
        activation=tail.removeprefix("Add"),
    )


_PLAIN = (*_BASES, *_ALONE, *(_fused(base, tail) for base in _BASES for tail in _TAILS))
FUNCTIONS: dict[str, Function] = {f.name: f for plain in _PLAIN for f in (plain, plain.with_scale)}


def default_attributes(op_type: str, shape: Sequence[int], given: Mapping[str, AttributeProto]) -> dict[str, Any]:
    """What ``op_type`` takes for attributes that are not among ``given``; ``shape`` is that of its weight."""
    if op_type == "Gemm":
        return {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    if op_type not in ("Conv", "ConvTranspose"):
        return {}
    rank = len(shape) - 2
    defaults = {"dilations": [1] * rank, "group": 1, "kernel_shape": list(shape[2:]), "strides": [1] * rank}
    padded = "auto_pad" in given and given["auto_pad"].s != b"NOTSET"
    pads = {} if padded or "output_shape" in given else {"pads": [0] * 2 * rank}
    if op_type == "ConvTranspose" and "output_shape" not in given:
        pads["output_padding"] = [0] * rank
    return {"auto_pad": "NOTSET", **defaults, **pads}


def called_functions(model: ModelProto) -> list[FunctionProto]:
    """The functions that ``model`` calls, in operators of its opset and with those attributes that some call gives."""
    called: dict[str, set[str]] = {}
    for graph, _ in graphs(model):
        for node in graph.node:
            if node.domain == DOMAIN:
                called.setdefault(node.op_type, set()).update(attribute.name for attribute in node.attribute)
    return [function_proto(name, opset(model), called[name]) for name in sorted(called)]


def function_proto(name: str, opset: int = OPSET, given: Collection[str] | None = None) -> FunctionProto:
    """The FunctionProto of ``FUNCTIONS[name]`` in operators of ``opset`` (13 or later), which should be its model's own.

    Attributes of the standard operator that are not ``given`` are left out.
    """
    function = FUNCTIONS[name]
    attributes = {key: kind for key, kind in sorted(function.attributes.items()) if given is None or key in given}
    operator = helper.make_node(function.op_type, list(function.inputs), ["product"])
    operator.attribute.extend(_reference(key, key, kind) for key, kind in attributes.items() if key not in _CLIP)
    nodes = [*_rebuild_weight(scaled=function.scaled), operator]
    if function.adds_bias:
        nodes.append(_node("Add", ["product", "B"], "biased"))
    if function.residual:
        nodes.append(_node("Add", [nodes[-1].output[0], "Z"], "added"))
    nodes.extend(_activation(function.activation, nodes[-1].output[0], opset))
    nodes[-1].output[0] = "Y"
    return helper.make_function(
        DOMAIN,
        name,
        inputs=[
            *("X", "values", "mask", "table"),
            *(["scale"] if function.scaled else []),
            *(["B"] if function.takes_bias else []),
            *(["Z"] if function.residual else []),
        ],
        outputs=["Y"],
        nodes=nodes,
        opset_imports=[helper.make_opsetid("", opset)],
        attributes=[*CALL_ATTRIBUTES, *attributes],
    )


def _activation(name: str, x: str, opset: int) -> list[NodeProto]:
    """The nodes that lead from ``x`` to its activation; float32 only, because of their constants."""
    if name == "Relu":
        return [_node("Relu", [x], "activated")]
    if name == "Clip":
        low, high = (
            _referring(helper.make_node("Constant", [], [key]), "value_float", key, kind) for key, kind in _CLIP.items()
        )
        return [low, high, _node("Clip", [x, "low", "high"], "activated")]
    if name == "Silu":
        return [_node("Sigmoid", [x], "gate"), _node("Mul", [x, "gate"], "activated")]
    if name.startswith("Gelu"):
        return _gelu(x, tanh=name == "GeluTanh", opset=opset)
    return []


def _gelu(x: str, *, tanh: bool, opset: int) -> list[NodeProto]:
    if opset >= 20:
        return [_node("Gelu", [x], "activated", approximate="tanh" if tanh else "none")]
    if tanh:
        curve = [
            _constant("cubic", value_float=0.044715),
            _constant("slope", value_float=sqrt(2 / pi)),
            _node("Mul", [x, x], "square"),
            _node("Mul", ["square", x], "cube"),
            _node("Mul", ["cube", "cubic"], "bend"),
            _node("Add", [x, "bend"], "bent"),
            _node("Mul", ["bent", "slope"], "argument"),
            _node("Tanh", ["argument"], "curve"),
        ]
    else:
        curve = [
            _constant("root", value_float=sqrt(2)),
            _node("Div", [x, "root"], "argument"),
            _node("Erf", ["argument"], "curve"),
        ]
    return [
        *curve,
        _constant("one", value_float=1.0),
        _constant("half", value_float=0.5),
        _node("Add", ["curve", "one"], "gate"),
        _node("Mul", [x, "gate"], "twice"),
        _node("Mul", ["twice", "half"], "activated"),
    ]


def _rebuild_weight(*, scaled: bool) -> list[NodeProto]:
    """values, mask, table → W: bits of the mask, their running count, and a gather from [0, *values]; then each row's scale."""
    scaling = [
        _constant("column", value_ints=[-1, 1]),
        _node("Shape", ["scale"], "rows"),
        _node("Concat", ["rows", "flat"], "by_row", axis=0),
        _node("Reshape", ["matrix", "by_row"], "integer_rows"),
        _node("Cast", ["integer_rows"], "float_rows", to=TensorProto.FLOAT),
        _node("Reshape", ["scale", "column"], "scale_of_rows"),
        _node("Mul", ["float_rows", "scale_of_rows"], "scaled_matrix"),
    ]
    return [
        _constant("zero", value_float=0.0),
        _constant("axis", value_int=0),
        _constant("first", value_ints=[0]),
        _constant("second", value_ints=[1]),
        _constant("flat", value_ints=[-1]),
        _constant_attribute("code_shape"),
        _constant_attribute("permuted"),
        _constant_attribute("shape"),
        _node("Cast", ["mask"], "codes", to=TensorProto.INT32),
        _node("Gather", ["table", "codes"], "coded", axis=0),
        _node("Cast", ["coded"], "coded_bits", to=TensorProto.INT32),
        _node("Reshape", ["coded_bits", "code_shape"], "parts"),
        _node("ReduceSum", ["parts", "second"], "bits_by_code", keepdims=0),
        _node("Reshape", ["bits_by_code", "flat"], "padded_bits"),
        _node("ReduceProd", ["permuted"], "size", keepdims=1),
        _node("Slice", ["padded_bits", "first", "size", "first"], "bits"),
        _node("CumSum", ["bits", "axis"], "count"),
        _node("Mul", ["count", "bits"], "place"),
        _referring(_node("Cast", ["zero"], "typed_zero"), "to", "stored", AttributeProto.INT),
        _node("Reshape", ["typed_zero", "flat"], "no_value"),
        _node("Concat", ["no_value", "values"], "candidates", axis=0),
        _node("Gather", ["candidates", "place"], "matrix", axis=0),
        *(scaling if scaled else []),
        _node("Reshape", ["scaled_matrix" if scaled else "matrix", "permuted"], "unordered"),
        _referring(_node("Transpose", ["unordered"], "split"), "perm", "perm", AttributeProto.INTS),
        _node("Reshape", ["split", "shape"], "stored_weight"),
        _referring(_node("Cast", ["stored_weight"], "W"), "to", "compute", AttributeProto.INT),
    ]


def _node(op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, [output], **attributes)


def _constant(name: str, **value: Any) -> NodeProto:
    return helper.make_node("Constant", [], [name], **value)


def _constant_attribute(name: str) -> NodeProto:
    return _referring(helper.make_node("Constant", [], [name]), "value_ints", name, AttributeProto.INTS)


def _referring(node: NodeProto, attribute: str, of: str, kind: AttributeProto.AttributeType) -> NodeProto:
    node.attribute.append(_reference(attribute, of, kind))
    return node


def _reference(attribute: str, of: str, kind: AttributeProto.AttributeType) -> AttributeProto:
    return onnx.AttributeProto(name=attribute, type=kind, ref_attr_name=of)
