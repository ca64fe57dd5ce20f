"""Small ONNX models to test with, and onnxruntime to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from strategies import sparse_matrix

from nmconvert.matrix import Kind, MatrixView
from nmconvert.pattern import Axis, Pattern

Array = npt.NDArray[Any]


def value(name: str, dims: Sequence[int | str | None], element: int = TensorProto.FLOAT) -> ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, element, list(dims))


def model_of(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, Array],
    x: Sequence[int | str],
    *,
    rank: int | None = None,
    element: int = TensorProto.FLOAT,
    opset: int = 18,
    outputs: Sequence[str] = ("Y",),
) -> ModelProto:
    """A model from input ``X`` to ``outputs``, whose dimensions are all left open."""
    open_shape = [None] * (len(x) if rank is None else rank)
    graph = helper.make_graph(
        list(nodes),
        "test",
        [value("X", x, element)],
        [value(name, open_shape, element) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset > 8 else 3)


def sparse_weight(
    kind: Kind,
    shape: Sequence[int],
    pattern: str | Pattern,
    axis: Axis = "channel",
    groups: int = 1,
    seed: int = 0,
    dtype: Any = None,
) -> Array:
    """A weight that satisfies ``pattern`` along ``axis``."""
    view = MatrixView.of(kind, shape, axis, groups)
    matrix = sparse_matrix(view.rows, view.columns, Pattern.parse(pattern), seed, dtype or np.float32)
    return np.ascontiguousarray(view.from_matrix(matrix))


def session(model: ModelProto | Path, *, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """One thread, everything optimised."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    what = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(what, options, providers=["CPUExecutionProvider"])


def run(model: ModelProto | Path, x: Array) -> Array:
    """The first output for input ``X``."""
    opened = session(model)
    result: Array = opened.run(None, {opened.get_inputs()[0].name: x})[0]
    return result


def random_input(shape: Sequence[int], dtype: Any = np.float32, seed: int = 1) -> Array:
    """Normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def op_types(path: Path) -> list[str]:
    """The operators of a saved model in alphabetical order, the bodies of If and Loop not looked at."""
    return sorted(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def conv_net(pattern: str | None = "2:4", *, opset: int = 18, seed: int = 0) -> ModelProto:
    """Two convolutions, a pooling and a Gemm; the weights are sparse unless ``pattern`` is None."""
    shapes: dict[str, tuple[Kind, tuple[int, ...]]] = {
        "first.weight": ("conv", (8, 8, 3, 3)),
        "second.weight": ("conv", (16, 8, 1, 1)),
        "head.weight": ("linear", (10, 16)),
    }
    constants = {
        name: sparse_weight(kind, shape, pattern or "32:32", seed=seed + number)
        for number, (name, (kind, shape)) in enumerate(shapes.items())
    }
    constants["head.bias"] = random_input((10,), seed=5)
    nodes = [
        helper.make_node("Conv", ["X", "first.weight"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second.weight"], ["c"], name="second"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "head.weight", "head.bias"], ["Y"], name="head", transB=1),
    ]
    return model_of(nodes, constants, ["batch", 8, 6, 6], rank=2, opset=opset)
