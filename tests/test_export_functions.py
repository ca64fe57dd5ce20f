"""Every function of the compressed form against the dense operator, bit for bit, in onnxruntime and by the reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_models import model_of, op_types, random_input, run, session, sparse_weight
from strategies import patterns

from nmconvert.export.calls import packed_layers
from nmconvert.export.compress import compress
from nmconvert.export.functions import FIRST_OPSET, FUNCTIONS, function_proto
from nmconvert.matrix import Kind, MatrixView
from nmconvert.onnx_graph import DOMAIN, SCALED, attribute
from nmconvert.packing import dequantize, quantize
from nmconvert.pattern import Axis, Pattern


@dataclass(frozen=True)
class Case:
    """One operator: the kind and shape of its weight, the shape of X, its attributes, and where the weight stands."""

    function: str
    op_type: str
    kind: Kind
    shape: tuple[int, ...]
    x: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    groups: int = 1
    left: bool = False
    bias: tuple[int, ...] | None = None
    added: bool = False

    def model(
        self, pattern: str | Pattern, axis: Axis = "channel", dtype: Any = np.float32, opset: int = 18, *, rounded: bool = False
    ) -> ModelProto:
        """The dense model, zeros in place; ``rounded``: to what int8 with a scale for each row holds."""
        weight = sparse_weight(self.kind, self.shape, pattern, axis, self.groups, dtype=dtype)
        if rounded:
            view = MatrixView.of(self.kind, self.shape, axis, self.groups)
            weight = np.ascontiguousarray(view.from_matrix(dequantize(*quantize(view.to_matrix(weight)))))
        constants = {"W": weight}
        inputs = ["W", "X"] if self.left else ["X", "W"]
        if self.bias is not None:
            constants["B"] = random_input(self.bias, dtype, seed=3)
        product = "product" if self.added else "Y"
        operands = [*inputs, "B"] if self.bias is not None and not self.added else inputs
        nodes = [helper.make_node(self.op_type, operands, [product], name="node", **self.attributes)]
        if self.added:
            nodes.append(helper.make_node("Add", [product, "B"], ["Y"]))
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return model_of(nodes, constants, self.x, element=element, opset=opset)


CASES = {
    "conv": Case("SparseConv", "Conv", "conv", (6, 8, 3, 3), (2, 8, 5, 5), {"pads": [1, 1, 1, 1]}),
    "conv bias": Case("SparseConv", "Conv", "conv", (6, 8, 3, 3), (2, 8, 5, 5), bias=(6,)),
    "conv strides, dilations": Case(
        "SparseConv", "Conv", "conv", (6, 8, 3, 2), (1, 8, 9, 9), {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 2, 1]}
    ),
    "conv auto_pad": Case(
        "SparseConv", "Conv", "conv", (6, 8, 3, 3), (1, 8, 5, 5), {"auto_pad": "SAME_UPPER", "kernel_shape": [3, 3]}
    ),
    "conv 1x1": Case("SparseConv", "Conv", "conv", (6, 8, 1, 1), (2, 8, 5, 5)),
    "conv grouped": Case("SparseConv", "Conv", "conv", (8, 6, 3, 3), (1, 24, 5, 5), {"group": 4}, groups=4),
    "conv 1-D": Case("SparseConv", "Conv", "conv", (6, 8, 3), (2, 8, 7), bias=(6,)),
    "conv 3-D": Case("SparseConv", "Conv", "conv", (4, 8, 2, 2, 2), (1, 8, 3, 4, 3)),
    "conv tail": Case("SparseConv", "Conv", "conv", (5, 7, 3, 3), (1, 7, 5, 5)),
    "transposed": Case(
        "SparseConvTranspose", "ConvTranspose", "conv_transpose", (8, 6, 3, 3), (1, 8, 4, 4), {"strides": [2, 2]}
    ),
    "transposed, all": Case(
        "SparseConvTranspose",
        "ConvTranspose",
        "conv_transpose",
        (8, 3, 2, 2),
        (1, 8, 4, 4),
        {"strides": [2, 2], "output_padding": [1, 1], "group": 2, "pads": [0, 1, 1, 0]},
        groups=2,
        bias=(6,),
    ),
    "transposed, shape": Case(
        "SparseConvTranspose",
        "ConvTranspose",
        "conv_transpose",
        (8, 3, 2, 2),
        (1, 8, 4, 4),
        {"strides": [2, 2], "output_shape": [9, 9]},
    ),
    "transposed 1-D": Case("SparseConvTranspose", "ConvTranspose", "conv_transpose", (8, 6, 3), (1, 8, 4)),
    "matmul": Case("SparseMatMul", "MatMul", "matmul", (16, 6), (3, 16)),
    "matmul 3-D": Case("SparseMatMul", "MatMul", "matmul", (16, 6), (2, 3, 16)),
    "matmul batched weight": Case("SparseMatMul", "MatMul", "matmul", (2, 16, 6), (2, 3, 16)),
    "matmul tail": Case("SparseMatMul", "MatMul", "matmul", (13, 6), (3, 13)),
    "linear": Case("SparseLinear", "MatMul", "matmul", (16, 6), (2, 3, 16), bias=(6,), added=True),
    "matmul left": Case("SparseMatMulLeft", "MatMul", "linear", (6, 16), (16, 3), left=True),
    "matmul left 3-D": Case("SparseMatMulLeft", "MatMul", "linear", (6, 16), (2, 16, 3), left=True),
    "gemm": Case("SparseGemm", "Gemm", "matmul", (16, 6), (3, 16), bias=(6,)),
    "gemm transB": Case("SparseGemm", "Gemm", "linear", (6, 16), (3, 16), {"transB": 1}, bias=(6,)),
    "gemm transA": Case("SparseGemm", "Gemm", "matmul", (16, 6), (16, 3), {"transA": 1}),
    "gemm all": Case(
        "SparseGemm", "Gemm", "linear", (6, 16), (16, 3), {"transA": 1, "transB": 1, "alpha": 0.5, "beta": -2.0}, bias=(3, 6)
    ),
    "gemm left": Case("SparseGemmLeft", "Gemm", "linear", (6, 16), (16, 3), {"alpha": 1.5}, left=True, bias=(3,)),
    "gemm left transA": Case("SparseGemmLeft", "Gemm", "matmul", (16, 6), (16, 3), {"transA": 1}, left=True),
    "gemm left transB": Case(
        "SparseGemmLeft", "Gemm", "linear", (6, 16), (3, 16), {"transB": 1, "beta": 0.5}, left=True, bias=(1, 3)
    ),
}


def compressed(model: ModelProto, pattern: str | Pattern, axis: Axis = "channel", *, quantized: bool = False) -> ModelProto:
    """A compressed copy, which must hold one call."""
    copy = ModelProto()
    copy.CopyFrom(model)
    result = compress(copy, [(Pattern.parse(pattern), axis)], quantized=["W"] if quantized else [])
    assert [layer.name for layer in result.layers] == ["W"], result.dense
    assert not any(tensor.name == "W" for tensor in copy.graph.initializer)
    onnx.checker.check_model(copy, full_check=True)
    return copy


def optimized(model: ModelProto, tmp_path: Path) -> list[str]:
    """The operators that onnxruntime runs in the end."""
    session(model, optimized=tmp_path / "optimized.onnx")
    return op_types(tmp_path / "optimized.onnx")


def check(case: Case, dense: ModelProto, packed: ModelProto, tmp_path: Path, dtype: Any = np.float32) -> None:
    """The packed model gives the dense one's outputs bit for bit, and onnxruntime has folded all of the body."""
    called = [node.op_type for node in packed.graph.node if node.domain == DOMAIN]
    assert [name.removeprefix(SCALED) for name in called] == [case.function]
    x = random_input(case.x, dtype)
    assert run(packed, x).tobytes() == run(dense, x).tobytes()
    assert optimized(packed, tmp_path) == optimized(dense, tmp_path)


