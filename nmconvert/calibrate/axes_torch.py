"""The channels of a module: what each operator of its graph from ``torch.export`` does to its values' dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from nmconvert.calibrate.atoms import Proof
from nmconvert.calibrate.axes import Value, Walk
from nmconvert.calibrate.replay import Batch, as_call
from nmconvert.errors import ModelError, one_line

Result = Value | tuple[Value, ...]
_CHOOSING = ("topk", "sort", "argsort", "argmax", "argmin", "nonzero", "max", "min", "cond", "torchvision")  # torchvision: nms


def exported(model: nn.Module, batch: Batch) -> ExportedProgram:
    """The graph of ``model``, in evaluation mode, with ``batch`` as its example.

    Raises:
        ModelError: ``torch.export`` cannot trace the model.
    """
    call = as_call(batch)
    try:
        return torch.export.export(model.eval(), call.args, call.kwargs)
    except Exception as error:  # it runs the model's own code, which can raise anything
        reason = one_line(error, 120)
        raise ModelError(f"torch.export cannot trace the model, so that nothing is permuted: {reason}") from error


def chooses(program: ExportedProgram) -> bool:
    """Whether the outputs may jump where the values before them change a little."""
    return any(_operator(node) in _CHOOSING for node in program.graph.nodes)


def find_channels(program: ExportedProgram) -> Proof:
    """Which channels of the program's parameters and buffers may change places."""
    signature, own = program.graph_signature, _own_names(program.state_dict)
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    graph = _Graph({placeholder: own.get(name, name) for placeholder, name in stored.items()})
    for node in program.graph.nodes:
        graph.visit(node)
    return graph.walk.proof()


def _own_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The first name of each tensor by each of its names: modules that share a weight have one each."""
    first: dict[tuple[Any, ...], str] = {}
    places = {name: (t.data_ptr(), t.shape, t.stride()) if t.numel() else (name,) for name, t in state.items()}
    return {name: first.setdefault(place, name) for name, place in places.items()}


class _Graph:
    """A walk over the nodes of a graph; ``stored`` are the names of parameters and buffers by placeholder."""

    def __init__(self, stored: dict[str, str]) -> None:
        self.walk = Walk()
        self.stored = stored
        self.values: dict[Node, Result] = {}

    def visit(self, node: Node) -> None:
        """Take in one node."""
        if node.op == "placeholder":
            shape = _shapes(node)[0]
            name = self.stored.get(node.name)
            known = self.walk.parameter(name, shape) if name is not None else self.walk.fresh(shape, "the model's input")
            self.values[node] = known
            return
        operator = _operator(node)
        rule = RULES.get(operator)
        result = None
        routed = any(not isinstance(size, int) for n in [node, *node.all_input_nodes] for shape in _shapes(n) for size in shape)
        if rule is not None and _shapes(node) and not routed:
            result = rule(self, node, operator)
        if result is None:
            what = "the model's output" if node.op == "output" else operator
            what = f"{what} of a size that the data decides" if routed else what
            for source in node.all_input_nodes:
                self.walk.freeze(what, *self.all(source))
            shapes = [tuple(size if isinstance(size, int) else 1 for size in shape) for shape in _shapes(node)]
            new = tuple(self.walk.fresh(shape, what) for shape in shapes)
            result = new[0] if len(new) == 1 else new
        self.values[node] = result

    def all(self, node: Node) -> tuple[Value, ...]:
        """The values of a node."""
        found = self.values[node]
        return found if isinstance(found, tuple) else (found,)

    def value(self, node: Any) -> Value | None:
        """The value of an argument, if it is one tensor."""
        found = self.values.get(node) if isinstance(node, Node) else None
        return found if isinstance(found, Value) else None

    def first(self, node: Node) -> Value:
        """The value of the first tensor that a node takes."""
        return self.all(node.all_input_nodes[0])[0]


def _operator(node: Node) -> str:
    """The name of torch's own operators, without their overload; the library's of others."""
    if getattr(node.target, "__name__", "") == "getitem":
        return "getitem"
    return str(node.target).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else node.op


def _shapes(node: Node) -> list[tuple[int, ...]]:
    """Of the tensors that a node gives; none for what is no tensor."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return [tuple(v.shape) for v in values if isinstance(v, torch.Tensor)]


def _shape(node: Node) -> tuple[int, ...]:
    return _shapes(node)[0]


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _dims(given: Any, rank: int) -> list[int]:
    """The dimensions of an argument; None or nothing is all."""
    chosen = [given] if isinstance(given, int) else list(given or range(rank))
    return [dim % rank for dim in chosen]


