"""Single ONNX operators on torch tensors: in torch, where gradients may be wanted, or in onnxruntime.

No operator is trusted: on its first call torch's answer is compared with onnxruntime's, and where the two differ, or torch
knows no match, onnxruntime computes it from then on. Half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from nmconvert.errors import ModelError, one_line
from nmconvert.onnx_graph import DTYPES, attribute, reads

Inputs = Sequence[Any]
Pads = list[tuple[int, int]]


class Runtime:
    """Runs single nodes of ``model`` in onnxruntime; their sessions are kept."""

    def __init__(self, model: ModelProto) -> None:
        self._opsets, self._version, self._functions = model.opset_import, model.ir_version, model.functions
        self._sessions: dict[Any, Any] = {}

    def __deepcopy__(self, memo: Any) -> Runtime:
        return self

    def __call__(self, node: NodeProto, values: Mapping[str, Any]) -> list[Tensor]:
        """The outputs of ``node``; ``values`` are those that it and the graphs in its attributes read, by name."""
        feeds = {name: _fed(value) for name, value in values.items() if name and value is not None}
        key = (node.SerializeToString(), tuple((name, _type(array)) for name, array in feeds.items()))
        outputs = [name for name in node.output if name]
        try:
            if key not in self._sessions:
                self._sessions[key] = self._session(node, feeds)
            return [_returned(array) for array in self._sessions[key].run(outputs, feeds)]
        except Exception as error:  # onnxruntime's classes share no base but this one
            called = f"'{node.name or node.output[0]}' ({node.op_type})"
            raise ModelError(f"onnxruntime cannot compute {called}: {one_line(error)}") from error

    def _session(self, node: NodeProto, feeds: Mapping[str, Any]) -> Any:
        inputs = []
        for name, array in feeds.items():
            is_sequence, dtype = _type(array)
            make = helper.make_tensor_sequence_value_info if is_sequence else helper.make_tensor_value_info
            inputs.append(make(name, helper.np_dtype_to_tensor_dtype(dtype), None))
        graph = helper.make_graph([node], "node", inputs, [ValueInfoProto(name=name) for name in node.output if name])
        return session(
            helper.make_model(graph, opset_imports=self._opsets, ir_version=self._version, functions=self._functions)
        )


def _fed(value: Any) -> Any:
    """A value as onnxruntime takes it: an array, or a list of them for a sequence."""
    return [part.detach().numpy() for part in value] if isinstance(value, list) else value.detach().numpy()


def _returned(value: Any) -> Any:
    return [_returned(part) for part in value] if isinstance(value, list) else single(torch.from_numpy(np.asarray(value)))


def _type(value: Any) -> tuple[bool, np.dtype[Any]]:
    """Whether it is a sequence, and the type of its numbers; an empty one does not say, and is taken to be of floats."""
    if isinstance(value, list):
        return True, value[0].dtype if value else np.dtype(np.float32)
    return False, value.dtype


def single(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def session(model: ModelProto) -> Any:
    """A session of onnxruntime with as many threads as torch has."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def constant_values(proto: TensorProto) -> Tensor:
    """The values of a constant; half precision as float32.

    Raises:
        ModelError: its type is one that torch does not compute with, or it is damaged.
    """
    try:
        array = numpy_helper.to_array(proto)
    except (ValueError, TypeError) as error:
        raise ModelError(f"tensor '{proto.name}' is damaged: {error}") from error
    if proto.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        array = array.astype(np.float32)
    try:
        return torch.from_numpy(array.copy())
    except TypeError as error:
        dtype = TensorProto.DataType.Name(proto.data_type).lower()
        raise ModelError(f"'{proto.name}' is {dtype}, which cannot be calibrated: prune by magnitude alone") from error


class _NoMatch(Exception):
    """Torch has nothing that does what a node asks for: onnxruntime computes it."""