def test_every_function_has_its_case() -> None:
    whole = {name for name, function in FUNCTIONS.items() if not function.residual and not function.activation}
    found = {case.function for case in CASES.values()}
    assert found | {SCALED + name for name in found} == whole  # the fused ones have theirs in test_export_fuse.py


@pytest.mark.parametrize("axis", ["channel", "kernel"])
@pytest.mark.parametrize("name", CASES)
def test_bit_for_bit_in_onnxruntime(name: str, axis: Axis, tmp_path: Path) -> None:
    dense = CASES[name].model("2:4", axis)
    check(CASES[name], dense, compressed(dense, "2:4", axis), tmp_path)


@pytest.mark.parametrize("pattern", ["1:4", "1:16", "2:16", "4:16", "8:16", "2:32", "1:32", "3:7"])
@pytest.mark.parametrize(
    ("kind", "shape", "x"), [("conv", (4, 64, 1, 3), (1, 64, 2, 4)), ("conv", (4, 35, 1, 3), (1, 35, 2, 4))]
)
def test_other_patterns(pattern: str, kind: Kind, shape: tuple[int, ...], x: tuple[int, ...], tmp_path: Path) -> None:
    case = Case("SparseConv", "Conv", kind, shape, x)
    dense = case.model(pattern)
    check(case, dense, compressed(dense, pattern), tmp_path)