# ── one rule for each kind of operator; None: it is not understood, and freezes what it touches ───────────────────────


def _pointwise(graph: _Graph, node: Node, operator: str) -> Result:
    values = [value for source in node.all_input_nodes for value in graph.all(source)]
    return graph.walk.pointwise(_shape(node), values)


def _softmax(graph: _Graph, node: Node, operator: str) -> Result:
    x = graph.first(node)
    return graph.walk.apart(x, _dims(_argument(node, 1, "dim"), x.rank))


def _matrix_product(graph: _Graph, node: Node, operator: str) -> Result | None:
    a, b = (graph.value(argument) for argument in node.args[-2:])
    if a is None or b is None or a.rank < 2 or b.rank < 2:
        return None
    product = graph.walk.product(_shape(node), a, b)
    bias = graph.value(node.args[0]) if operator == "addmm" else None
    return product if bias is None else graph.walk.pointwise(_shape(node), [product, bias])


def _linear(graph: _Graph, node: Node, operator: str) -> Result | None:
    x, weight, bias = _operands(graph, node)
    return None if x is None or weight is None or weight.rank < 2 else graph.walk.linear(x, weight, bias)


def _operands(graph: _Graph, node: Node) -> tuple[Value | None, Value | None, Value | None]:
    x, weight, bias = (graph.value(_argument(node, place, name)) for place, name in enumerate(("input", "weight", "bias")))
    return x, weight, bias


def _convolution(graph: _Graph, node: Node, operator: str) -> Result | None:
    x, weight, bias = _operands(graph, node)
    if x is None or weight is None:
        return None
    transposed = "transpose" in operator
    groups = _argument(node, 6, "groups", 1)
    return graph.walk.convolution(_shape(node), x, weight, bias, groups, transposed=transposed)


def _batch_norm(graph: _Graph, node: Node, operator: str) -> Result:
    first, *others = (graph.all(source)[0] for source in node.all_input_nodes)
    return graph.walk.normalized(first, [], others, 1)


def _layer_norm(graph: _Graph, node: Node, operator: str) -> Result:
    first, *others = (graph.all(source)[0] for source in node.all_input_nodes)
    over = first.rank - len(_argument(node, 1, "normalized_shape"))
    return graph.walk.normalized(first, range(over, first.rank), others, over)


def _group_norm(graph: _Graph, node: Node, operator: str) -> Result:
    first, *others = (graph.all(source)[0] for source in node.all_input_nodes)
    graph.walk.grouped(first, _argument(node, 1, "num_groups"))
    return graph.walk.normalized(first, range(2, first.rank), others, 1)


def _embedding(graph: _Graph, node: Node, operator: str) -> Result | None:
    table, index = (graph.value(argument) for argument in node.args[:2])
    return None if table is None or index is None else graph.walk.embedding(_shape(node), table, index)


def _attention(graph: _Graph, node: Node, operator: str) -> Result | None:
    """Scores, their softmax, and the sum of the values that they weigh."""
    query, key, value = (graph.value(argument) for argument in node.args[:3])
    if query is None or key is None or value is None or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return None
    walk, rank = graph.walk, query.rank
    given = _argument(node, 3, "attn_mask")  # not the fourth input: query, key and value may be one node
    masks = [] if given is None else list(graph.all(given))
    if _argument(node, 5, "is_causal", False):
        for tokens in (query, key):
            walk.freeze_dims("a causal mask", tokens, [rank - 2])
    turned = walk.transposed(key, [*range(rank - 2), rank - 1, rank - 2])
    scores = walk.product((*query.shape[:-1], key.shape[-2]), query, turned)
    scores = walk.apart(walk.pointwise(scores.shape, [scores, *masks]), [rank - 1])
    return walk.product(_shape(node), scores, value)


def _windowed(graph: _Graph, node: Node, operator: str) -> Result:
    x, space = graph.first(node), next(int(letter) for letter in operator if letter.isdigit())
    return graph.walk.windowed(x, _shape(node), operator, x.rank - space)


def _reduction(graph: _Graph, node: Node, operator: str) -> Result:
    x = graph.first(node)
    given = _argument(node, 1, "dim")
    return graph.walk.reduced(x, _dims(given, x.rank), keep=len(_shape(node)) == x.rank)


def _concatenation(graph: _Graph, node: Node, operator: str) -> Result:
    sources: Any = node.args[0]
    values = [value for source in sources for value in graph.all(source)]
    return graph.walk.joined(values, _argument(node, 1, "dim", 0) % values[0].rank)