class Operator:
    """One node, computed in torch where that agrees with onnxruntime on the first call, else in onnxruntime."""

    def __init__(self, node: NodeProto, runtime: Runtime) -> None:
        self.node, self.runtime = node, runtime
        self.native: bool | None = None  # unknown before the first call
        self.opaque = False

    def __deepcopy__(self, memo: Any) -> Operator:
        return self

    def __call__(self, known: Mapping[str, Any]) -> list[Any]:
        """Its outputs, for the values ``known`` by name."""
        ours = None if self.native is False else self._in_torch(known)
        if self.native and ours is not None:
            return ours
        theirs = self.runtime(self.node, {name: known[name] for name in reads(self.node) if name in known})
        if self.native is None:
            self.native = ours is not None and len(ours) == len(theirs) and all(map(_agree, ours, theirs))
            read = (known.get(name) for name in self.node.input)
            self.opaque = not self.native and any(map(_is_floating, read)) and any(map(_is_floating, theirs))
        return theirs

    def _in_torch(self, known: Mapping[str, Any]) -> list[Any] | None:
        """None where no match is known, or only whole numbers are computed (which round otherwise)."""
        inputs = [known[name] if name else None for name in self.node.input]
        if self.node.op_type not in OPERATORS or self.node.domain not in ("", "ai.onnx") or not any(map(_is_floating, inputs)):
            return None
        try:
            outputs = OPERATORS[self.node.op_type](self.node, inputs)
        except (_NoMatch, NotImplementedError):  # the other is torch's own, of types that it does not compute
            return None
        except Exception:  # an older or rarer form of an operator, of which onnxruntime knows
            if self.native:
                raise
            return None
        return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    finite = theirs[theirs.isfinite()].abs() if theirs.is_floating_point() else theirs.new_empty(0)
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)


