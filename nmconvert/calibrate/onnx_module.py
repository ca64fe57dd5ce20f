"""A bare ONNX graph as a torch module: what `driver` prunes where there is no module for the weights.

Convolutions and products with constant weights become layers, batch norms become norms, and all other nodes are computed by
:mod:`nmconvert.calibrate.onnx_ops`; what follows from constants alone is computed once. The nodes are grouped into parts, as a
module has blocks: a part ends where a single value is all that goes on, but for those that go past many layers, and for what
no layer has made (masks, shapes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from onnx import ModelProto, NodeProto, TensorProto
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nmconvert.calibrate.onnx_ops import Operator, Runtime, constant_values, padded, window_pads
from nmconvert.onnx_graph import Constants, WeightUse, attribute, is_layer, layer_weights, reads, weight_uses

_LAYERS = 2  # of a part at least, so that there is something to reconstruct
_LONG = 8  # layers that a value skips which goes past parts: the arms of a U, the levels of a pyramid
_SETTINGS = ("Resize", "Pad", "Clip")  # their further inputs say how, and are no weights
_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Place:
    """Where a constant is in the module: the tensor ``name`` of its state, its dimensions permuted by ``order``."""

    name: str
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def back(self, tensor: Tensor) -> Tensor:
        """A value of the state as the constant has it."""
        return tensor.detach().permute(self.order).reshape(self.shape).contiguous()


@dataclass
class Step:
    """A node that is no layer, or the layer ``key`` of its part; ``outputs`` are the values that it makes.

    Of a layer ``x`` is the input, ``bias`` a value that is added to its channels, and ``left`` says that the weight is.
    """

    node: NodeProto
    outputs: list[str]
    operator: Operator | None = None
    key: str = ""
    x: str = ""
    bias: str = ""
    left: bool = False

    def reads(self) -> list[str]:
        """The values that it needs."""
        return list(reads(self.node)) if self.operator else [name for name in (self.x, self.bias) if name]


class Norm(_BatchNorm):
    """A batch norm for any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class _Cropping:
    """Mixed into a transposed convolution: the crops of the two ends may differ by any number."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """[B, I, *space] → [B, O, *space]."""
        rank = len(self.kernel_size)
        function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        full = function(x, self.weight, None, self.stride, 0, 0, self.groups, self.dilation)
        kept = padded(full, [(-low, more - low) for low, more in zip(self.padding, self.output_padding, strict=True)])
        return kept if self.bias is None else kept + self.bias.reshape(-1, *[1] * rank)


_TRANSPOSED: tuple[Any, ...] = tuple(
    type(f"Cropping{base.__name__}", (_Cropping, base), {})
    for base in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
)


class Part(nn.Module):
    """Some nodes of a graph, called with the values ``inputs``; returns the values ``outputs``."""

    def __init__(self, steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.steps, self.inputs, self.outputs = steps, inputs, outputs
        self.layers, self.weights = nn.ModuleDict(), nn.ParameterDict()
        self.names: dict[str, str] = {}  # constant → its key in `weights`
        self.constants: dict[str, Tensor] = {}

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """``values`` in the order of ``inputs``."""
        known: dict[str, Any] = {**self.constants, **{name: self.weights[key] for name, key in self.names.items()}}
        known.update(zip(self.inputs, values, strict=True))
        for step in self.steps:
            results = step.operator(known) if step.operator else [self._layer(step, known)]
            known.update(zip(step.outputs, results, strict=True))
        return tuple(known[name] for name in self.outputs)

    def _layer(self, step: Step, known: Mapping[str, Any]) -> Tensor:
        layer, x = self.layers[step.key], known[step.x]
        if isinstance(layer, nn.Linear):
            return _product(step, layer, x, known.get(step.bias))
        if isinstance(layer, _CONVOLUTIONS) and not any(layer.padding):
            x = padded(x, window_pads(step.node, x.shape[2:], layer.kernel_size, layer.stride, layer.dilation))
        result: Tensor = layer(x)
        return result + known[step.bias].reshape(-1, *[1] * (result.dim() - 2)) if step.bias else result


def _product(step: Step, layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    node = step.node
    x = x.mT if bool(attribute(node, "transB" if step.left else "transA", 0)) != (step.left and x.dim() > 1) else x
    y: Tensor = layer(x)
    y = y.mT if step.left and y.dim() > 1 else y
    y = attribute(node, "alpha", 1.0) * y if attribute(node, "alpha", 1.0) != 1.0 else y
    return y if bias is None else y + attribute(node, "beta", 1.0) * bias


class GraphModule(nn.Module):
    """Called with the graph's inputs in their order; returns the values ``outputs``, by default the graph's.

    Attributes:
        inputs: the names of the graph's inputs.
        places: where the graph's constants are, by name; those that are not here stay as they are.
    """

    def __init__(self, model: ModelProto, outputs: Sequence[str] = ()) -> None:
        super().__init__()
        reader = _Reader(model, outputs or [value.name for value in model.graph.output])
        self.inputs, self.outputs = reader.inputs, reader.outputs
        self.parts = nn.ModuleList(reader.parts())
        self.places, self.constants = reader.places, reader.constants
        self.requires_grad_(False)

    def forward(self, *args: Tensor) -> list[Tensor]:
        """The values that were asked for, in order."""
        known: dict[str, Any] = {**self.constants, **dict(zip(self.inputs, args, strict=True))}
        for part in self._parts():
            known.update(zip(part.outputs, part(*(known[name] for name in part.inputs)), strict=True))
        return [known[name] for name in self.outputs]

    def opaque(self) -> list[str]:
        """The operators that let no gradients through; known after a call."""
        steps = [step for part in self._parts() for step in part.steps]
        return sorted({step.node.op_type for step in steps if step.operator and step.operator.opaque})

    def _parts(self) -> list[Part]:
        return [part for part in self.parts if isinstance(part, Part)]


class _Reader:
    """What :class:`GraphModule` is made of."""

    def __init__(self, model: ModelProto, outputs: Sequence[str]) -> None:
        scope = Constants.of(model.graph)
        self.tensors = {name: tensor for name, tensor in scope.tensors.items() if tensor.data_type != TensorProto.STRING}
        self.constants = {name: constant_values(tensor) for name, tensor in self.tensors.items()}
        self.inputs = [value.name for value in model.graph.input if value.name not in self.constants]
        self.outputs = list(outputs)
        self.places: dict[str, Place] = {}
        self.runtime = Runtime(model)
        weights = layer_weights(model)
        uses = (use for use in weight_uses(model.graph, scope) if is_layer(use) and use.source.name in weights)
        self.uses = {id(use.node): use for use in uses}
        self.counts = Counter(name for node in model.graph.node for name in reads(node))
        self.counts.update(self.outputs)
        self._shared: dict[str, nn.Parameter] = {}
        self._fused: set[int] = set()
        self.steps = self._live([step for node in model.graph.node if (step := self._step(model, node))])

    # ------------------------------------------------------------------------------------------------------ steps

    def _step(self, model: ModelProto, node: NodeProto) -> Step | None:
        outputs = [name for name in node.output if name]
        if id(node) in self._fused or all(name in self.constants for name in outputs):
            return None
        needed = list(reads(node))
        if node.op_type == "Constant" or (needed and all(name in self.constants for name in needed)):
            values = self.runtime(node, {name: self.constants[name] for name in needed})
            self.constants.update(zip(outputs, values, strict=True))
            return None
        use = self.uses.get(id(node))
        if use is None and not self._is_norm(node):
            return Step(node, outputs, Operator(node, self.runtime))
        left = use is not None and use.position == 0
        step = Step(node, outputs, x=node.input[1 if left else 0], left=left)
        if use is not None:
            step.bias = node.input[2] if len(node.input) > 2 else ""
            if node.op_type == "MatMul" and not left:
                self._fuse(model, step, use)
        return step

    def _fuse(self, model: ModelProto, step: Step, use: WeightUse) -> None:
        """Take the bias of a product from the Add after it, where nothing else sees the two."""
        value = step.outputs[0]
        after = next((n for n in model.graph.node if value in n.input), None)
        if after is None or after.op_type != "Add" or self.counts[value] != 1:
            return
        bias = next((name for name in after.input if name != value), "")
        width = use.source.operator_shape[1]
        if bias in self.constants and tuple(self.constants[bias].shape) == (width,):
            step.bias, step.outputs = bias, list(after.output)
            self._fused.add(id(after))

    def _is_norm(self, node: NodeProto) -> bool:
        return (
            node.op_type == "BatchNormalization"
            and len([name for name in node.output if name]) == 1
            and all(name in self.tensors and self.counts[name] == 1 for name in node.input[1:])
        )

    def _live(self, steps: list[Step]) -> list[Step]:
        needed, kept = set(self.outputs), []
        for step in reversed(steps):
            if needed & set(step.outputs):
                kept.append(step)
                needed.update(step.reads())
        return kept[::-1]

    # ------------------------------------------------------------------------------------------------------ parts

    def parts(self) -> Iterator[Part]:
        """The steps, cut into parts, with their weights."""
        start = 0
        for number, stop in enumerate(self._cuts()):
            yield self._part(number, self.steps[start:stop], self.steps[stop:])
            start = stop

    def _cuts(self) -> list[int]:
        """After how many steps a part ends."""
        passing, layers = self._passing(), 0
        cuts: list[int] = []
        candidate, inside = 0, 0
        for place, step in enumerate(self.steps, 1):
            layers += id(step.node) in self.uses
            if passing[place] <= 1:
                candidate, inside = place, layers
            following = self.steps[place] if place < len(self.steps) else None
            if following and id(following.node) in self.uses and inside >= _LAYERS and candidate > (cuts[-1] if cuts else 0):
                cuts.append(candidate)
                layers, inside = layers - inside, 0
        return [*cuts, len(self.steps)]

    def _passing(self) -> list[int]:
        """How many values go on after each number of steps, those left out that skip many layers."""
        depth = [0]
        for step in self.steps:
            depth.append(depth[-1] + (id(step.node) in self.uses))
        count = [0] * (len(self.steps) + 1)
        for low, high in [*self._spans(depth), *self._ties()]:
            for place in range(low, high + 1):
                count[place] += 1
        return count

    def _spans(self, depth: Sequence[int]) -> Iterator[tuple[int, int]]:
        """From where each value is made to the last of its uses before a gap of many layers."""
        made: dict[str, int] = {}
        for place, step in enumerate(self.steps, 1):
            layered = step.operator is None or any(name in made for name in step.reads())
            if layered and step.node.op_type not in ("Shape", "Size"):
                made |= dict.fromkeys(step.outputs, place)
        uses: dict[str, list[int]] = {name: [] for name in made}
        for place, step in enumerate(self.steps):
            for name in step.reads():
                uses.get(name, []).append(place)
        for name in self.outputs:
            uses.get(name, []).append(len(self.steps))
        for name, first in made.items():
            last = first
            for place in uses[name]:
                if depth[place] - depth[last] > _LONG:
                    break
                last = place
            if uses[name]:
                yield first, last

    def _ties(self) -> Iterator[tuple[int, int]]:
        """From the first to the last layer that share a weight no part may end; counted twice, so that it cannot."""
        places: dict[str, list[int]] = {}
        for place, step in enumerate(self.steps):
            if (use := self.uses.get(id(step.node))) is not None:
                places.setdefault(use.source.name, []).append(place)
        for found in places.values():
            if len(found) > 1:
                yield from [(found[0] + 1, found[-1])] * 2

    def _part(self, number: int, steps: Sequence[Step], later: Sequence[Step]) -> Part:
        made = {name for step in steps for name in step.outputs}
        needed = list(dict.fromkeys(name for step in steps for name in step.reads()))
        wanted = {name for step in later for name in step.reads()} | set(self.outputs)
        inputs = [name for name in needed if name not in made and name not in self.constants and self._is_value(name)]
        part = Part(steps, inputs, sorted(made & wanted))
        for place, step in enumerate(steps):
            self._add(part, f"parts.{number}", f"{place}", step)
        part.constants = {name: self.constants[name] for name in needed if name in self.constants and name not in part.names}
        for step in steps:
            if step.operator and step.node.op_type not in _SETTINGS:
                self._fit(part, f"parts.{number}", step.node)
        return part

    def _is_value(self, name: str) -> bool:
        return name in self.inputs or any(name in step.outputs for step in self.steps)

    def _fit(self, part: Part, prefix: str, node: NodeProto) -> None:
        """Make the floating vectors and matrices that only ``node`` uses parameters."""
        for name in node.input:
            if name not in self.tensors or self.counts[name] != 1:
                continue
            tensor = self.constants[name]
            if tensor.is_floating_point() and tensor.dim():
                key = f"{len(part.names)}/{name.replace('.', '/')}"
                part.names[name], part.weights[key] = key, nn.Parameter(tensor)
                part.constants.pop(name, None)
                self._put(name, f"{prefix}.weights.{key}", tuple(range(tensor.dim())))

    def _put(self, name: str, state: str, order: tuple[int, ...]) -> None:
        self.places.setdefault(name, Place(state, order, tuple(self.constants[name].shape)))

    # ----------------------------------------------------------------------------------------------------- layers

    def _add(self, part: Part, prefix: str, number: str, step: Step) -> None:
        use = self.uses.get(id(step.node))
        if step.operator is not None:
            return
        name = use.source.name if use else step.node.input[1]
        step.key = f"{number}/{name.replace('.', '/')}"
        layer = self._weighted(step, use) if use else self._norm(step.node)
        part.layers[step.key] = layer.eval()
        where = f"{prefix}.layers.{step.key}"
        if use is None:
            for constant, leaf in zip(step.node.input[1:], ("weight", "bias", "running_mean", "running_var"), strict=True):
                self._put(constant, f"{where}.{leaf}", (0,))
            return
        order = use.source.transposed or tuple(range(len(use.source.shape)))
        flip = use.kind == "matmul"
        self._put(name, f"{where}.weight", tuple(order.index(d) for d in range(len(order)))[:: -1 if flip else 1])
        if layer.bias is not None:
            self._put(step.bias, f"{where}.bias", (0,))
            step.bias = ""

    def _norm(self, node: NodeProto) -> Norm:
        scale, bias, mean, variance = (self.constants[name] for name in node.input[1:])
        norm = Norm(len(scale), attribute(node, "epsilon", 1e-5)).to(scale.dtype)
        norm.load_state_dict({"weight": scale, "bias": bias, "running_mean": mean, "running_var": variance}, strict=False)
        return norm

    def _weighted(self, step: Step, use: WeightUse) -> Any:
        weight = self.constants[use.source.name].permute(use.source.transposed or tuple(range(len(use.source.shape))))
        weight = weight.T if use.kind == "matmul" else weight
        layer = _empty(step.node, use, weight)
        layer.weight = self._shared.setdefault(use.source.name, nn.Parameter(weight.contiguous()))
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if self._is_bias(step, width):
            layer.bias = nn.Parameter(self.constants[step.bias].reshape(width))
        return layer

    def _is_bias(self, step: Step, width: int) -> bool:
        """Whether what is added is one constant for each of ``width`` channels, which nothing else uses, as it is."""
        plain = all(attribute(step.node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if step.bias not in self.tensors or self.counts[step.bias] != 1 or not plain or step.left:
            return False
        return tuple(self.constants[step.bias].shape) in ((width,), (1, width))


def _empty(node: NodeProto, use: WeightUse, weight: Tensor) -> Any:
    """The layer of a node, without its values."""
    if use.kind in ("linear", "matmul"):
        return nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    rank = weight.dim() - 2
    kernel, ones = tuple(weight.shape[2:]), [1] * rank
    stride, dilation = tuple(attribute(node, "strides", ones)), tuple(attribute(node, "dilations", ones))
    if use.kind == "conv":
        channels = weight.shape[1] * use.groups, weight.shape[0]
        fixed = not attribute(node, "auto_pad", b"").startswith(b"SAME")
        pads = window_pads(node, (), kernel, stride, dilation) if fixed else []
        even = tuple(low for low, high in pads) if all(low == high for low, high in pads) else ()
        return _CONVOLUTIONS[rank - 1](*channels, kernel, stride, even or 0, dilation, use.groups, bias=False)
    pads = window_pads(node, (), kernel, stride, dilation)
    extra = attribute(node, "output_padding", [0] * rank)
    more = [low - high + e for (low, high), e in zip(pads, extra, strict=True)]
    channels = weight.shape[0], weight.shape[1] * use.groups
    low = tuple(low for low, _ in pads)
    return _TRANSPOSED[rank - 1](*channels, kernel, stride, low, more, use.groups, bias=False, dilation=dilation)
