"""Which layers of a model run on the kernels, and which are left to the dense bodies of their functions.

Dense is faster for some shapes (small layers, few pixels, mild patterns on CPUs with wide vectors). Each distinct layer, at the
shape that it meets in a run, is timed both ways in interleaved rounds, and the sparse kernel is taken where it is at least
``MARGIN`` times faster. A layer is left dense by unpacking its weight here and calling what its function does with the weight
(:func:`leave_dense`): onnxruntime would get to the same graph by folding, in several times the time and memory. Results are
kept for each CPU model (:mod:`nmconvert.runtime.cache`), but for those of rounds that other programs disturbed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nmconvert.inputs import InputSpec, example_array, example_feed
from nmconvert.onnx_graph import (
    DENSE,
    DOMAIN,
    SCALED,
    VALUES_SUFFIX,
    Constants,
    graphs,
    opset,
    packed_inputs,
    used_names,
    value_names,
)
from nmconvert.packing import unpack
from nmconvert.runtime.cache import Cache

Feed = Mapping[str, npt.NDArray[Any]]

MARGIN = 1.05
NOISY = 0.2  # a spread of the rounds' ratios
_SECONDS = 0.03  # for each way of running a layer
_OTHERS = ("B", "Z")  # inputs of a function beside X and its weight
_LEFT_ALONE = ("SparseConvTranspose", "SparseMatMulLeft", "SparseGemmLeft")  # functions that have no kernel


@dataclass(frozen=True)
class Met:
    """A call, and the shapes of its inputs in a run."""

    node: NodeProto
    scope: Constants
    shapes: tuple[tuple[int, ...], ...]

    @property
    def key(self) -> str:
        """What its speed depends on, as text."""
        skipped = ("permuted", "perm", "code_shape")  # how it is stored
        attributes = {a.name: _readable(helper.get_attribute_value(a)) for a in self.node.attribute if a.name not in skipped}
        shapes = [list(shape) for shape in (self.shapes[0], *self.shapes[1 + len(packed_inputs(self.node)) :])]
        return json.dumps([self.node.op_type, shapes, attributes], sort_keys=True)


def _readable(value: Any) -> Any:
    """An attribute's value as JSON has it."""
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, (int, float)) else list(value)


def calls(model: ModelProto) -> list[tuple[NodeProto, Constants]]:
    """The calls of ``model`` that have kernels."""
    return [
        (node, scope)
        for graph, scope in graphs(model)
        for node in graph.node
        if node.domain == DOMAIN and node.op_type.removeprefix(SCALED) not in _LEFT_ALONE and not node.op_type.endswith(DENSE)
    ]


def met_shapes(model: bytes, threads: int, library: Path, feed: Feed) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Name of a node → shapes of its inputs, from the profile of one run of ``model`` on the kernels of ``library``."""
    with TemporaryDirectory(prefix="nmconvert-") as folder:
        session = open_session(model, threads, library, profile=Path(folder) / "profile")
        session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return {
        event["name"].removesuffix("_kernel_time"): tuple(
            tuple(next(iter(described.values()))) for described in event["args"].get("input_type_shape", [])
        )
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }


def open_session(
    model: str | bytes, threads: int, library: Path | None = None, *, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session on the CPU, with the kernels of ``library``; its profile goes to a file whose name begins with ``profile``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads of one would spin through the other's turn
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def single(model: ModelProto, met: Met) -> ModelProto:
    """A model of nothing but the call: X (and Z) are inputs, all else constant."""
    node, scope = met.node, met.scope
    constants = [scope.tensors[name] for name in dict.fromkeys(node.input) if name in scope.tensors]
    held = {tensor.name for tensor in constants}
    kind = next(a.i for a in node.attribute if a.name == "compute")
    inputs = {
        name: helper.make_tensor_value_info(name, kind, shape)
        for name, shape in zip(node.input, met.shapes, strict=False)
        if name and name not in held
    }
    rank = len(met.shapes[0])
    output = helper.make_tensor_value_info(node.output[0], kind, [f"d{d}" for d in range(rank)])
    graph = helper.make_graph([node], "layer", list(inputs.values()), [output], constants)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset(model)), helper.make_opsetid(DOMAIN, 1)],
        functions=[function for function in model.functions if function.name == node.op_type],
        ir_version=model.ir_version,
    )


@dataclass(frozen=True)
class Times:
    """Seconds of every round, dense and sparse."""

    dense: tuple[float, ...]
    sparse: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios, dense ÷ sparse."""
        return median(d / s for d, s in zip(self.dense, self.sparse, strict=True))

    @property
    def best(self) -> float:
        """Shortest against shortest: what neighbours on the machine disturb least."""
        return min(self.dense) / min(self.sparse)

    @property
    def spread(self) -> float:
        """Interquartile range of the ratios over their median."""
        low, middle, high = np.percentile([d / s for d, s in zip(self.dense, self.sparse, strict=True)], [25, 50, 75])
        return float((high - low) / middle)

    @property
    def noisy(self) -> bool:
        """Whether the rounds differ too much for their median to say anything."""
        return self.spread > NOISY


