"""Which dimensions of a model's parameters can be permuted together without changing what the model computes.

The graph of ``torch.export`` is walked once. Every dimension of every value is an element of a union-find: an operator that
carries a dimension on joins it with the one it becomes (a ReLU, a sum, a convolution's output channels with the rows of its
weight), an operator that needs its order (padding, slicing, concatenation, pooling, the model's inputs and outputs, and
**every operator that is not listed here**) freezes it. A class that is not frozen is the proof: each operator on the way
commutes with one permutation of all its members.

A reshape [.., H·D, ..] → [.., H, D, ..] (attention heads) keeps D in the class of H·D, as blocks: permutations then stay
within each block, provided that nothing reads H apart from carrying it along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from nmconvert.calibrate.replay import Batch, as_call
from nmconvert.errors import ModelError

Axis = tuple[str, int]
"""A value (by its node's name) and one of its dimensions."""


@dataclass(frozen=True)
class Channels:
    """A class of dimensions: ``members`` are (parameter or buffer, dimension), each of ``size`` entries.

    ``block`` is the size of the blocks that permutations have to stay in; ``frozen`` the operator that forbids any.
    """

    members: tuple[tuple[str, int], ...]
    size: int
    block: int
    frozen: str | None


def find_channels(model: nn.Module, batch: Batch) -> list[Channels]:
    """The classes of all parameter dimensions of ``model``, exported with ``batch`` as its example.

    Raises:
        ModelError: ``torch.export`` cannot trace the model.
    """
    call = as_call(batch)
    try:
        program = torch.export.export(model.eval(), call.args, call.kwargs)
    except Exception as error:  # it runs the model's own code, which can raise anything
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"torch.export cannot trace the model, so that nothing is permuted: {reason}") from error
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    walk = _Walk()
    for node in program.graph.nodes:
        walk.visit(node, stored)
    return walk.classes(stored)


@dataclass
class _Walk:
    parent: dict[Axis, Axis] = field(default_factory=dict)
    sizes: dict[Axis, int] = field(default_factory=dict)
    frozen: dict[Axis, str] = field(default_factory=dict)
    blocks: list[tuple[Axis, Axis]] = field(default_factory=list)  # (outer H, inner D) of every split and merge
    cut: set[Axis] = field(default_factory=set)  # dimensions that were reduced, broadcast or picked from

    # ------------------------------------------------------------------------------------------------ union-find

    def root(self, axis: Axis) -> Axis:
        while (above := self.parent.get(axis, axis)) != axis:
            axis = above
        return axis

    def join(self, first: Axis, *others: Axis) -> None:
        for other in others:
            self.parent[self.root(other)] = self.root(first)

    def freeze(self, reason: str, *axes: Axis) -> None:
        for axis in axes:
            self.frozen.setdefault(axis, reason)

    # --------------------------------------------------------------------------------------------------- walking

    def visit(self, node: Node, stored: dict[str, str]) -> None:
        for dim, size in enumerate(_shape(node)):
            self.sizes[node.name, dim] = size
        if node.op == "placeholder":
            if node.name not in stored:
                self.freeze("the model's input", *_axes(node))
            return
        operator = str(node.target).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else node.op
        rule = RULES.get(operator)
        if rule is None:
            what = "the model's output" if node.op == "output" else operator
            self.freeze(what, *_axes(node), *(axis for source in node.all_input_nodes for axis in _axes(source)))
        else:
            rule(self, node, operator)

    def same(self, node: Node, source: Node, but: Sequence[int] = ()) -> None:
        """Dimension by dimension, aligned at the right, as operators broadcast; ``but`` are left out."""
        shift = len(_shape(node)) - len(_shape(source))
        for dim, size in enumerate(_shape(source)):
            if dim + shift in but:
                continue
            if size == _shape(node)[dim + shift]:
                self.join((node.name, dim + shift), (source.name, dim))
            else:
                self.cut.add((node.name, dim + shift))
        for dim in range(shift):
            self.cut.add((node.name, dim))

    # --------------------------------------------------------------------------------------------------- results

    def classes(self, stored: dict[str, str]) -> list[Channels]:
        groups: dict[Axis, list[Axis]] = {}
        for axis in self.sizes:
            groups.setdefault(self.root(axis), []).append(axis)
        frozen: dict[Axis, str] = {}
        for axis, reason in self.frozen.items():
            frozen.setdefault(self.root(axis), reason)
        outer: dict[Axis, set[Axis]] = {}
        for head, inner in self.blocks:
            outer.setdefault(self.root(inner), set()).add(self.root(head))
        cut = {self.root(axis) for axis in self.cut}
        found = []
        for root, axes in groups.items():
            members = tuple((stored[name], dim) for name, dim in axes if name in stored)
            if members:
                sizes = {self.sizes[axis] for axis in axes}
                whole = {self.sizes[axis] for axis in axes if axis[0] in stored}
                heads = outer.get(root, set())
                why = frozen.get(root) or _conflict(sizes, whole, heads, cut)
                found.append(Channels(members, max(whole), min(sizes), why))
        return found


