"""The native kernels: against float64, against the function bodies, with any number of threads, and on damaged files."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from runtime_models import Weight, call, initializers, layer, model, random_weight, tensor, weight_of

from nmconvert import runtime
from nmconvert.errors import KernelsUnavailableError, UsageError
from nmconvert.masks import nm_mask
from nmconvert.matrix import MatrixView
from nmconvert.pattern import Pattern

needs_kernels = pytest.mark.skipif(not runtime.kernels().usable, reason=f"no native kernels: {runtime.kernels().reason}")
PATTERNS = ("2:4", "1:4", "4:8", "1:8", "1:16", "3:5", "2:32", "4:4")


def instruction_sets() -> list[str]:
    """Those that this CPU can run."""
    candidates = ("portable", "avx2", "avx512", "amx", "amx-always") if platform.machine() == "x86_64" else ("portable", "neon")
    usable = []
    with pytest.MonkeyPatch.context() as patch:
        for name in candidates:
            patch.setenv("NMCONVERT_ISA", name)
            if runtime.kernels().usable:
                usable.append(name)
    return usable


@pytest.fixture(scope="module", params=instruction_sets() or ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "none":
        pytest.skip(runtime.kernels().reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NMCONVERT_ISA", request.param)
        yield request.param


@pytest.mark.skipif(not shutil.which("c++") or platform.machine() not in ("x86_64", "aarch64"), reason="no kernels for here")
def test_the_library_is_there_where_it_can_be_built() -> None:
    # A build that fails installs the package without it, and the tests below are skipped.
    assert runtime.kernels().usable, runtime.kernels().reason


def options(threads: int = 1) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = 4
    return made


def with_kernels(proto: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    made = options(threads)
    made.register_custom_ops_library(str(runtime.library()))
    return onnxruntime.InferenceSession(proto.SerializeToString(), made, providers=["CPUExecutionProvider"])


def without(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(proto.SerializeToString(), options(), providers=["CPUExecutionProvider"])


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5, terms: float = 0.0) -> None:
    """By the largest output, or where all terms cancel, which leaves no digits to compare, a twentieth of their largest sum."""
    assert got.shape == expected.shape
    scale = max(float(np.abs(expected).max(initial=0)), 1e-3, terms / 20)
    assert float(np.abs(got.astype(np.float64) - expected).max(initial=0)) <= tolerance * scale


def convolve(x: np.ndarray, weight: Weight, bias: np.ndarray | None = None, **attributes: Any) -> np.ndarray:
    """The convolution in float64."""
    rank = x.ndim - 2
    operator = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[rank - 1]
    pads = attributes.get("pads", [0] * (2 * rank))
    around = [p for d in reversed(range(rank)) for p in (pads[d], pads[rank + d])]
    padded = torch.nn.functional.pad(torch.from_numpy(x.astype(np.float64)), around)
    result = operator(
        padded,
        torch.from_numpy(weight.dense.astype(np.float64)),
        None if bias is None else torch.from_numpy(bias.astype(np.float64)),
        stride=attributes.get("strides", [1] * rank),
        dilation=attributes.get("dilations", [1] * rank),
        groups=attributes.get("group", 1),
    )
    return result.numpy()


@given(
    seed=st.integers(0, 2**16),
    stored=st.sampled_from([np.float32, np.float32, np.int8]),
    pattern=st.sampled_from(PATTERNS),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17, 40, 130]),
    columns=st.integers(1, 300),
    rows=st.integers(1, 90),
    batch=st.integers(1, 2),
    threads=st.sampled_from([1, 3]),
)
@settings(max_examples=40)
def test_linear_layers(
    isa: str, seed: int, stored: Any, pattern: str, tokens: int, columns: int, rows: int, batch: int, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, "matmul", (columns, rows), pattern, dtype=stored)
    x = rng.standard_normal((batch, tokens, columns)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    expected = x.astype(np.float64) @ weight.dense
    terms = (np.abs(x) @ np.abs(weight.dense) + np.abs(bias)).max(initial=0)
    assert_close(
        with_kernels(layer("SparseMatMul", weight, ["b", "t", columns]), threads).run(None, {"x": x})[0], expected, terms=terms
    )
    proto = layer("SparseLinear", weight, ["b", "t", columns], {"B": bias})
    assert_close(with_kernels(proto, threads).run(None, {"x": x})[0], expected + bias, terms=terms)


@given(
    seed=st.integers(0, 2**16),
    stored=st.sampled_from([np.float32, np.float32, np.int8]),
    pattern=st.sampled_from(PATTERNS),
    axis=st.sampled_from(["channel", "kernel"]),
    rank=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60)
def test_convolutions(isa: str, seed: int, stored: Any, pattern: str, axis: Any, rank: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    draw = data.draw
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    attributes: dict[str, Any] = {
        "strides": [draw(st.integers(1, 3)) for _ in range(rank)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(rank)],
        "pads": [draw(st.integers(0, 2)) for _ in range(2 * rank)],
        "group": draw(st.sampled_from([1, 1, 2, 3])),
    }
    groups = attributes["group"]
    outputs, inputs, batch = groups * draw(st.integers(1, 20)), draw(st.integers(1, 24)), draw(st.integers(1, 3))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, attributes["dilations"], strict=True)]
    size = [draw(st.integers(r, r + (20 if rank < 3 else 6))) for r in reach]
    weight = random_weight(rng, "conv", (outputs, inputs, *kernel), pattern, axis, stored)
    x = rng.standard_normal((batch, groups * inputs, *size)).astype(np.float32)
    bias = rng.standard_normal(outputs).astype(np.float32)
    proto = layer("SparseConv", weight, ["b", groups * inputs, *(f"d{d}" for d in range(rank))], {"B": bias}, **attributes)
    got = with_kernels(proto, draw(st.sampled_from([1, 2]))).run(None, {"x": x})[0]
    terms = convolve(np.abs(x), replace(weight, dense=np.abs(weight.dense)), np.abs(bias), **attributes).max(initial=0)
    assert_close(got, convolve(x, weight, bias, **attributes), terms=terms)


# Tiles read once what two rows of sixteen both keep: all, nothing, or from row to row something else; rows that are left alone.
@pytest.mark.parametrize("kept", ["same", "opposite", "mixed"])
@pytest.mark.parametrize("outputs", [1, 2, 15, 16, 17, 51])
@pytest.mark.parametrize("side", [5, 14, 20])
def test_rows_that_share_columns(isa: str, kept: str, outputs: int, side: int) -> None:
    rng = np.random.default_rng(outputs)
    view, pattern = MatrixView.of("conv", (2 * outputs, 96, 3, 3), "channel"), Pattern(2, 4)
    noise = rng.standard_normal((view.rows, view.columns))
    first = np.arange(view.columns) % 4 < 2
    some = rng.random(view.columns) < 0.5
    kinds = {"same": [first], "opposite": [first, ~first], "mixed": [first, ~first, ~first, some]}[kept]
    scores = np.abs(noise) + 9 * np.array([kinds[row % len(kinds)] for row in range(view.rows)])
    matrix = np.where(nm_mask(torch.from_numpy(scores), pattern).numpy(), noise / 27, 0).astype(np.float32)
    weight = weight_of(matrix, view, pattern, quantized=False)
    x = rng.standard_normal((1, 192, side, side)).astype(np.float32)
    proto = layer("SparseConv", weight, list(x.shape), group=2, pads=[1] * 4)
    assert_close(with_kernels(proto, 2).run(None, {"x": x})[0], convolve(x, weight, group=2, pads=[1] * 4))


# Widths that fill vectors with whole rows, halves and quarters of rows; tails below and beside; strides and dilations.
@pytest.mark.parametrize(
    ("size", "kernel", "attributes"),
    [
        ((56, 56), (3, 3), {}),
        ((28, 28), (3, 3), {"strides": [2, 2]}),
        ((47, 50), (3, 3), {"strides": [2, 2]}),  # outputs of 512 pixels or more run image by image
        ((48, 49), (1, 1), {"strides": [2, 2], "pads": [0] * 4}),
        ((14, 14), (3, 3), {"dilations": [2, 2], "pads": [2] * 4}),
        ((7, 7), (3, 3), {}),
        ((8, 8), (3, 3), {"strides": [2, 2], "pads": [1, 0, 0, 1]}),
        ((3, 2), (3, 4), {"pads": [9, 17, 2, 20]}),  # strips that lie in the pads altogether
        ((3, 2), (2, 3), {"strides": [2, 2], "dilations": [2, 3], "pads": [5, 11, 6, 18]}),
        ((12, 33), (3, 3), {"strides": [1, 2], "dilations": [2, 1], "pads": [3, 2, 0, 4]}),
        ((15, 9), (5, 2), {"strides": [3, 1], "dilations": [2, 1], "group": 2}),
        ((17, 30), (7, 7), {"strides": [2, 3], "pads": [3] * 4}),
        ((13, 21), (3, 1), {"strides": [2, 2], "pads": [1, 0, 1, 0]}),
        ((9, 40), (1, 1), {"strides": [2, 2], "pads": [0] * 4}),
        ((7, 7), (1, 1), {"pads": [0] * 4}),
        ((1, 1), (1, 1), {"pads": [1, 1, 0, 0], "strides": [2, 2]}),  # one pixel, which the output does not read
    ],
)
@pytest.mark.parametrize(
    ("batch", "pattern", "stored"),
    [(1, "1:4", np.float32), (3, "2:4", np.float32), (1, "1:16", np.float32), (2, "2:4", np.int8)],
)
def test_convolutions_of_the_sizes_of_networks(
    isa: str, size: Any, kernel: Any, attributes: Any, batch: int, pattern: str, stored: Any
) -> None:
    rng = np.random.default_rng(5)
    attributes = {"pads": [1] * 4, **attributes}
    groups = attributes.get("group", 1)
    weight = random_weight(rng, "conv", (50, 96 // groups, *kernel), pattern, dtype=stored)
    x = rng.standard_normal((batch, 96, *size)).astype(np.float32)
    bias = rng.standard_normal(50).astype(np.float32)
    expected = convolve(x, weight, bias, **attributes)
    residual = rng.standard_normal(expected.shape).astype(np.float32)
    plain = layer("SparseConvRelu", weight, list(x.shape), {"B": bias}, **attributes)
    assert_close(with_kernels(plain, 2).run(None, {"x": x})[0], np.maximum(expected, 0))
    added = layer("SparseConvAddRelu", weight, list(x.shape), {"B": bias, "Z": residual}, **attributes)
    assert_close(with_kernels(added).run(None, {"x": x})[0], np.maximum(expected + residual, 0))


@pytest.mark.parametrize("start", [0, 4])  # floats beyond the start of a cache line
@pytest.mark.parametrize(
    ("size", "attributes"),
    [((56, 16), {}), ((28, 28), {}), ((112,), {}), ((2, 112), {"strides": [2, 1], "pads": [2, 0, 0, 0]})],
)
def test_pixels_of_convolutions_of_one_pixel_are_read_where_they_are(isa: str, size: Any, attributes: Any, start: int) -> None:
    rng = np.random.default_rng(7)
    weight = random_weight(rng, "conv", (40, 200, *(1 for _ in size)), "2:4")
    room = np.zeros(2 * 200 * np.prod(size) + 32, np.float32)
    first = -room.ctypes.data // 4 % 16 + start
    x = room[first : first + 2 * 200 * np.prod(size)].reshape(2, 200, *size)
    x[:] = rng.standard_normal(x.shape)
    attributes = {"pads": [0] * 2 * len(size), **attributes}
    expected = convolve(x, weight, **attributes)
    residual = rng.standard_normal(expected.shape).astype(np.float32)
    for model_of, more in (("SparseConv", {}), ("SparseConvAdd", {"Z": residual})):
        session = with_kernels(layer(model_of, weight, list(x.shape), more, **attributes))
        assert_close(session.run(None, {"x": x})[0], expected + more.get("Z", 0))


@pytest.mark.parametrize("read", ["once", "later", "twice"])
@pytest.mark.parametrize("tokens", [1, 20, None])
def test_a_sum_replaces_its_residual_only_where_nothing_reads_that(isa: str, tokens: int | None, read: str) -> None:
    rng = np.random.default_rng(8)
    kind, function, shape = ("matmul", "SparseLinear", (96, 96)) if tokens else ("conv", "SparseConv", (96, 96, 1, 1))
    x_shape = [2, tokens, 96] if tokens else [2, 96, 28, 8]
    weights = [random_weight(rng, kind, shape, "2:4") for _ in range(2)]  # type: ignore[arg-type]
    added = f"{function}AddRelu" if kind == "conv" else "SparseLinearAdd"
    nodes = [
        call(function, weights[0], ["x", "B"], "z", "a."),
        call(added, weights[1], ["z" if read == "twice" else "x", "B", "z"], "s", "b."),
        helper.make_node("Add", ["s", "z" if read == "later" else "s"], ["y"]),
    ]
    bias = tensor("B", rng.standard_normal(96).astype(np.float32))
    proto = model(nodes, [bias, *initializers(weights[0], "a."), *initializers(weights[1], "b.")], x_shape)
    proto.graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, x_shape) for name in ("z", "s"))
    x = rng.standard_normal(x_shape).astype(np.float32)
    assert_close(with_kernels(proto).run(None, {"x": x})[0], without(proto).run(None, {"x": x})[0])


def test_pixels_picked_for_a_linear_layer_are_not_overwritten_by_it(isa: str) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, "conv", (3, 8, 1), "2:4")
    session = with_kernels(layer("SparseConv", weight, ["b", 8, "d"], strides=[3], pads=[0, 0]))
    for batch in (2, 3, 3):
        x = rng.standard_normal((batch, 8, 3)).astype(np.float32)
        assert_close(session.run(None, {"x": x})[0], convolve(x, weight, strides=[3], pads=[0, 0]))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_auto_pad_is_that_of_the_body(isa: str, mode: str) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, "conv", (8, 16, 3, 2), "2:4")
    proto = layer("SparseConv", weight, [1, 16, "h", "w"], auto_pad=mode, strides=[2, 1])
    x = rng.standard_normal((1, 16, 9, 8)).astype(np.float32)
    assert_close(with_kernels(proto).run(None, {"x": x})[0], without(proto).run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("shape", "x_shape", "bias", "attributes"),
    [
        ((24, 10), (6, 24), (10,), {}),
        ((24, 10), (6, 24), (), {"beta": 2.0}),
        ((24, 10), (6, 24), (1, 10), {"alpha": 0.5, "beta": 3.0}),
        ((24, 10), (6, 24), (6, 1), {"beta": 0.5}),
        ((24, 10), (6, 24), (6, 10), {}),
        ((24, 10), (24, 6), (1,), {"transA": 1}),
        ((10, 24), (6, 24), None, {"transB": 1, "alpha": -1.0}),
        ((10, 24), (24, 1), (10,), {"transA": 1, "transB": 1}),
    ],
)
@pytest.mark.parametrize("stored", [np.float32, np.float16, np.int8])
def test_every_gemm_is_that_of_the_body(isa: str, stored: Any, shape: Any, x_shape: Any, bias: Any, attributes: Any) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, "linear" if attributes.get("transB") else "matmul", shape, "2:4", dtype=stored)
    extra = {} if bias is None else {"B": np.asarray(rng.standard_normal(bias), np.float32)}
    proto = layer("SparseGemm", weight, ["a", "b"], extra, **attributes)
    x = rng.standard_normal(x_shape).astype(np.float32)
    assert_close(with_kernels(proto).run(None, {"x": x})[0], without(proto).run(None, {"x": x})[0])


@pytest.mark.parametrize(("shape", "tokens"), [((64, 128), 4), ((64, 64), 1), ((64, 40), 20)])
def test_a_transposed_input_of_16_bits(isa: str, shape: Any, tokens: int) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, "matmul", shape, "2:4", dtype=np.float16)
    x = rng.standard_normal((shape[0], tokens)).astype(np.float16)
    got = with_kernels(layer("SparseGemm", weight, ["a", "b"], kind=TensorProto.FLOAT16, transA=1)).run(None, {"x": x})[0]
    assert_close(got, x.T.astype(np.float64) @ weight.dense.astype(np.float64), 1e-2)


@pytest.mark.parametrize(
    ("function", "bias", "attributes"),
    [
        ("SparseGemm", (1, 10), {"beta": 0.5}),
        ("SparseGemm", (1, 1), {}),
        ("SparseLinear", (1, 1), {}),
        ("SparseGemm", (1,), {"beta": 0.5}),
    ],
)
def test_no_tokens_and_a_bias_that_is_spread(isa: str, function: str, bias: Any, attributes: Any) -> None:
    weight = random_weight(np.random.default_rng(1), "matmul", (24, 10), "2:4")
    proto = layer(function, weight, ["a", "b"], {"B": np.ones(bias, np.float32)}, **attributes)
    assert with_kernels(proto).run(None, {"x": np.zeros((0, 24), np.float32)})[0].shape == (0, 10)


@pytest.mark.parametrize(
    ("function", "shape", "x"),
    [
        ("SparseConvAdd", (16, 16, 1, 1), (0, 16, 4, 4)),
        ("SparseLinearAdd", (16, 16), (0, 16)),
        ("SparseLinearAdd", (16, 16), (3, 0, 16)),
    ],
)
def test_an_empty_batch_with_a_residual(isa: str, function: str, shape: Any, x: Any) -> None:
    weight = random_weight(np.random.default_rng(1), "conv" if function == "SparseConvAdd" else "matmul", shape, "2:4")
    extra = {"B": np.ones(16, np.float32), "Z": np.zeros(x, np.float32)}
    got = with_kernels(layer(function, weight, [None] * len(x), extra)).run(None, {"x": np.zeros(x, np.float32)})[0]
    assert got.shape == x


@pytest.mark.parametrize(("function", "names"), [("SparseMatMulAdd", "Z"), ("SparseLinearAdd", "BZ")])
def test_a_vector_has_a_vector_added(isa: str, function: str, names: str) -> None:
    rng = np.random.default_rng(1)
    extra = {name: rng.standard_normal(10).astype(np.float32) for name in names}
    proto = layer(function, random_weight(rng, "matmul", (24, 10), "2:4"), ["k"], extra, y_rank=1)
    x = rng.standard_normal(24).astype(np.float32)
    assert_close(with_kernels(proto).run(None, {"x": x})[0], without(proto).run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("shape", "x_shape", "y_rank"),
    [((24, 10), (24,), 1), ((3, 24, 10), (3, 5, 24), 3), ((3, 24, 10), (4, 1, 5, 24), 4), ((2, 1, 24, 10), (3, 6, 24), 4)],
)
@pytest.mark.parametrize("stored", [np.float32, np.int8])
def test_batched_weights_broadcast_as_in_numpy(isa: str, stored: Any, shape: Any, x_shape: Any, y_rank: int) -> None:
    rng = np.random.default_rng(2)
    weight = random_weight(rng, "matmul", shape, "2:4", dtype=stored)
    x = rng.standard_normal(x_shape).astype(np.float32)
    proto = layer("SparseMatMul", weight, [f"d{d}" for d in range(len(x_shape))], y_rank=y_rank)
    assert_close(with_kernels(proto).run(None, {"x": x})[0], x.astype(np.float64) @ weight.dense)


@pytest.mark.parametrize("stored", [np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("compute", "tolerance"), [(TensorProto.FLOAT16, 2e-3), (TensorProto.FLOAT, 1e-5), (TensorProto.DOUBLE, 1e-12)]
)
def test_types_of_storage_and_computation(isa: str, stored: Any, compute: int, tolerance: float) -> None:
    rng = np.random.default_rng(3)
    dtype = helper.tensor_dtype_to_np_dtype(compute)
    tolerance = max(tolerance, 1e-5 if stored is np.float64 and compute == TensorProto.FLOAT else 0.0)
    weight = random_weight(rng, "conv", (12, 16, 3, 3), "2:4", dtype=stored)
    x = rng.standard_normal((1, 16, 6, 7)).astype(dtype)
    got = with_kernels(layer("SparseConv", weight, [1, 16, 6, 7], kind=compute, pads=[1] * 4)).run(None, {"x": x})[0]
    assert got.dtype == dtype
    assert_close(got, convolve(x, weight, pads=[1] * 4), tolerance)
    weight = random_weight(rng, "matmul", (32, 10), "1:4", dtype=stored)
    session = with_kernels(layer("SparseMatMul", weight, ["t", 32], kind=compute))
    for tokens in (1, 2, 4, 7):
        x = rng.standard_normal((tokens, 32)).astype(dtype)
        got = session.run(None, {"x": x})[0]
        assert_close(got, x.astype(np.float64) @ weight.dense.astype(np.float64), tolerance)


@pytest.mark.parametrize("value", [6e-8, -3e-5, 65504.0, -np.inf, np.nan])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_values_at_the_ends_of_16_bits(isa: str, stored: Any, value: float) -> None:
    """Subnormal halves and the largest; what is not finite cannot be packed, but a file may hold it."""
    weight = random_weight(np.random.default_rng(13), "matmul", (32, 20), "2:4", dtype=stored)
    weight.packed.values[3] = value
    proto, x = layer("SparseMatMul", weight, ["t", 32]), np.ones((1, 32), np.float32)
    got, expected = with_kernels(proto).run(None, {"x": x})[0], without(proto).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_rows_of_int8_that_are_zero_or_huge(isa: str, tokens: int) -> None:
    rng = np.random.default_rng(14)
    pattern, view = Pattern(2, 4), MatrixView.of("matmul", (64, 21), "channel")
    matrix = np.tile([0.5, 0, -1, 0], (21, 16)) * rng.standard_normal((21, 64))
    matrix[3] = 0
    matrix[7, 0] = 1e20
    weight = weight_of(matrix, view, pattern, quantized=True)
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    proto = layer("SparseMatMul", weight, ["t", 64])
    expected = x.astype(np.float64) @ weight.dense
    for session in (with_kernels(proto), without(proto)):
        got = session.run(None, {"x": x})[0]
        assert_close(np.delete(got, 7, 1), np.delete(expected, 7, 1))
        assert_close(got[:, 7], expected[:, 7])


@pytest.mark.parametrize("stored", [np.float32, np.int8])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_spoils_only_what_reads_it(isa: str, value: float, stored: Any) -> None:
    rng = np.random.default_rng(15)
    linear = random_weight(rng, "matmul", (96, 40), "2:4", dtype=stored)
    conv = random_weight(rng, "conv", (40, 32, 3, 3), "2:4", dtype=stored)
    for proto, shape, at in (
        (layer("SparseMatMul", linear, ["t", 96]), (40, 96), (17,)),
        (layer("SparseConv", conv, [2, 32, 20, 12], pads=[1] * 4), (2, 32, 20, 12), (1, slice(None), 7, 5)),
    ):
        x = rng.standard_normal(shape).astype(np.float32)
        expected = with_kernels(proto).run(None, {"x": x})[0]
        x[at] = value
        got = with_kernels(proto).run(None, {"x": x})[0]
        reads = np.zeros(got.shape, bool)
        reads[(17,) if got.ndim == 2 else (1, slice(None), slice(6, 9), slice(4, 7))] = True
        assert_close(got[~reads], expected[~reads])  # not bit for bit, because such images take the vectors
        assert not np.isfinite(got[reads]).any()


@pytest.mark.parametrize("stored", [np.float32, np.int8])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15])
@pytest.mark.parametrize("outlier", [1, 30, 1e4])
def test_inputs_of_any_size_and_beside_an_outlier(isa: str, outlier: float, scale: float, stored: Any) -> None:
    """What fixed point could lose: the error stays small beside what the inputs are on average, not beside the outlier."""
    rng = np.random.default_rng(16)
    linear = random_weight(rng, "matmul", (96, 40), "2:4", dtype=stored)
    conv = random_weight(rng, "conv", (40, 32, 3, 3), "2:4", dtype=stored)
    x = rng.standard_normal((40, 96)).astype(np.float32) * np.float32(scale)
    x[5, 3] *= outlier
    got = with_kernels(layer("SparseMatMul", linear, ["t", 96])).run(None, {"x": x})[0]
    expected = x.astype(np.float64) @ linear.dense
    for token in range(40):
        scaled = 1 / float(np.abs(expected[token]).max())
        assert_close(got[token] * scaled, expected[token] * scaled)
    x = rng.standard_normal((2, 32, 20, 12)).astype(np.float32) * np.float32(scale)
    x[1, 2, 3, 4] *= outlier
    got = with_kernels(layer("SparseConv", conv, [2, 32, 20, 12], pads=[1] * 4)).run(None, {"x": x})[0]
    expected = convolve(x, conv, pads=[1] * 4)
    scaled = 1 / float(np.abs(expected[0]).max())
    assert_close(got[0] * scaled, expected[0] * scaled)  # the image without the outlier


@pytest.mark.parametrize("largest", [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-44])
def test_inputs_at_the_ends_of_floats(isa: str, largest: float) -> None:
    linear = random_weight(np.random.default_rng(17), "matmul", (64, 40), "2:4")
    x = np.zeros((20, 64), np.float32)
    x[np.arange(20), np.arange(20)] = np.float32(largest)
    got = with_kernels(layer("SparseMatMul", linear, ["t", 64])).run(None, {"x": x})[0]
    expected = np.clip(x.astype(np.float64) @ linear.dense, -np.finfo(np.float32).max, np.finfo(np.float32).max)
    finite = np.isfinite(got)
    assert finite.mean() > 0.5  # products of the largest float and weights beyond 1 are infinite
    np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("stored", [np.float32, np.int8])
def test_the_number_of_threads_changes_no_bit(isa: str, stored: Any) -> None:
    rng = np.random.default_rng(4)
    linear = random_weight(rng, "matmul", (640, 500), "2:4", dtype=stored)
    conv = random_weight(rng, "conv", (64, 32, 3, 3), "1:4", dtype=stored)
    pointwise = random_weight(rng, "conv", (64, 32, 1, 1), "2:4", dtype=stored)
    for proto, shape in (
        (layer("SparseMatMul", linear, ["t", 640]), (1, 640)),
        (layer("SparseMatMul", linear, ["t", 640]), (70, 640)),
        (layer("SparseConv", conv, [1, 32, 30, 30], pads=[1] * 4), (1, 32, 30, 30)),
        (layer("SparseConv", conv, [3, 32, 7, 7], pads=[1] * 4), (3, 32, 7, 7)),
        (layer("SparseConv", pointwise, [2, 32, 28, 28], pads=[0] * 4), (2, 32, 28, 28)),
        (layer("SparseConv", conv, [4, 32, 24, 24], pads=[1] * 4), (4, 32, 24, 24)),  # whole images for each thread
        (layer("SparseConv", pointwise, [9, 32, 46, 46], pads=[0] * 4, strides=[2, 2]), (9, 32, 46, 46)),
    ):
        x = rng.standard_normal(shape).astype(np.float32)
        first, *others = (with_kernels(proto, threads).run(None, {"x": x})[0].tobytes() for threads in (1, 2, 4))
        assert all(other == first for other in others)


@needs_kernels
def test_what_is_no_model_is_onnxruntimes_to_say(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x0a\xff\xff")
    for source in (tmp_path / "a.onnx", b"\x0a\xff\xff"):
        with pytest.raises(Exception, match=r"(?i)protobuf|\[ONNXRuntimeError\]"):
            runtime.session(source)


@needs_kernels
def test_concurrent_runs_of_one_session_agree() -> None:
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(5)
    session = with_kernels(layer("SparseConv", random_weight(rng, "conv", (32, 16, 3, 3), "2:4"), [1, 16, "h", "w"]), 2)
    inputs = [rng.standard_normal((1, 16, 8 + i % 5, 20)).astype(np.float32) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: session.run(None, {"x": x})[0], inputs))
    for x, y in zip(inputs, together, strict=True):
        assert y.tobytes() == session.run(None, {"x": x})[0].tobytes()


@needs_kernels
@pytest.mark.parametrize("batch", [1, 5])  # 1 is what an open batch is taken for when the session is made
def test_what_was_prepacked_on_a_guess_gives_way_to_what_is_met(isa: str, batch: int) -> None:
    rng = np.random.default_rng(11)
    linear, conv = random_weight(rng, "matmul", (64, 40), "2:4"), random_weight(rng, "conv", (40, 16, 3, 3), "1:4")
    session = with_kernels(layer("SparseMatMul", linear, ["batch", 3, 64]))
    for size in (batch, 7, batch):
        x = rng.standard_normal((size, 3, 64)).astype(np.float32)
        assert_close(session.run(None, {"x": x})[0], x.astype(np.float64) @ linear.dense)
    session = with_kernels(layer("SparseConv", conv, ["batch", 16, 9, 9]))
    for size in (batch, 7, batch):
        x = rng.standard_normal((size, 16, 9, 9)).astype(np.float32)
        assert_close(session.run(None, {"x": x})[0], convolve(x, conv))


@needs_kernels
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc and /proc to see memory")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer gives memory back when it likes")
@pytest.mark.parametrize(("shape", "grows"), [([1, 2048], False), (["batch", 2048], False), (["a", "b"], True)])
def test_weights_are_prepacked_when_the_session_is_made(shape: list[Any], grows: bool) -> None:
    """The first run takes no memory for weights, except where only it shows how many tokens there are."""
    rng = np.random.default_rng(12)
    weight = random_weight(rng, "matmul", (2048, 4096), "2:4")
    session = with_kernels(layer("SparseMatMul", weight, shape))
    before = resident_megabytes()
    session.run(None, {"x": np.ones((1, 2048), np.float32)})
    assert (resident_megabytes() - before > 12) == grows  # 16 MB of values, 2 MB of positions


def resident_megabytes() -> float:
    ctypes.CDLL(None).malloc_trim(0)  # what is free would be taken again unseen
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


@needs_kernels
def test_session_takes_over_by_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    proto = layer("SparseMatMul", random_weight(rng, "matmul", (32, 16), "2:4"), ["t", 32])
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    settings = onnxruntime.SessionOptions()
    settings.enable_profiling = True
    settings.profile_file_prefix = str(tmp_path / "profile")
    session = runtime.session(path, settings, layers="sparse")
    x = rng.standard_normal((3, 32)).astype(np.float32)
    assert_close(session.run(None, {"x": x})[0], without(proto).run(None, {"x": x})[0])
    assert '"op_name" : "SparseMatMul"' in Path(session.end_profiling()).read_text()


def test_layers_that_are_no_choice_are_named() -> None:
    with pytest.raises(UsageError, match="layers 'dense' is none of auto, sparse"):
        runtime.session(b"", layers="dense")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("NMCONVERT_KERNELS", "off", "switched off"),
        ("NMCONVERT_KERNELS", "/nowhere/libnmconvert.so", "as NMCONVERT_KERNELS says"),
        ("NMCONVERT_KERNELS", __file__, "cannot be loaded"),
        ("NMCONVERT_ISA", "vax", "NMCONVERT_ISA=vax"),
    ],
)
def test_without_kernels_a_warning_and_the_body(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str) -> None:
    if variable == "NMCONVERT_ISA" and not runtime.kernels().path:
        pytest.skip("no library that could refuse")
    monkeypatch.setenv(variable, value)
    rng = np.random.default_rng(7)
    weight = random_weight(rng, "matmul", (32, 16), "2:4")
    with pytest.raises(KernelsUnavailableError, match=says):
        runtime.library()
    with pytest.warns(RuntimeWarning, match=says):
        session = runtime.session(layer("SparseMatMul", weight, ["t", 32]).SerializeToString())
    x = rng.standard_normal((3, 32)).astype(np.float32)
    assert_close(session.run(None, {"x": x})[0], x.astype(np.float64) @ weight.dense)


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files.

DAMAGE: dict[str, dict[str, Any]] = {
    "shape": {"shape": [16, 32, 3, 4]},
    "absurd shape": {"shape": [2**40, 2**40, 3, 3], "permuted": [2**40, 3, 3, 2**40]},
    "negative shape": {"shape": [-16, 32, 3, 3]},
    "perm": {"perm": [0, 0, 1, 2]},
    "perm out of range": {"perm": [0, 9, 1, 2]},
    "code_shape": {"code_shape": [-1, 1, 0]},
    "parts": {"code_shape": [-1, 2, 8]},
    "pattern": {"n": 9, "m": 4},
    "pads": {"pads": [-1, 0, 0, 0]},
    "number of pads": {"pads": [1, 1]},
    "strides": {"strides": [0, 1]},
    "dilations": {"dilations": [1, -3]},
    "group": {"group": 3},
    "auto_pad": {"auto_pad": "SOMEHOW"},
    "kernel_shape": {"kernel_shape": [5, 5]},
    "a number for a list": {"strides": 2},
    "a list of numbers": {"strides": [2.0, 2.0]},
    "a text for a list": {"pads": "1"},
    "a number for an integer": {"group": 1.0},
    "a list for an integer": {"group": [1]},
    "an integer for a text": {"auto_pad": 1},
}


@needs_kernels
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_node_that_contradicts_itself_is_an_error_at_load(damage: str) -> None:
    proto = conv_model()
    node = proto.graph.node[0]
    for name, value in DAMAGE[damage].items():
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])
    with pytest.raises(Exception, match=r"nmconvert\.SparseConv"):
        with_kernels(proto)


@needs_kernels
@pytest.mark.parametrize("name", ["values", "mask", "table"])
@pytest.mark.parametrize("cut", [0, 1, 3, -5])
def test_truncated_tensors_are_an_error_at_load(name: str, cut: int) -> None:
    proto = conv_model()
    constant = next(c for c in proto.graph.initializer if c.name == name)
    array = onnx.numpy_helper.to_array(constant).reshape(-1)[:cut]
    constant.CopyFrom(tensor(name, array if name != "table" else array[: len(array) // 8 * 8].reshape(-1, 8)))
    with pytest.raises(Exception, match="nmconvert"):
        with_kernels(proto)


@needs_kernels
def test_an_input_that_does_not_fit_is_an_error_of_the_run() -> None:
    session = with_kernels(conv_model(["b", "c", "h", "w"]))
    for shape in ((1, 31, 9, 9), (1, 32, 2, 9)):
        with pytest.raises(Exception, match=r"nmconvert"):
            session.run(None, {"x": np.zeros(shape, np.float32)})
    assert session.run(None, {"x": np.zeros((0, 32, 9, 9), np.float32)})[0].shape == (0, 16, 7, 7)


@needs_kernels
def test_a_stride_beyond_the_image_takes_no_more_memory_than_that(isa: str) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, "conv", (8, 8, 3, 3), "2:4")
    attributes: dict[str, Any] = {"pads": [1] * 4, "strides": [1, 2**20]}
    x = rng.standard_normal((1, 8, 9, 9)).astype(np.float32)
    got = with_kernels(layer("SparseConv", weight, [1, 8, 9, 9], **attributes)).run(None, {"x": x})[0]
    assert_close(got, convolve(x, weight, **attributes))


@needs_kernels
@pytest.mark.parametrize("pad", [20_000, 2**20])
def test_pads_of_gigabytes_are_an_error_of_the_run(isa: str, pad: int) -> None:
    weight = random_weight(np.random.default_rng(1), "conv", (8, 8, 3, 3), "2:4")
    session = with_kernels(layer("SparseConv", weight, [1, 8, "h", "w"], pads=[pad] * 4, strides=[pad] * 2))
    with pytest.raises(Exception, match="with its pads would have"):
        session.run(None, {"x": np.zeros((1, 8, 9, 9), np.float32)})


@needs_kernels
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_what_fails_on_a_thread_of_the_session_is_an_error_of_the_run(isa: str, batch: int) -> None:
    """Images of a batch go to threads of onnxruntime, which catch nothing: the process ended."""
    weight = random_weight(np.random.default_rng(1), "conv", (32, 32, 3, 3), "2:4")
    proto = layer("SparseConv", weight, [batch, 32, 8, 8], pads=[6000] * 4, strides=[400] * 2)
    with pytest.raises(
        Exception, match=r"nmconvert\.SparseConv: the input with its pads would have \d+ numbers, without them \d+$"
    ):
        with_kernels(proto, 2).run(None, {"x": np.zeros((batch, 32, 8, 8), np.float32)})


@needs_kernels
def test_images_of_many_sizes_take_the_memory_of_some(isa: str) -> None:
    """Where images are read where they are, weights are prepared for their size."""
    weight = random_weight(np.random.default_rng(1), "conv", (1024, 1024, 1, 1), "2:4")
    session = with_kernels(layer("SparseConv", weight, [1, 1024, "h", "w"]))

    def megabytes_after(pixels: range) -> float:
        for count in pixels:
            room = np.zeros(1024 * count + 16, np.float32)
            start = -room.ctypes.data % 64 // 4  # at a cache line, as the outputs of other layers
            session.run(None, {"x": room[start:][: 1024 * count].reshape(1, 1024, 1, count)})
        return resident_megabytes()

    before = megabytes_after(range(16, 64, 16))
    assert megabytes_after(range(64, 1280, 16)) - before < 50  # eight plans of 3 MB, and images


@needs_kernels
@pytest.mark.parametrize(("kept", "values"), [(0, 0), (1, 1)])
def test_a_small_file_is_no_large_weight(kept: int, values: int) -> None:
    proto = layer("SparseMatMul", random_weight(np.random.default_rng(1), "matmul", (32, 64), "2:4"), ["t", 32])
    width, side = 4096, 2**13
    arrays = {
        "values": np.zeros(values, np.float32),
        "mask": np.zeros(side * side // width, np.uint8),
        "table": np.full((1, width), kept, np.uint8),
    }
    for constant in proto.graph.initializer:
        constant.CopyFrom(tensor(constant.name, arrays[constant.name]))
    changed = {"shape": [side, side], "permuted": [side, side], "code_shape": [-1, 1, width]}
    for attribute in proto.graph.node[0].attribute:
        if attribute.name in changed:
            attribute.CopyFrom(helper.make_attribute(attribute.name, changed[attribute.name]))
    with pytest.raises(Exception, match=f"there are {values} values for {side * side} weights"):
        with_kernels(proto)


SCALES: dict[str, np.ndarray] = {
    "too few": np.ones(15, np.float32),
    "too many": np.ones(17, np.float32),
    "of two dimensions": np.ones((16, 1), np.float32),
    "none": np.ones(0, np.float32),
    **{f"{bad}": np.array([1.0] * 15 + [bad], np.float32) for bad in (0.0, -1.0, np.nan, np.inf)},
}


@needs_kernels
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_that_does_not_fit_is_an_error_at_load(scale: str) -> None:
    proto = conv_model(stored=np.int8)
    constant = next(c for c in proto.graph.initializer if c.name == "scale")
    constant.CopyFrom(tensor("scale", SCALES[scale]))
    with pytest.raises(Exception, match=r"nmconvert\.ScaledSparseConv: .*scale"):
        with_kernels(proto)


@needs_kernels
@pytest.mark.parametrize("change", ["left out", "empty", "an input", "of another type"])
def test_a_scale_that_is_missing_is_an_error_at_load(change: str) -> None:
    proto = conv_model(stored=np.int8)
    node = proto.graph.node[0]
    assert node.input[4] == "scale"
    if change == "left out":
        del node.input[4:]
    elif change == "empty":
        node.input[4] = ""
    elif change == "an input":
        proto.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [16]))
    else:
        constant = next(c for c in proto.graph.initializer if c.name == "scale")
        constant.CopyFrom(tensor("scale", np.ones(16, np.float64)))
    with pytest.raises(Exception, match=r"."):
        with_kernels(proto)


def fuzzed_models() -> dict[str, tuple[onnx.ModelProto, np.ndarray]]:
    """One model of each kind of node, with an input."""
    rng = np.random.default_rng(8)
    gemm, linear = random_weight(rng, "linear", (24, 40), "1:4"), random_weight(rng, "matmul", (40, 24), "2:32")
    scaled = random_weight(rng, "matmul", (40, 24), "2:4", dtype=np.int8)
    extra = {"B": np.ones(24, np.float32), "Z": np.ones((6, 24), np.float32)}
    gemm_attributes = {"alpha": 0.5, "beta": 1.0, "transA": 0, "transB": 1}
    x = rng.standard_normal((6, 40)).astype(np.float32)
    return {
        "Conv": (conv_model(["b", 32, "h", "w"]), rng.standard_normal((1, 32, 9, 9)).astype(np.float32)),
        "Gemm": (layer("SparseGemm", gemm, ["t", 40], {"B": extra["B"]}, **gemm_attributes), x),
        "LinearAdd": (layer("SparseLinearAdd", linear, ["t", 40], extra), x),
        "ScaledLinearAdd": (layer("SparseLinearAdd", scaled, ["t", 40], extra), x),
        "ScaledConv": (conv_model(["b", 32, "h", "w"], np.int8), rng.standard_normal((1, 32, 9, 9)).astype(np.float32)),
    }


@needs_kernels
@pytest.mark.parametrize("kind", ["Conv", "Gemm", "LinearAdd", "ScaledConv", "ScaledLinearAdd"])
def test_mutated_files_do_not_crash(kind: str) -> None:
    """Files with flipped bytes and swapped numbers either load, and run, or are refused; NMCONVERT_FUZZ says how many."""
    rng = np.random.default_rng(8)
    proto, x = fuzzed_models()[kind]
    plain = proto.SerializeToString()
    outcomes = {"ran": 0, "refused": 0}
    for round_ in range(int(os.environ.get("NMCONVERT_FUZZ", "300"))):
        damaged = bytearray(plain)
        if round_ % 2:
            for at in rng.integers(0, len(damaged), rng.integers(1, 4)):
                damaged[at] = rng.integers(0, 256)
        else:
            damaged = bytearray(mutated(proto, rng).SerializeToString())
        try:
            made = options()
            made.register_custom_ops_library(str(runtime.library()))
            session = onnxruntime.InferenceSession(bytes(damaged), made, providers=["CPUExecutionProvider"])
            session.run(None, {"x": x})
            outcomes["ran"] += 1
        except Exception:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def mutated(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """One attribute of the call replaced by a number from a collection of unpleasant ones."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    attribute = copy.graph.node[0].attribute[int(rng.integers(len(proto.graph.node[0].attribute)))]
    value = int(rng.choice([-1, 0, 1, 2, 3, 7, 255, 256, 2**20, 2**31 - 1, 2**31, 2**62, -(2**63)]))
    if attribute.ints:
        attribute.ints[int(rng.integers(len(attribute.ints)))] = value
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = value
    elif attribute.name not in ("stored", "compute"):
        attribute.i = value
    return copy


def conv_model(x_shape: list[Any] | None = None, stored: Any = np.float32) -> onnx.ModelProto:
    rng = np.random.default_rng(9)
    weight = random_weight(rng, "conv", (16, 32, 3, 3), "2:4", dtype=stored)
    node = call(
        "SparseConv", weight, ["x", ""], "y", pads=[0] * 4, strides=[1, 1], dilations=[1, 1], group=1, compute=TensorProto.FLOAT
    )
    return model([node], initializers(weight), x_shape or [1, 32, 9, 9])
