"""Fusing: the same numbers from the graph before, from the bodies of the fused functions, and from the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from runtime_models import call, initializers, model, random_weight, tensor, weight_of

from nmconvert import runtime
from nmconvert.export.functions import FUNCTIONS, function_proto
from nmconvert.export.fuse import fuse
from nmconvert.onnx_graph import SCALED, used_names

FUSED = sorted(name for name, function in FUNCTIONS.items() if function.residual or function.activation)


def following(fused: str, value: str) -> list[onnx.NodeProto]:
    """The standard operators that ``fused`` takes in after its base, from ``value`` to ``y``."""
    nodes = []
    if FUNCTIONS[fused].residual:
        nodes.append(helper.make_node("Add", ["z", value], ["added"]))
        value = "added"
    activation = FUNCTIONS[fused].activation
    if activation == "Silu":
        nodes += [helper.make_node("Sigmoid", [value], ["gate"]), helper.make_node("Mul", [value, "gate"], ["activated"])]
    elif activation == "Clip":
        nodes.append(helper.make_node("Clip", [value, "low", "high"], ["activated"]))
    elif activation.startswith("Gelu"):
        mode = "tanh" if activation == "GeluTanh" else "none"
        nodes.append(helper.make_node("Gelu", [value], ["activated"], approximate=mode))
    elif activation:
        nodes.append(helper.make_node(activation, [value], ["activated"]))
    nodes[-1].output[0] = "y"
    return nodes


def on_grid(values: np.ndarray) -> np.ndarray:
    """Rounded to multiples of 1/256, whose products float32 sums exactly, in whatever order."""
    return (np.round(values * 256) / 256).astype(np.float32)


def unfused(fused: str, opset: int = 20) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of a layer and the operators after it, and a feed."""
    rng = np.random.default_rng(0)
    dtype = np.int8 if FUNCTIONS[fused].scaled else np.float32
    bases = ("SparseConv", "SparseMatMul", "SparseLinear", "SparseGemm")
    base = next(name for name in bases if fused.removeprefix(SCALED).startswith(name))
    rows = 24
    bias = on_grid(rng.standard_normal(rows))
    if base == "SparseConv":
        weight = random_weight(rng, "conv", (rows, 16, 3, 3), "2:4", dtype=dtype)
        shape, out, attributes = [2, 16, 9, 10], [2, rows, 9, 10], {"pads": [1] * 4}
    else:
        weight = random_weight(rng, "matmul", (32, rows), "2:4", dtype=dtype)
        shape, out = ([9, 32], [9, rows]) if base == "SparseGemm" else ([2, 7, 32], [2, 7, rows])
        attributes = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} if base == "SparseGemm" else {}
    if not FUNCTIONS[fused].scaled:
        weight = weight_of(on_grid(weight.view.to_matrix(weight.dense)), weight.view, weight.pattern, quantized=False)
    inputs = ["x", "B"] if FUNCTIONS[fused].takes_bias else ["x"]
    nodes = [call(base, weight, inputs, "h", **attributes), *following(fused, "h")]
    constants = [*initializers(weight), tensor("B", bias), tensor("low", np.float32(-0.25)), tensor("high", np.float32(0.5))]
    more = {"z": out} if FUNCTIONS[fused].residual else {}
    proto = model(nodes, constants, shape, y_rank=len(out), more_inputs=more)
    proto.opset_import[0].version = opset
    del proto.functions[:]
    proto.functions.append(function_proto(nodes[0].op_type, opset))
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, out))
    feed = {"x": on_grid(rng.standard_normal(shape))}
    return proto, feed | {name: on_grid(rng.standard_normal(dims)) for name, dims in more.items()}


def run(proto: onnx.ModelProto, feed: dict[str, np.ndarray], *, kernels: bool = False) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if kernels:
        options.register_custom_ops_library(str(runtime.library()))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feed)[0]
    return result