def _conflict(sizes: set[int], whole: set[int], heads: set[Axis], cut: set[Axis]) -> str | None:
    if len(whole) > 1:
        return "parameters that are shared by the blocks of a reshape"
    if max(sizes) != max(whole) or len(sizes) > 2:
        return "reshapes into blocks of different sizes"
    if len(sizes) == 2 and (len(heads) != 1 or heads & cut):
        return "blocks of a reshape that are not carried through as they are"
    return None


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _axes(node: Node) -> list[Axis]:
    return [(node.name, dim) for dim in range(len(_shape(node)))]


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


# ── one rule for each kind of operator ────────────────────────────────────────────────────────────────────────────────


def _pointwise(walk: _Walk, node: Node, operator: str) -> None:
    for source in node.all_input_nodes:
        walk.same(node, source)


def _matrix_product(walk: _Walk, node: Node, operator: str) -> None:
    a, b = node.args[:2]
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    if len(_shape(a)) < 2 or len(_shape(b)) < 2:
        walk.freeze(operator, *_axes(a), *_axes(b), *_axes(node))
        return
    rank = len(_shape(node))
    walk.same(node, a, [rank - 1])
    walk.same(node, b, [rank - 2])
    walk.join((a.name, len(_shape(a)) - 1), (b.name, len(_shape(b)) - 2))


def _linear(walk: _Walk, node: Node, operator: str) -> None:
    x, weight, bias = _operands(node)
    last = len(_shape(node)) - 1
    walk.same(node, x, [last])
    walk.join((x.name, len(_shape(x)) - 1), (weight.name, 1))
    walk.join((node.name, last), (weight.name, 0), *([(bias.name, 0)] if bias is not None else []))


def _operands(node: Node) -> tuple[Node, Node, Node | None]:
    x, weight = _argument(node, 0, "input"), _argument(node, 1, "weight")
    return x, weight, _argument(node, 2, "bias")


def _convolution(walk: _Walk, node: Node, operator: str) -> None:
    x, weight, bias = _operands(node)
    transposed = "transpose" in operator
    groups = _argument(node, 6, "groups", 1)
    channels = len(_shape(node)) - len(_shape(weight)) + 1
    inputs, outputs = (x.name, channels), (node.name, channels)
    walk.freeze("a convolution over it", *[a for v in (x, node) for a in _axes(v) if a[1] > channels])
    walk.freeze("a kernel's window", *_axes(weight)[2:])
    if bias is not None:
        walk.join(outputs, (bias.name, 0))
    if channels:
        walk.join((x.name, 0), (node.name, 0))
    if groups == 1:
        walk.join(inputs, (weight.name, 0 if transposed else 1))
        walk.join(outputs, (weight.name, 1 if transposed else 0))
    elif groups == _shape(x)[channels] == _shape(node)[channels]:
        walk.join(inputs, outputs, (weight.name, 0))
        walk.freeze("a group of one channel", (weight.name, 1))
    else:
        walk.freeze("a grouped convolution", inputs, outputs, (weight.name, 0), (weight.name, 1))


def _norm(walk: _Walk, node: Node, operator: str) -> None:
    x = node.all_input_nodes[0]
    walk.same(node, x)
    dim = 1 if operator == "batch_norm" else len(_shape(node)) - 1
    for parameter in node.all_input_nodes[1:]:
        if len(_shape(parameter)) == 1:
            walk.join((node.name, dim), (parameter.name, 0))
        else:
            walk.freeze(operator, *_axes(parameter), *_axes(node))


def _embedding(walk: _Walk, node: Node, operator: str) -> None:
    weight, index = node.args[:2]
    assert isinstance(weight, Node)
    assert isinstance(index, Node)
    walk.freeze("an embedding's index", (weight.name, 0))
    walk.join((node.name, len(_shape(node)) - 1), (weight.name, 1))
    for dim in range(len(_shape(index))):
        walk.join((node.name, dim), (index.name, dim))


def _attention(walk: _Walk, node: Node, operator: str) -> None:
    query, key, value = node.args[:3]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    rank = len(_shape(node))
    for source in (query, key, value):
        if len(_shape(source)) != rank or _shape(source)[: rank - 2] != _shape(node)[: rank - 2]:
            walk.freeze("attention with shared heads", *_axes(source), *_axes(node))
            return
        walk.same(node, source, [rank - 2, rank - 1])
        walk.freeze("a sequence", (source.name, rank - 2))
    walk.freeze("a sequence", (node.name, rank - 2))
    walk.join((query.name, rank - 1), (key.name, rank - 1))
    walk.join((node.name, rank - 1), (value.name, rank - 1))
    for mask in node.all_input_nodes[3:]:
        walk.freeze("an attention mask", *_axes(mask))