def _slice(graph: _Graph, node: Node, operator: str) -> Result:
    x = graph.first(node)
    dim = _argument(node, 1, "dim", 0) % x.rank
    start, end, step = (_argument(node, place, name) for place, name in ((2, "start"), (3, "end"), (4, "step")))
    return graph.walk.taken(x, dim, np.arange(x.shape[dim])[slice(start, end, step)])


def _select(graph: _Graph, node: Node, operator: str) -> Result:
    x = graph.first(node)
    dim = _argument(node, 1, "dim") % x.rank
    return graph.walk.picked(x, dim, _argument(node, 2, "index") % x.shape[dim])


def _split(graph: _Graph, node: Node, operator: str) -> Result:
    """Into parts of the shapes that the node has."""
    x = graph.first(node)
    dim = _argument(node, 2, "dim", 0) % x.rank
    ends = np.cumsum([shape[dim] for shape in _shapes(node)])
    return tuple(graph.walk.taken(x, dim, part) for part in np.split(np.arange(x.shape[dim]), ends[:-1]))


def _unbind(graph: _Graph, node: Node, operator: str) -> Result:
    x = graph.first(node)
    dim = _argument(node, 1, "dim", 0) % x.rank
    return tuple(graph.walk.picked(x, dim, place) for place in range(x.shape[dim]))


def _getitem(graph: _Graph, node: Node, operator: str) -> Result:
    place: int = _argument(node, 1, "index")
    return graph.all(node.all_input_nodes[0])[place]


def _padding(graph: _Graph, node: Node, operator: str) -> Result | None:
    x, widths = graph.first(node), _argument(node, 1, "pad")
    if (operator == "pad" and _argument(node, 2, "mode", "constant") != "constant") or min(widths) < 0:
        return None
    for place in range(len(widths) // 2):
        x = graph.walk.padded(x, x.rank - 1 - place, widths[2 * place], widths[2 * place + 1])
    return x


def _permute(graph: _Graph, node: Node, operator: str) -> Result:
    x = graph.first(node)
    return graph.walk.transposed(x, _dims(_argument(node, 1, "dims"), x.rank))


def _transpose(graph: _Graph, node: Node, operator: str) -> Result:
    x = graph.first(node)
    order = list(range(x.rank))
    a, b = (0, 1) if operator == "t" else (_argument(node, 1, "dim0") % x.rank, _argument(node, 2, "dim1") % x.rank)
    if x.rank > 1:
        order[a], order[b] = order[b], order[a]
    return graph.walk.transposed(x, order)


def _reshaped(graph: _Graph, node: Node, operator: str) -> Result:
    return graph.walk.reshaped(graph.first(node), _shape(node))


Rule = Callable[[_Graph, Node, str], Result | None]


def _rules() -> dict[str, Rule]:
    table: Sequence[tuple[Rule, str]] = [
        (
            _pointwise,
            "relu relu_ relu6 gelu silu silu_ sigmoid tanh hardswish hardswish_ hardsigmoid hardtanh hardtanh_ leaky_relu "
            "leaky_relu_ elu mish softplus exp log sqrt rsqrt reciprocal pow abs neg clamp add add_ sub mul mul_ div dropout "
            "dropout_ contiguous clone to _to_copy detach detach_ alias erf expand where masked_fill eq ne lt le gt ge "
            "logical_and logical_or logical_not",
        ),
        (_softmax, "softmax _softmax log_softmax"),
        (_matrix_product, "matmul bmm mm addmm"),
        (_linear, "linear"),
        (_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
        (_batch_norm, "batch_norm"),
        (_layer_norm, "layer_norm rms_norm"),
        (_group_norm, "group_norm"),
        (_embedding, "embedding"),
        (_attention, "scaled_dot_product_attention"),
        (
            _windowed,
            "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
            "adaptive_avg_pool3d upsample_nearest2d upsample_bilinear2d",
        ),
        (_reduction, "mean sum amax amin"),
        (_concatenation, "cat"),
        (_slice, "slice"),
        (_select, "select"),
        (_split, "split split_with_sizes chunk"),
        (_unbind, "unbind"),
        (_getitem, "getitem"),
        (_padding, "pad constant_pad_nd"),
        (_permute, "permute"),
        (_transpose, "transpose t"),
        (_reshaped, "view reshape flatten unflatten squeeze unsqueeze _unsafe_view"),
    ]
    return {name: rule for rule, names in table for name in names.split()}


RULES = _rules()
