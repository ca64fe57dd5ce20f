"""Store in bfloat16 what was bfloat16: the graph computes in float32, its initialisers are cast when it is loaded."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from nmconvert.export.calls import initializer

_SMALLEST = 256  # entries; a Cast node takes about as many bytes as it would save below that


def narrow(model: ModelProto) -> None:
    """Replace, in place, float32 initialisers whose values bfloat16 holds exactly by a bfloat16 one and a Cast."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        wide = numpy_helper.to_array(tensor)
        short = wide.astype(ml_dtypes.bfloat16)
        if wide.size < _SMALLEST or not np.array_equal(short.astype(np.float32), wide):
            continue
        name = tensor.name
        tensor.CopyFrom(initializer(f"{name}.bf16", short))
        casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}.widen", to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