def _windowed(walk: _Walk, node: Node, operator: str) -> None:
    """Pooling and resizing: batch and channels are carried on, space is not."""
    x = node.all_input_nodes[0]
    walk.same(node, x, range(2, len(_shape(node))))
    walk.freeze(operator, *[a for v in (x, node) for a in _axes(v) if a[1] > 1])


def _reduction(walk: _Walk, node: Node, operator: str) -> None:
    x = node.all_input_nodes[0]
    rank = len(_shape(x))
    dims = _argument(node, 1, "dim")
    dims = range(rank) if dims is None else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    kept = iter([a for a in _axes(node) if len(_shape(node)) != rank or a[1] not in dims])
    for dim in range(rank):
        if dim in dims:
            walk.cut.add((x.name, dim))
        else:
            walk.join((x.name, dim), next(kept))


def _along(walk: _Walk, node: Node, operator: str) -> None:
    """Slices, picks and concatenations along one dimension: that one keeps its order."""
    rank = len(_shape(node.all_input_nodes[0]))
    default = 0 if operator in ("cat", "slice", "select") else -1
    dim = int(_argument(node, 1, "dim", default)) % rank
    gone = operator == "select"
    for source in node.all_input_nodes:
        walk.freeze(operator, (source.name, dim))
        walk.cut.add((source.name, dim))
        for other in range(rank):
            if other != dim:
                walk.join((source.name, other), (node.name, other - (gone and other > dim)))
    if not gone:
        walk.freeze(operator, (node.name, dim))


def _padding(walk: _Walk, node: Node, operator: str) -> None:
    x, widths = node.all_input_nodes[0], _argument(node, 1, "pad")
    rank = len(_shape(x))
    changed = [rank - 1 - i // 2 for i, width in enumerate(widths) if width != 0]
    walk.same(node, x, changed)
    walk.freeze("padding", *[(v.name, dim) for v in (x, node) for dim in changed])


def _reordered(walk: _Walk, node: Node, operator: str) -> None:
    """Transposes and single dimensions that come or go: the other dimensions follow in their order."""
    x = node.all_input_nodes[0]
    rank = len(_shape(x))
    order = list(range(rank))
    if operator == "permute":
        order = [d % rank for d in _argument(node, 1, "dims")]
    elif operator == "transpose":
        a, b = _argument(node, 1, "dim0") % rank, _argument(node, 2, "dim1") % rank
        order[a], order[b] = order[b], order[a]
    elif operator == "t":
        order.reverse()
    for dim, source in enumerate(order):
        walk.join((node.name, dim), (x.name, source))


def _reshaped(walk: _Walk, node: Node, operator: str) -> None:
    x = node.all_input_nodes[0]
    for sources, targets in _factors(_shape(x), _shape(node)):
        a, b = [(x.name, d) for d in sources], [(node.name, d) for d in targets]
        if len(a) == len(b) == 1:
            walk.join(a[0], b[0])
        elif sorted((len(a), len(b))) == [1, 2]:
            whole, (head, inner) = (a[0], b) if len(a) == 1 else (b[0], a)
            walk.join(whole, inner)
            walk.blocks.append((head, inner))
            walk.freeze("the blocks of a reshape", head)
        else:
            walk.freeze("a reshape", *a, *b)


def _factors(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions (those of size 1 left out) that a reshape turns into one another."""
    left = [d for d, size in enumerate(before) if size != 1]
    right = [d for d, size in enumerate(after) if size != 1]
    runs = []
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (one := prod(before[d] for d in a)) != (two := prod(after[d] for d in b)):
            if one < two:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        runs.append((a, b))
    return runs


Rule = Callable[[_Walk, Node, str], None]


def _rules() -> dict[str, Rule]:
    table: list[tuple[Rule, str]] = [
        (
            _pointwise,
            "relu relu_ relu6 gelu silu silu_ sigmoid tanh hardswish hardswish_ hardsigmoid hardtanh hardtanh_ leaky_relu "
            "leaky_relu_ elu mish softplus exp sqrt rsqrt pow abs neg clamp add add_ sub mul mul_ div dropout dropout_ "
            "contiguous clone to _to_copy detach detach_ alias softmax erf",
        ),
        (_matrix_product, "matmul bmm mm"),
        (_linear, "linear"),
        (_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
        (_norm, "batch_norm layer_norm rms_norm"),
        (_embedding, "embedding"),
        (_attention, "scaled_dot_product_attention"),
        (_windowed, "max_pool2d avg_pool2d adaptive_avg_pool2d max_pool1d avg_pool1d adaptive_avg_pool1d upsample_nearest2d"),
        (_reduction, "mean sum amax"),
        (_along, "cat slice select"),
        (_padding, "pad constant_pad_nd"),
        (_reordered, "permute transpose t"),
        (_reshaped, "view reshape flatten unflatten squeeze unsqueeze _unsafe_view"),
    ]
    return {name: rule for rule, names in table for name in names.split()}


RULES = _rules()
