"""Small models whose sparse layers are calls of our functions, as the exporter writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from nmconvert.export.functions import DOMAIN_VERSION, FUNCTIONS, IR_VERSION, OPSET, function_proto
from nmconvert.masks import nm_mask
from nmconvert.matrix import Kind, MatrixView
from nmconvert.onnx_graph import DOMAIN, SCALED
from nmconvert.packing import Packed, dequantize, pack, quantize
from nmconvert.pattern import Axis, Pattern


@dataclass(frozen=True)
class Weight:
    """A random N:M weight: dense as the operator takes it, and packed."""

    dense: np.ndarray
    view: MatrixView
    packed: Packed
    pattern: Pattern
    axis: Axis


def random_weight(
    rng: np.random.Generator, kind: Kind, shape: tuple[int, ...], pattern: str, axis: Axis = "channel", dtype: Any = np.float32
) -> Weight:
    view = MatrixView.of(kind, shape, axis)
    parsed = Pattern.parse(pattern)
    matrix = rng.standard_normal((view.rows, view.columns))
    keep = nm_mask(torch.from_numpy(np.abs(matrix)), parsed).numpy()
    matrix = np.where(keep, matrix / np.sqrt(view.columns), 0)
    return weight_of(matrix if dtype == np.int8 else matrix.astype(dtype), view, parsed, axis, quantized=dtype == np.int8)


def weight_of(matrix: np.ndarray, view: MatrixView, pattern: Pattern, axis: Axis = "channel", *, quantized: bool) -> Weight:
    """``matrix`` [rows, columns] as a weight; ``quantized``: as int8 with a scale for each row, which it is rounded to."""
    if not quantized:
        return Weight(view.from_matrix(matrix), view, pack(matrix, pattern), pattern, axis)
    rounded = dequantize(*quantize(matrix.astype(np.float32)))
    return Weight(view.from_matrix(rounded), view, pack(rounded, pattern).quantized(), pattern, axis)


def tensor(name: str, array: np.ndarray) -> TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)


def call(
    function: str, weight: Weight, inputs: list[str], output: str, prefix: str = "", compute: int = 0, **attributes: Any
) -> onnx.NodeProto:
    """The call of ``function``, or of its scaled twin, with ``inputs`` (X, then what follows the weight)."""
    packed = [prefix + part.name for part in initializers(weight)]
    return helper.make_node(
        function if weight.packed.scale is None else SCALED + function,
        [inputs[0], *packed, *inputs[1:]],
        [output],
        domain=DOMAIN,
        n=weight.pattern.n,
        m=weight.pattern.m,
        axis=weight.axis,
        shape=weight.view.shape,
        permuted=weight.view.permuted,
        perm=weight.view.inverse_perm,
        code_shape=[-1, weight.packed.coding.parts, weight.packed.coding.width],
        stored=helper.np_dtype_to_tensor_dtype(weight.packed.values.dtype),
        compute=compute or helper.np_dtype_to_tensor_dtype(weight.dense.dtype),
        **attributes,
    )


def initializers(weight: Weight, prefix: str = "") -> list[TensorProto]:
    packed = weight.packed
    arrays = {"values": packed.values, "mask": packed.mask, "table": packed.coding.table, "scale": packed.scale}
    return [tensor(prefix + name, array) for name, array in arrays.items() if array is not None]


def model(
    nodes: list[onnx.NodeProto],
    constants: list[TensorProto],
    x_shape: list[Any],
    kind: int = TensorProto.FLOAT,
    y_rank: int | None = None,
    more_inputs: dict[str, list[Any]] | None = None,
) -> onnx.ModelProto:
    """A model from ``x`` (and ``more_inputs``) to ``y``."""
    inputs = {"x": x_shape, **(more_inputs or {})}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", kind, [f"y{d}" for d in range(len(x_shape) if y_rank is None else y_rank)])],
        constants,
    )
    names = sorted({node.op_type for node in nodes if node.domain == DOMAIN})
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(
        graph, opset_imports=opsets, functions=[function_proto(name) for name in names], ir_version=IR_VERSION
    )


def layer(
    function: str,
    weight: Weight,
    x_shape: list[Any],
    extra: dict[str, np.ndarray] | None = None,
    kind: int = TensorProto.FLOAT,
    y_rank: int | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """One call of ``function`` on ``x``; ``extra`` holds its other inputs (B, Z), which are constants."""
    extra = extra or {}
    names = [
        "x",
        *(["B" if "B" in extra else ""] if FUNCTIONS[function].takes_bias else []),
        *(name for name in extra if name != "B"),
    ]
    node = call(function, weight, names, "y", compute=kind, **attributes)
    constants = [*initializers(weight), *(tensor(name, array) for name, array in extra.items())]
    return model([node], constants, x_shape, kind, y_rank)