def race(
    dense: onnxruntime.InferenceSession,
    sparse: onnxruntime.InferenceSession,
    feed: Feed,
    seconds: float = _SECONDS,
    rounds: int = 7,
) -> Times:
    """Run both in turn, ``rounds`` times and for about ``seconds`` each, after two runs to warm up."""
    inputs = dict(feed)
    for session in (dense, sparse):
        session.run(None, inputs)
    start = time.perf_counter()
    for session in (dense, sparse):
        session.run(None, inputs)
    once = max((time.perf_counter() - start) / 2, 1e-7)
    repeats = max(1, int(seconds / rounds / once))
    total: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for session, record in zip((dense, sparse), total, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                session.run(None, inputs)
            record.append((time.perf_counter() - start) / repeats)
    return Times(tuple(total[0]), tuple(total[1]))


def time_layer(model: ModelProto, met: Met, library: Path, threads: int) -> Times:
    """Time one layer both ways, on random inputs of the shapes that it met."""
    proto = single(model, met)
    dense = open_session(with_dense(proto, None), threads)
    sparse = open_session(proto.SerializeToString(), threads, library)
    rng = np.random.default_rng(0)
    shapes = dict(zip(met.node.input, met.shapes, strict=False))
    float32 = np.dtype(np.float32)
    feed = {value.name: example_array(shapes[value.name], float32, rng) for value in dense.get_inputs()}
    return race(dense, sparse, feed)


def met_layers(model: ModelProto, library: Path, threads: int, inputs: Iterable[InputSpec] = ()) -> list[Met]:
    """The calls of ``model`` that can be timed, with the shapes that one run on example inputs shows.

    A call in a branch that is not taken meets nothing, and is left out. Calls without a name are given one.
    """
    found = [(node, scope) for node, scope in calls(model) if is_timed(node)]
    if not found:
        return []
    for position, (node, _) in enumerate(found):
        node.name = node.name or f"nmconvert_{position}"
    shapes = met_shapes(model.SerializeToString(), threads, library, example_feed(model, inputs))
    return [Met(node, scope, _of_each(node, shapes[node.name])) for node, scope in found if node.name in shapes]


def _of_each(node: NodeProto, given: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The shape of every input of ``node``; a profile tells only of those that are ``given``, one that is left out has none."""
    told = iter(given)
    return tuple(next(told, ()) if name else () for name in node.input)


def time_layers(
    model: ModelProto, library: Path, cache: Cache, threads: int, inputs: Iterable[InputSpec] = ()
) -> list[tuple[Met, float]]:
    """Dense time ÷ sparse time of every layer that can be timed, measured where ``cache`` does not know it.

    What is still noisy the second time serves, and is not put into ``cache``.
    """
    timed = []
    for met in met_layers(model, library, threads, inputs):
        ratio = cache.get(met.key)
        if ratio is None:
            times = time_layer(model, met, library, threads)
            if times.noisy:
                times = time_layer(model, met, library, threads)
            ratio = times.best
            if not times.noisy:
                cache.put(met.key, ratio)
        timed.append((met, float(ratio)))
    return timed


def is_timed(node: NodeProto) -> bool:
    """Whether a call computes in float32; the other types run on the kernels unmeasured."""
    return any(a.name == "compute" and a.i == TensorProto.FLOAT for a in node.attribute)


def dense_bytes(model: ModelProto) -> int:
    """What the weights of all calls take up when they are dense, in float32."""
    return sum(4 * prod(a.ints) for node, _ in calls(model) for a in node.attribute if a.name == "shape")


def with_dense(model: ModelProto, outputs: Collection[str] | None) -> bytes:
    """A copy of ``model`` as a file, in which the calls that make ``outputs`` (None: all calls) are left dense."""
    copy = ModelProto()
    copy.CopyFrom(model)
    leave_dense(copy, {node.output[0] for node, _ in calls(copy)} if outputs is None else outputs)
    content: bytes = copy.SerializeToString()
    return content


def leave_dense(model: ModelProto, outputs: Collection[str]) -> None:
    """Replace, in place, the calls that make ``outputs`` by calls on dense weights, which no kernel takes.

    A function of ours rebuilds the weight under the name ``W`` and goes on from there; its dense twin, named with ``DENSE``
    at the end, takes ``W`` as an input in the place of the packed arrays, and has the rest of the nodes.
    """
    weights: dict[tuple[str, ...], str] = {}
    taken = value_names(model)
    left = [(node, scope) for node, scope in calls(model) if node.output[0] in outputs]
    for node, scope in left:
        packed = packed_inputs(node)
        if packed not in weights:
            weights[packed] = _dense_name(packed[0], taken)
            model.graph.initializer.append(_dense_weight(node, scope, weights[packed]))
        node.op_type += DENSE
        inputs = [node.input[0], weights[packed], *node.input[1 + len(packed) :]]
        del node.input[:]
        node.input.extend(inputs)
    there = {function.name for function in model.functions}
    for name in {node.op_type for node, _ in left} - there:
        model.functions.append(_dense_twin(next(f for f in model.functions if f.name + DENSE == name)))
    _drop_unread(model, {name for packed in weights for name in packed})


def _dense_name(values: str, taken: Collection[str]) -> str:
    """The weight's own, by which a manifest knows it, if no other value has that."""
    own = values.removesuffix(VALUES_SUFFIX)
    return f"{values}{DENSE}" if own in taken else own


def _dense_weight(node: NodeProto, scope: Constants, name: str) -> TensorProto:
    """The weight of a call, as its body would rebuild it."""
    values, mask, table, *scale = (numpy_helper.to_array(scope.tensors[part]) for part in packed_inputs(node))
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    parts, rows = given["code_shape"][1], len(scale[0]) if scale else 1
    flat = unpack(values.reshape(-1), mask.reshape(-1), table, parts, rows, prod(given["permuted"]) // rows, *scale)
    weight = flat.reshape(given["permuted"]).transpose(given["perm"]).reshape(given["shape"])
    wanted = helper.tensor_dtype_to_np_dtype(given["compute"])
    return numpy_helper.from_array(np.ascontiguousarray(weight.astype(wanted, copy=False)), name)


def _dense_twin(function: FunctionProto) -> FunctionProto:
    """``function`` from the weight on."""
    makers = {output: node for node in function.node for output in node.output}
    rebuilding, pending = set(), ["W"]
    while pending:
        node = makers.get(pending.pop())
        if node is not None:
            rebuilding.update(node.output)
            pending.extend(node.input)
    twin = FunctionProto()
    twin.CopyFrom(function)
    twin.name += DENSE
    del twin.node[:], twin.input[:]
    twin.input.extend([function.input[0], "W", *(name for name in function.input[1:] if name in _OTHERS)])
    twin.node.extend(node for node in function.node if node.output[0] not in rebuilding)
    return twin


def _drop_unread(model: ModelProto, packed: Collection[str]) -> None:
    """Remove those of the arrays ``packed``, and of our functions, that are no longer used."""
    unread = set(packed) - set(used_names(model))
    for graph, _ in graphs(model):
        kept = [tensor for tensor in graph.initializer if tensor.name not in unread]
        if len(kept) < len(graph.initializer):
            del graph.initializer[:]
            graph.initializer.extend(kept)
    called = {node.op_type for graph, _ in graphs(model) for node in graph.node if node.domain == DOMAIN}
    functions = [function for function in model.functions if function.name in called or function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(functions)
