"""Weights stored in fewer bits than the graph computes in: narrow initialisers, cast to float32 when the file is loaded.

:func:`narrow` keeps bfloat16 what was bfloat16, exactly. :func:`round_weights` rounds, because somebody asked for it. int8
needs a scale for each row and is a way of packing (:func:`nmconvert.packing.quantize`): a weight that is rounded to it stays
float32 in the graph until it is packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

from nmconvert.errors import ExportError
from nmconvert.export.calls import initializer
from nmconvert.manifest import Layer
from nmconvert.onnx_graph import constant_tensor, graphs
from nmconvert.packing import dequantize, quantize

STORAGE: dict[str, npt.DTypeLike] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}
_SMALLEST = 256  # entries; a Cast node takes about as many bytes as it would save below that


def narrow(model: ModelProto) -> None:
    """Replace, in place, float32 initialisers whose values bfloat16 holds exactly by a bfloat16 one and a Cast."""
    stored = []
    for tensor in _floats(model):
        wide = numpy_helper.to_array(tensor)
        short = wide.astype(ml_dtypes.bfloat16)
        if wide.size >= _SMALLEST and np.array_equal(short.astype(np.float32), wide):
            tensor.CopyFrom(initializer(tensor.name, short))
            stored.append(tensor.name)
    _widen(model, stored)


def round_weights(model: ModelProto, layers: Iterable[Layer], storage: str) -> dict[str, float]:
    """Round, in place, the float32 weights ``layers`` to ``storage``, a key of :data:`STORAGE`, to nearest even.

    Returns, for each that was rounded, the relative error of its norm. Weights in the bodies of If, Loop and Scan stay.

    Raises:
        ExportError: a value is too large for it.
    """
    _lift_constants(model)
    errors = {}
    known = {layer.name: layer for layer in layers}
    for tensor in [tensor for tensor in _floats(model) if tensor.name in known]:
        name, wide = tensor.name, numpy_helper.to_array(tensor)
        if storage == "int8":
            view = known[name].view
            rounded = np.ascontiguousarray(view.from_matrix(dequantize(*quantize(view.to_matrix(wide)))))
            tensor.CopyFrom(initializer(name, rounded))
        else:
            with np.errstate(over="ignore"):
                short = wide.astype(STORAGE[storage])
            rounded = short.astype(np.float32)
            if not np.isfinite(rounded).all():
                largest = float(np.abs(wide).max())
                raise ExportError(f"{name}: its largest value {largest:.3g} does not fit into {storage}: store float32")
            tensor.CopyFrom(initializer(name, short))
        errors[name] = float(np.linalg.norm(rounded - wide)) / max(float(np.linalg.norm(wide)), 1e-30)
    if storage != "int8":
        _widen(model, list(errors))
    return errors


def _lift_constants(model: ModelProto) -> None:
    """Make initialisers of the tensors in Constant nodes, where some exporters keep all weights."""
    for node in [node for node in model.graph.node if constant_tensor(node) is not None]:
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(constant_tensor(node))
        tensor.name = node.output[0]
        model.graph.node.remove(node)


def _floats(model: ModelProto) -> list[TensorProto]:
    given = {value.name for value in [*model.graph.input, *model.graph.output]}  # of a type that the file promises
    return [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and t.name not in given]


def _widen(model: ModelProto, names: Sequence[str]) -> None:
    """Let what reads the constants ``names`` of the main graph, there or in a body, read a Cast of them to float32."""
    wide = {name: f"{name}.wide" for name in names}
    for graph, scope in graphs(model):
        here = {name: cast for name, cast in wide.items() if name in scope.tensors}  # not hidden by a value of the body
        for node in graph.node:
            node.input[:] = [here.get(name, name) for name in node.input]
    told = [value for value in model.graph.value_info if value.name not in wide]  # the others are of the type of before
    del model.graph.value_info[:]
    model.graph.value_info.extend(told)
    for name, cast in wide.items():
        model.graph.node.insert(0, helper.make_node("Cast", [name], [cast], name=f"{name}.widen", to=TensorProto.FLOAT))
