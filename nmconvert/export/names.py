"""Names that torch's exporter lost: a linear layer's weight comes out transposed, as ``val_3``, and tied weights twice."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from onnx import ModelProto, helper, numpy_helper

from nmconvert.arrays import Array, as_array
from nmconvert.onnx_graph import graphs

_SMALLEST = 64  # entries; what is smaller may be equal by chance


def restore_names(model: ModelProto, state: Mapping[str, torch.Tensor]) -> None:
    """Give every initialiser that is the transpose of a matrix in ``state`` the name of that matrix, in place.

    Where a matrix is in the graph already (it is tied), the initialiser becomes a Transpose of it.
    """
    matrices: dict[object, list[tuple[str, Array]]] = {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.numel() >= _SMALLEST:
            transposed = as_array(tensor.detach()).T
            matrices.setdefault(_corner(transposed), []).append((name, transposed))
    present = {tensor.name for tensor in model.graph.initializer}
    renamed: dict[str, str] = {}
    nodes = []
    for tensor in list(model.graph.initializer):
        if tensor.name in state or len(tensor.dims) != 2:
            continue
        array = numpy_helper.to_array(tensor)
        equal = [name for name, matrix in matrices.get(_corner(array), ()) if np.array_equal(matrix, array)]
        if tied := next((name for name in equal if name in present), None):
            nodes.append(helper.make_node("Transpose", [tied], [tensor.name], name=f"{tensor.name}.tied", perm=[1, 0]))
            model.graph.initializer.remove(tensor)
        elif equal:
            name = equal[0]
            if name in renamed.values():
                model.graph.initializer.remove(tensor)
            renamed[tensor.name] = name
            tensor.name = name
    for graph, _ in graphs(model):
        for node in graph.node:
            for position, name in enumerate(node.input):
                node.input[position] = renamed.get(name, name)
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def _corner(matrix: Array) -> object:
    return matrix.shape, matrix.dtype.name, matrix[:4, :8].tobytes()