@pytest.mark.parametrize("name", FUSED)
def test_fused_calls_compute_what_the_graph_did(name: str) -> None:
    proto, feed = unfused(name)
    expected = run(proto, feed)
    fuse(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node] == [name]
    assert {constant.name for constant in proto.graph.initializer} <= set(used_names(proto))  # onnxruntime warns of others
    np.testing.assert_allclose(run(proto, feed), expected, atol=2e-6)
    if runtime.kernels().usable:
        for isa in ("portable", "avx2", "avx512", "amx", "amx-always"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NMCONVERT_ISA", isa)
                if runtime.kernels().usable:
                    np.testing.assert_allclose(run(proto, feed, kernels=True), expected, atol=3e-6)


@pytest.mark.parametrize("name", [name for name in FUSED if "Gelu" in name])
def test_bodies_without_a_gelu_operator_compute_the_same(name: str) -> None:
    proto, feed = unfused(name)
    expected = run(proto, feed)
    fuse(proto)
    proto.opset_import[0].version = 18
    del proto.functions[:]
    proto.functions.append(function_proto(name, 18))
    np.testing.assert_allclose(run(proto, feed), expected, atol=2e-6)


CUBED = ["Pow x three c", "Mul bend c b", "Add x b a", "Mul a slope g", "Tanh g t", "Add t one p"]
SPELLINGS = {
    "x · (½ · (1 + erf(x / √2)))": (["Div x r s", "Erf s e", "Add e one p", "Mul half p m", "Mul x m y"], True),
    "(x · (1 + erf(x · √½))) · ½": (["Mul r2 x s", "Erf s e", "Add one e p", "Mul x p m", "Mul m half y"], True),
    "(½ · x) · (1 + erf(x / √2))": (["Mul half x t", "Div x r s", "Erf s e", "Add e one p", "Mul t p y"], True),
    "x · (1 + erf(x / √2))": (["Div x r s", "Erf s e", "Add e one p", "Mul x p y"], False),
    "1 · x · (1 + erf(x / √2))": (["Div x r s", "Erf s e", "Add e one p", "Mul one p m", "Mul x m y"], False),
    "erf(√2 / x)": (["Div r x s", "Erf s e", "Add e one p", "Mul half p m", "Mul x m y"], False),
    "½ + erf": (["Div x r s", "Erf s e", "Add e half p", "Mul half p m", "Mul x m y"], False),
    "x · (½ · (1 + tanh(c · (x + b · x³))))": ([*CUBED, "Mul half p m", "Mul x m y"], True),
    "(½ · x) · (1 + tanh(c · (x + b · x³)))": (["Mul half x h0", *CUBED, "Mul h0 p y"], True),
    "x · (1 + b · x · x) in tanh": (
        [
            "Mul x x q",
            "Mul q bend b",
            "Add b one a",
            "Mul slope x d",
            "Mul a d g",
            "Tanh g t",
            "Add one t p",
            "Mul p half m",
            "Mul m x y",
        ],
        True,
    ),
    "x · x · x in tanh": (
        [
            "Mul x x q",
            "Mul q x c",
            "Mul c bend b",
            "Add b x a",
            "Mul a slope g",
            "Tanh g t",
            "Add t one p",
            "Mul x p m",
            "Mul m half y",
        ],
        True,
    ),
    "x² in tanh": (["Pow x two c", *CUBED[1:], "Mul half p m", "Mul x m y"], False),
    "erf of the cubic": ([*CUBED[:4], "Erf g t", CUBED[5], "Mul half p m", "Mul x m y"], False),
    "tanh(x / √2)": (["Div x r s", "Tanh s e", "Add e one p", "Mul half p m", "Mul x m y"], False),
    "the cube read twice": ([*CUBED, "Mul half p m", "Mul x m n", "Add n c y"], False),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_gelu_that_is_spelt_out_is_found_and_nothing_else(spelling: str) -> None:
    proto, feed = unfused("SparseLinearGelu")
    lines, is_gelu = SPELLINGS[spelling]
    names = {"x": "h"}  # what the layer gives
    nodes = [
        helper.make_node(op, [names.get(name, name) for name in rest[:-1]], [rest[-1]]) for op, *rest in map(str.split, lines)
    ]
    del proto.graph.node[1:]
    proto.graph.node.extend(nodes)
    constants = {"r": 2**0.5, "r2": 0.5**0.5, "one": 1.0, "half": 0.5, "two": 2.0, "three": 3.0}
    constants |= {"bend": 0.044715, "slope": (2 / np.pi) ** 0.5}
    proto.graph.initializer.extend(tensor(name, np.float32(number)) for name, number in constants.items())
    expected = run(proto, feed)
    assert fuse(proto) == (len(lines) if is_gelu else 0)
    name = "SparseLinearGeluTanh" if any(line.startswith("Tanh") for line in lines) else "SparseLinearGelu"
    assert proto.graph.node[0].op_type == (name if is_gelu else "SparseLinear")
    np.testing.assert_allclose(run(proto, feed), expected, atol=2e-6)


def nodes_after(change: Any) -> list[str]:
    proto, _ = unfused("SparseConvAddRelu")
    change(proto)
    fuse(proto)
    return [node.op_type for node in proto.graph.node]


def test_nothing_is_fused_that_something_else_reads() -> None:
    def read_twice(proto: onnx.ModelProto) -> None:
        proto.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 24, 9, 10]))

    assert nodes_after(read_twice) == ["SparseConv", "Add", "Relu"]


def test_an_addition_of_unknown_shape_stays() -> None:
    assert nodes_after(lambda proto: proto.graph.ClearField("value_info")) == ["SparseConv", "Add", "Relu"]


def test_other_types_stay() -> None:
    def computes_halves(proto: onnx.ModelProto) -> None:
        next(a for a in proto.graph.node[0].attribute if a.name == "compute").i = TensorProto.FLOAT16

    assert nodes_after(computes_halves) == ["SparseConv", "Add", "Relu"]


def test_silu_of_torch_is_found() -> None:
    proto, feed = unfused("SparseLinearSilu")
    x = torch.from_numpy(run(proto, feed))
    assert fuse(proto) == 2
    assert torch.allclose(torch.from_numpy(run(proto, feed)), x, atol=1e-6)


def test_a_sum_of_two_layers_is_fused_into_one_of_them() -> None:
    proto, feed = unfused("SparseConvAddRelu")
    other = onnx.NodeProto()
    other.CopyFrom(proto.graph.node[0])
    other.output[0] = "z"
    proto.graph.node.insert(1, other)
    z = proto.graph.input.pop()
    proto.graph.value_info.append(z)
    del feed["z"]
    expected = run(proto, feed)
    fuse(proto)
    assert sorted(node.op_type for node in proto.graph.node) == ["SparseConv", "SparseConvAddRelu"]
    np.testing.assert_allclose(run(proto, feed), expected, atol=2e-6)