# onnxruntime has no convolutions for float64, and runs those for float16 in float32.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((n, np.float16) for n in ("conv", "conv tail", "linear", "gemm transB", "transposed")),
        ("gemm", np.float64),
        ("linear", np.float64),
    ],
)
def test_other_types(name: str, dtype: Any, tmp_path: Path) -> None:
    dense = CASES[name].model("2:4", dtype=dtype)
    check(CASES[name], dense, compressed(dense, "2:4"), tmp_path, dtype)


@pytest.mark.parametrize("name", ["conv bias", "linear", "gemm transB", "matmul left"])
@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_stored_narrow_and_computed_in_float32(name: str, stored: Any, tmp_path: Path) -> None:
    dense = CASES[name].model("2:4")
    weight = next(tensor for tensor in dense.graph.initializer if tensor.name == "W")
    narrow = onnx.numpy_helper.to_array(weight).astype(stored)
    weight.CopyFrom(onnx.numpy_helper.from_array(narrow, "W"))
    for node in dense.graph.node:
        for position, value in enumerate(node.input):
            if value == "W":
                node.input[position] = "wide"
    dense.graph.node.insert(0, helper.make_node("Cast", ["W"], ["wide"], to=TensorProto.FLOAT))
    packed = compressed(dense, "2:4")
    values = next(tensor for tensor in packed.graph.initializer if tensor.name == "W.values")
    assert values.data_type == helper.np_dtype_to_tensor_dtype(np.dtype(stored))
    check(CASES[name], dense, packed, tmp_path)


@pytest.mark.parametrize("axis", ["channel", "kernel"])
@pytest.mark.parametrize("name", CASES)
def test_int8_with_a_scale_for_each_row(name: str, axis: Axis, tmp_path: Path) -> None:
    dense = CASES[name].model("2:4", axis, rounded=True)
    packed = compressed(dense, "2:4", axis, quantized=True)
    stored = {tensor.name: tensor.data_type for tensor in packed.graph.initializer}
    assert (stored["W.values"], stored["W.scale"]) == (TensorProto.INT8, TensorProto.FLOAT)
    check(CASES[name], dense, packed, tmp_path)


@pytest.mark.parametrize("opset", range(FIRST_OPSET, 23))
def test_every_opset_that_a_function_can_be_written_in(opset: int, tmp_path: Path) -> None:
    for name in ("conv bias", "gemm transB", "linear"):
        dense = CASES[name].model("2:4", opset=opset, rounded=True)
        packed = compressed(dense, "2:4", quantized=opset % 2 == 1)
        assert {i.version for f in packed.functions for i in f.opset_import if not i.domain} == {opset}
        check(CASES[name], dense, packed, tmp_path)


# The reference of onnx 1.23 cannot do grouped ConvTranspose, dense or not.
@pytest.mark.parametrize("name", [n for n in CASES if n != "transposed, all"])
def test_the_reference_evaluator_agrees(name: str) -> None:
    case = CASES[name]
    dense = case.model("2:4")
    x = random_input(case.x)
    found = ReferenceEvaluator(compressed(dense, "2:4")).run(None, {"X": x})[0]
    np.testing.assert_array_equal(found, ReferenceEvaluator(dense).run(None, {"X": x})[0])


@pytest.mark.parametrize("axis", ["channel", "kernel"])
@pytest.mark.parametrize("name", [n for n in CASES if n != "transposed, all"])
def test_the_reference_evaluator_agrees_on_int8(name: str, axis: Axis) -> None:
    case = CASES[name]
    dense = case.model("2:4", axis, rounded=True)
    x = random_input(case.x)
    found = ReferenceEvaluator(compressed(dense, "2:4", axis, quantized=True)).run(None, {"X": x})[0]
    np.testing.assert_array_equal(found, ReferenceEvaluator(dense).run(None, {"X": x})[0])