# ── padding ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def window_pads(
    node: NodeProto, space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pads:
    """Begin and end padding of each dimension, ``auto_pad`` worked out as the specification of Conv says."""
    mode = attribute(node, "auto_pad", b"NOTSET").decode()
    rank = len(kernel)
    if mode == "NOTSET":
        pads = attribute(node, "pads", [0] * 2 * rank)
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * rank
    if node.op_type == "ConvTranspose":
        raise ModelError(f"'{node.name}': a ConvTranspose with auto_pad cannot be calibrated: exclude its weight")
    result = []
    for size, k, s, d in zip(space, kernel, stride, dilation, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return result


def padded(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    """``x`` [..., *space] with ``pads`` of its last dimensions."""
    return F.pad(x, [p for pair in reversed(pads) for p in pair], value=value) if any(map(any, pads)) else x


# ── operators ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _conv(node: NodeProto, x: Inputs) -> Tensor:
    data, weight, bias = (*x, None)[:3]
    rank = weight.dim() - 2
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    stride, dilation = attribute(node, "strides", [1] * rank), attribute(node, "dilations", [1] * rank)
    pads = window_pads(node, data.shape[2:], weight.shape[2:], stride, dilation)
    result: Tensor = function(padded(data, pads), weight, bias, stride, 0, dilation, attribute(node, "group", 1))
    return result


def _pool(node: NodeProto, x: Inputs) -> Tensor:
    kernel = attribute(node, "kernel_shape", [1])
    stride, dilation = (attribute(node, name, [1] * len(kernel)) for name in ("strides", "dilations"))
    pads = window_pads(node, x[0].shape[2:], kernel, stride, dilation)
    average = node.op_type == "AveragePool"
    if len(kernel) != 2 or len(node.output) > 1 or attribute(node, "ceil_mode", 0) or any(d != 1 for d in dilation):
        raise _NoMatch
    if not average:
        own = [low if low == high <= k // 2 else 0 for (low, high), k in zip(pads, kernel, strict=True)]  # as torch has it
        rest = [(low - inside, high - inside) for (low, high), inside in zip(pads, own, strict=True)]
        last = padded(x[0], rest, float("-inf")).movedim(1, -1).contiguous().movedim(-1, 1)  # channels last are faster
        return F.max_pool2d(last, kernel, stride, own)
    if any(map(any, pads)) and not attribute(node, "count_include_pad", 0):
        raise _NoMatch
    return F.avg_pool2d(padded(x[0], pads), kernel, stride)


def _resize(node: NodeProto, x: Inputs) -> Tensor:
    scales = x[2] if len(x) > 2 and x[2] is not None and x[2].numel() else None
    size = None if scales is not None else [int(s) for s in x[3][2:]]
    factor = None if scales is None else [float(s) for s in scales[2:]]
    mode = {b"nearest": "nearest", b"linear": "bilinear"}.get(attribute(node, "mode", b"nearest"))
    if mode is None or x[0].dim() != 4:
        raise _NoMatch
    return F.interpolate(x[0], size=size, scale_factor=factor, mode=mode)


def _gemm(node: NodeProto, x: Inputs) -> Tensor:
    a, b = x[0], x[1]
    a = a.T if attribute(node, "transA", 0) else a
    b = b.T if attribute(node, "transB", 0) else b
    product = attribute(node, "alpha", 1.0) * (a @ b)
    result: Tensor = product + attribute(node, "beta", 1.0) * x[2] if len(x) > 2 and x[2] is not None else product
    return result


def _reshape(node: NodeProto, x: Inputs) -> Tensor:
    if attribute(node, "allowzero", 0) and not bool(x[1].all()):
        raise _NoMatch
    shape = [x[0].shape[i] if s == 0 else int(s) for i, s in enumerate(x[1].tolist())]
    result: Tensor = x[0].reshape(shape)
    return result


def _gather(node: NodeProto, x: Inputs) -> Tensor:
    axis = attribute(node, "axis", 0) % x[0].dim()
    result: Tensor
    if not x[1].dim():
        result = x[0].select(axis, int(x[1]))  # a view
        return result
    picked = x[0].index_select(axis, x[1].reshape(-1).long() % x[0].shape[axis])
    result = picked.reshape(*x[0].shape[:axis], *x[1].shape, *x[0].shape[axis + 1 :])
    return result


def _pad(node: NodeProto, x: Inputs) -> Tensor:
    pads = x[1].tolist() if len(x) > 1 else attribute(node, "pads", [0])
    rank = len(pads) // 2
    if attribute(node, "mode", b"constant") != b"constant" or len(x) > 3 or len(pads) != 2 * x[0].dim():
        raise _NoMatch
    value = float(x[2]) if len(x) > 2 and x[2] is not None else 0.0
    return padded(x[0], [(int(pads[d]), int(pads[d + rank])) for d in range(rank)], value)


def _clip(node: NodeProto, x: Inputs) -> Tensor:
    low, high = (*x[1:], None, None)[:2]
    low, high = (attribute(node, name, given) for name, given in (("min", low), ("max", high)))  # attributes up to opset 10
    if low is None and high is None:
        raise _NoMatch
    result: Tensor = x[0].clamp(None if low is None else float(low), None if high is None else float(high))
    return result


def _batch_norm(node: NodeProto, x: Inputs) -> Tensor:
    return F.batch_norm(x[0], x[3], x[4], x[1], x[2], False, 0.0, attribute(node, "epsilon", 1e-5))


def _layer_norm(node: NodeProto, x: Inputs) -> Tensor:
    if len(node.output) > 1:
        raise _NoMatch
    axis = attribute(node, "axis", -1) % x[0].dim()
    return F.layer_norm(x[0], x[0].shape[axis:], x[1], (*x, None)[2], attribute(node, "epsilon", 1e-5))


def _split(node: NodeProto, x: Inputs) -> tuple[Tensor, ...]:
    axis = attribute(node, "axis", 0)
    sizes = x[1].tolist() if len(x) > 1 and x[1] is not None else attribute(node, "split", list[int]())
    parts: tuple[Tensor, ...] = x[0].split(sizes or -(-x[0].shape[axis] // len(node.output)), axis)
    return parts


def _axes(node: NodeProto, x: Inputs) -> list[int]:
    given = x[1].tolist() if len(x) > 1 and x[1] is not None else attribute(node, "axes", list[int]())
    return [int(axis) for axis in given]


def _mean(node: NodeProto, x: Inputs) -> Tensor:
    axes = _axes(node, x)
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        raise _NoMatch
    result: Tensor = x[0].mean(axes or list(range(x[0].dim())), keepdim=bool(attribute(node, "keepdims", 1)))
    return result


def _squeeze(node: NodeProto, x: Inputs) -> Tensor:
    axes = _axes(node, x)
    result: Tensor = x[0].squeeze(tuple(axes)) if axes else x[0].squeeze()
    return result


def _unsqueeze(node: NodeProto, x: Inputs) -> Tensor:
    result: Tensor = x[0]
    axes = _axes(node, x)
    for axis in sorted(axis % (x[0].dim() + len(axes)) for axis in axes):
        result = result.unsqueeze(axis)
    return result


def _slice(node: NodeProto, x: Inputs) -> Tensor:
    if len(x) < 3:
        raise _NoMatch
    starts, ends = x[1].tolist(), x[2].tolist()
    axes = x[3].tolist() if len(x) > 3 and x[3] is not None else list(range(len(starts)))
    steps = x[4].tolist() if len(x) > 4 and x[4] is not None else [1] * len(starts)
    if any(step < 1 for step in steps):
        raise _NoMatch
    places: list[Any] = [slice(None)] * x[0].dim()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        places[axis] = slice(start, end, step)
    result: Tensor = x[0][tuple(places)]
    return result


def _shape(node: NodeProto, x: Inputs) -> Tensor:
    return torch.tensor(x[0].shape[attribute(node, "start", 0) : attribute(node, "end", None)])


def _cast(node: NodeProto, x: Inputs) -> Tensor:
    to = DTYPES.get(attribute(node, "to", 0))
    if to is None:
        raise _NoMatch
    result: Tensor = x[0].to(torch.float32 if to in ("float16", "bfloat16") else getattr(torch, to))
    return result


def _gelu(node: NodeProto, x: Inputs) -> Tensor:
    return F.gelu(x[0], approximate=attribute(node, "approximate", b"none").decode())


OPERATORS: Mapping[str, Callable[[NodeProto, Inputs], Any]] = {
    "Add": lambda node, x: x[0] + x[1],
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda node, x: torch.cat(list(x), attribute(node, "axis", 0)),
    "Conv": _conv,
    "Div": lambda node, x: x[0] / x[1],
    "Dropout": lambda node, x: x[0],
    "Erf": lambda node, x: x[0].erf(),
    "Flatten": lambda node, x: x[0].reshape(prod(x[0].shape[: attribute(node, "axis", 1)]), -1),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node, x: x[0].mean(tuple(range(2, x[0].dim())), keepdim=True),
    "HardSigmoid": lambda node, x: (attribute(node, "alpha", 0.2) * x[0] + attribute(node, "beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda node, x: F.hardswish(x[0]),
    "Identity": lambda node, x: x[0],
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node, x: F.leaky_relu(x[0], attribute(node, "alpha", 0.01)),
    "MatMul": lambda node, x: x[0] @ x[1],
    "MaxPool": _pool,
    "Mul": lambda node, x: x[0] * x[1],
    "Pad": _pad,
    "Pow": lambda node, x: x[0].pow(x[1]),
    "ReduceMean": _mean,
    "Relu": lambda node, x: x[0].relu(),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": lambda node, x: x[0].sigmoid(),
    "Slice": _slice,
    "Softmax": lambda node, x: x[0].softmax(attribute(node, "axis", -1)),
    "Split": _split,
    "Sqrt": lambda node, x: x[0].sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda node, x: x[0] - x[1],
    "Tanh": lambda node, x: x[0].tanh(),
    "Transpose": lambda node, x: x[0].permute(attribute(node, "perm", list(range(x[0].dim()))[::-1])),
    "Unsqueeze": _unsqueeze,
    "Where": lambda node, x: torch.where(x[0], x[1], x[2]),
}
