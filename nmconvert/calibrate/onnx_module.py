"""A graph of common ONNX operators as a torch module, so that gradients can be had from a bare file.

It is not trusted: who uses it compares it with onnxruntime first (:func:`nmconvert.calibrate.onnx_driver.prune_onnx` does).
Floating initialisers that are weights are its parameters, under their names with dots replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper
from torch import Tensor, nn

from nmconvert.onnx_graph import Constants, attribute

Inputs = Sequence[Any]
_SETTINGS = ("Resize", "Pad", "Clip")  # their further inputs say how, and are no weights


class OnnxModule(nn.Module):
    """Called with the graph's inputs by name; returns the values ``outputs``.

    Raises:
        NotImplementedError: an operator is not among :data:`OPERATORS`.
    """

    def __init__(self, model: ModelProto, outputs: Sequence[str]) -> None:
        super().__init__()
        self.graph: GraphProto = model.graph
        self.outputs = list(outputs)
        constants = Constants.of(model.graph).tensors
        self.nodes = [node for node in model.graph.node if node.op_type != "Constant"]
        if unknown := sorted({node.op_type for node in self.nodes} - OPERATORS.keys()):
            raise NotImplementedError(f"no gradients through {', '.join(unknown)}")
        settings = {name for node in self.nodes if node.op_type in _SETTINGS for name in node.input[1:]}
        self.constants: dict[str, Tensor] = {}
        self.weights = nn.ParameterDict()
        for name, tensor in constants.items():
            value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            if value.is_floating_point() and value.dim() and name not in settings:
                self.weights[key(name)] = nn.Parameter(value, requires_grad=False)
            else:
                self.constants[name] = value

    def forward(self, **inputs: Tensor) -> list[Tensor]:
        """The values that were asked for, in order."""
        values: dict[str, Any] = {"": None, **inputs, **self.constants}

        def value(name: str) -> Any:
            return values[name] if name in values else self.weights[key(name)]

        for node in self.nodes:
            values[node.output[0]] = OPERATORS[node.op_type](node, [value(name) for name in node.input])
        return [values[name] for name in self.outputs]


def key(name: str) -> str:
    """The name under which an initialiser is a parameter."""
    return name.replace(".", "/")


def _pads(node: NodeProto, rank: int) -> list[int]:
    """For F.pad: the last dimension first."""
    if attribute(node, "auto_pad", b"NOTSET") != b"NOTSET":
        raise NotImplementedError("no gradients through auto_pad")
    pads = attribute(node, "pads", [0] * 2 * rank)
    return [p for d in reversed(range(rank)) for p in (pads[d], pads[d + rank])]


def _conv(node: NodeProto, x: Inputs) -> Tensor:
    data, weight, bias = (*x, None)[:3]
    rank = weight.dim() - 2
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    stride, dilation = attribute(node, "strides", [1] * rank), attribute(node, "dilations", [1] * rank)
    padded = F.pad(data, _pads(node, rank))
    result: Tensor = function(padded, weight, bias, stride, 0, dilation, attribute(node, "group", 1))
    return result


def _pool(node: NodeProto, x: Inputs) -> Tensor:
    kernel = attribute(node, "kernel_shape", [1])
    rank = len(kernel)
    pads = _pads(node, rank)
    if rank != 2 or attribute(node, "ceil_mode", 0) or (node.op_type == "AveragePool" and any(pads)):
        raise NotImplementedError(f"no gradients through this {node.op_type}")
    stride = attribute(node, "strides", [1] * rank)
    if node.op_type == "AveragePool":
        return F.avg_pool2d(x[0], kernel, stride)
    return F.max_pool2d(F.pad(x[0], pads, value=float("-inf")), kernel, stride)


def _resize(node: NodeProto, x: Inputs) -> Tensor:
    scales = x[2] if len(x) > 2 and x[2] is not None and x[2].numel() else None
    size = None if scales is not None else [int(s) for s in x[3][2:]]
    factor = None if scales is None else [float(s) for s in scales[2:]]
    mode = {b"nearest": "nearest", b"linear": "bilinear"}[attribute(node, "mode", b"nearest")]
    return F.interpolate(x[0], size=size, scale_factor=factor, mode=mode)


def _gemm(node: NodeProto, x: Inputs) -> Tensor:
    a, b = x[0], x[1]
    a = a.T if attribute(node, "transA", 0) else a
    b = b.T if attribute(node, "transB", 0) else b
    product = attribute(node, "alpha", 1.0) * (a @ b)
    result: Tensor = product + attribute(node, "beta", 1.0) * x[2] if len(x) > 2 else product
    return result


def _reshape(node: NodeProto, x: Inputs) -> Tensor:
    shape = [x[0].shape[i] if s == 0 else int(s) for i, s in enumerate(x[1].tolist())]
    result: Tensor = x[0].reshape(shape)
    return result


def _gather(node: NodeProto, x: Inputs) -> Tensor:
    axis = attribute(node, "axis", 0) % x[0].dim()
    picked = x[0].index_select(axis, x[1].reshape(-1).long() % x[0].shape[axis])
    result: Tensor = picked.reshape(*x[0].shape[:axis], *x[1].shape, *x[0].shape[axis + 1 :])
    return result


def _pad(node: NodeProto, x: Inputs) -> Tensor:
    pads = x[1].tolist() if len(x) > 1 else attribute(node, "pads", [0])
    rank = len(pads) // 2
    if attribute(node, "mode", b"constant") != b"constant":
        raise NotImplementedError("no gradients through this Pad")
    return F.pad(x[0], [int(p) for d in reversed(range(rank)) for p in (pads[d], pads[d + rank])])


def _clip(node: NodeProto, x: Inputs) -> Tensor:
    low, high = (*x[1:], None, None)[:2]
    result: Tensor = x[0].clamp(None if low is None else float(low), None if high is None else float(high))
    return result


def _batch_norm(node: NodeProto, x: Inputs) -> Tensor:
    return F.batch_norm(x[0], x[3], x[4], x[1], x[2], False, 0.0, attribute(node, "epsilon", 1e-5))


OPERATORS: Mapping[str, Callable[[NodeProto, Inputs], Tensor]] = {
    "Add": lambda node, x: x[0] + x[1],
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda node, x: torch.cat(list(x), attribute(node, "axis", 0)),
    "Conv": _conv,
    "Div": lambda node, x: x[0] / x[1],
    "Flatten": lambda node, x: x[0].flatten(attribute(node, "axis", 1)),
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node, x: x[0].mean(tuple(range(2, x[0].dim())), keepdim=True),
    "HardSwish": lambda node, x: F.hardswish(x[0]),
    "Identity": lambda node, x: x[0],
    "LeakyRelu": lambda node, x: F.leaky_relu(x[0], attribute(node, "alpha", 0.01)),
    "MatMul": lambda node, x: x[0] @ x[1],
    "MaxPool": _pool,
    "Mul": lambda node, x: x[0] * x[1],
    "Pad": _pad,
    "Relu": lambda node, x: x[0].relu(),
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": lambda node, x: x[0].sigmoid(),
    "Softmax": lambda node, x: x[0].softmax(attribute(node, "axis", -1)),
    "Sub": lambda node, x: x[0] - x[1],
    "Tanh": lambda node, x: x[0].tanh(),
    "Transpose": lambda node, x: x[0].permute(attribute(node, "perm", list(range(x[0].dim()))[::-1])),
}