@settings(max_examples=40)
@given(patterns(dense=False), st.integers(1, 7), st.integers(2, 80), st.integers(0, 2**16))
def test_any_pattern_and_size_as_a_matrix_product(pattern: Pattern, outputs: int, inputs: int, seed: int) -> None:
    """X is the identity, so the product is the weight itself, rebuilt by the body."""
    weight = sparse_weight("matmul", (inputs, outputs), pattern, seed=seed)
    dense = model_of([helper.make_node("MatMul", ["X", "W"], ["Y"])], {"W": weight}, [inputs, inputs])
    packed = ModelProto()
    packed.CopyFrom(dense)
    if not compress(packed, [(pattern, "channel")]).layers:  # it would be no smaller
        assert pattern.kept(inputs) / inputs > 0.8 or weight.size < 64 or inputs <= pattern.n
        return
    assert np.array_equal(run(packed, np.eye(inputs, dtype=np.float32)), weight)


@settings(max_examples=40)
@given(
    patterns(dense=False), st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.sampled_from(["channel", "kernel"]),
    st.booleans(),
)  # fmt: skip
def test_any_pattern_and_size_as_a_convolution(
    pattern: Pattern, groups: int, channels: int, kernel: int, axis: Axis, quantized: bool
) -> None:
    weight = sparse_weight("conv", (2 * groups, channels, kernel), pattern, axis, groups)
    if quantized:
        view = MatrixView.of("conv", weight.shape, axis, groups)
        weight = np.ascontiguousarray(view.from_matrix(dequantize(*quantize(view.to_matrix(weight)))))
    node = helper.make_node("Conv", ["X", "W"], ["Y"], group=groups)
    dense = model_of([node], {"W": weight}, [1, channels * groups, 5])
    packed = ModelProto()
    packed.CopyFrom(dense)
    layers = compress(packed, [(pattern, axis)], quantized=["W"] if quantized else []).layers
    x = random_input((1, channels * groups, 5))
    assert run(packed, x).tobytes() == run(dense, x).tobytes()
    for layer, call in zip(layers, packed_layers(packed), strict=True):
        assert np.array_equal(call.view.from_matrix(call.matrix()), weight)
        assert (call.view.rows, call.view.columns) == (layer.view.rows, layer.view.columns)
        assert call.view == layer.view


def test_the_call_says_what_a_kernel_needs() -> None:
    case = CASES["conv grouped"]
    (node,) = compressed(case.model("2:4"), "2:4").graph.node
    said = {name: attribute(node, name, None) for name in ("n", "m", "axis", "shape", "permuted", "perm", "stored", "compute")}
    assert said == {
        "n": 2,
        "m": 4,
        "axis": b"channel",
        "shape": [8, 6, 3, 3],
        "permuted": [8, 3, 3, 6],
        "perm": [0, 3, 1, 2],
        "stored": TensorProto.FLOAT,
        "compute": TensorProto.FLOAT,
    }
    assert attribute(node, "group", None) == 4
    assert attribute(node, "pads", None) == [0, 0, 0, 0]  # left out in the original


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_passes_the_checker(name: str) -> None:
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 8, {"": 18, DOMAIN: 1}
    onnx.checker.check_function(function_proto(name), context)


def test_batch_norm_is_fused_into_a_packed_convolution_without_bias(tmp_path: Path) -> None:
    statistics = {name: abs(random_input((6,), seed=number)) for number, name in enumerate(["scale", "b", "mean", "var"])}
    nodes = [
        helper.make_node("Conv", ["X", "W"], ["c"], name="node"),
        helper.make_node("BatchNormalization", ["c", *statistics], ["n"]),
        helper.make_node("Relu", ["n"], ["Y"]),
    ]
    dense = model_of(nodes, {"W": sparse_weight("conv", (6, 8, 3, 3), "2:4"), **statistics}, [2, 8, 5, 5])
    check(CASES["conv"], dense, compressed(dense, "2:4"), tmp_path)
    assert "BatchNormalization" not in optimized(dense, tmp_path)
