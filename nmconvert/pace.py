"""How fast a model would be on the native kernels: each layer with a pattern, and the whole with a pattern for each layer.

What ``prune --budget 'speedup>=…'`` measures with. Speed does not depend on the weights' values, so masks are by magnitude.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from nmconvert.calibrate.budget import Chosen
from nmconvert.calibrate.onnx_driver import input_types
from nmconvert.calibrate.replay import Batch, as_call
from nmconvert.export import raised
from nmconvert.export.calls import VALUES, values_name
from nmconvert.export.compress import compress
from nmconvert.export.fuse import fuse
from nmconvert.export.trace import trace
from nmconvert.inputs import InputSpec, example_feed
from nmconvert.masks import magnitude, nm_mask
from nmconvert.onnx_graph import named_tensors, tensor_infos
from nmconvert.runtime import library, session
from nmconvert.runtime.choice import Times, met_layers, open_session, race, time_layer

_SECONDS, _ROUNDS = 0.5, 15  # for each side of a race of whole models


class Pace:
    """Races ``model``, a module or an ONNX graph, on one thread, with a batch of 1 and otherwise the shapes of ``batch``.

    A graph for a fixed number of samples gets so many.

    Raises:
        KernelsUnavailableError: there are no kernels to measure.
        ExportError: the model cannot be exported.
    """

    def __init__(self, model: nn.Module | ModelProto, batch: Batch) -> None:
        self.kernels = library()
        if isinstance(model, ModelProto):
            self.inputs, self.dense = _graph_specs(model, batch), raised(model)
        else:
            self.inputs = _specs(batch)
            self.dense = trace(model, self.inputs, {}).model

    def layers(self, plan: Chosen) -> dict[str, tuple[float, float]]:
        """Seconds of each layer of ``plan``, dense and as it runs: where the kernel is slower it is left dense.

        Layers that have no kernel are left out.
        """
        sparse = self._pruned(plan)
        names = {values_name(name): name for name in plan}
        raced: dict[str, Times] = {}
        found = {}
        for met in met_layers(sparse, self.kernels, 1, self.inputs):
            if met.key not in raced:
                raced[met.key] = time_layer(sparse, met, self.kernels, 1)
            dense, fast = (min(seconds) for seconds in (raced[met.key].dense, raced[met.key].sparse))
            if name := names.get(met.node.input[VALUES]):
                found[name] = (dense, min(dense, fast))
        return found

    def speedup(self, plan: Chosen) -> float:
        """Dense time ÷ time of the whole model pruned to ``plan``: the median of interleaved rounds."""
        if not plan:
            return 1.0
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        sparse = session(self._pruned(plan).SerializeToString(), options, inputs=self.inputs)
        dense = open_session(self.dense.SerializeToString(), 1)
        return race(dense, sparse, example_feed(self.dense, self.inputs), seconds=_SECONDS, rounds=_ROUNDS).ratio

    def _pruned(self, plan: Chosen) -> ModelProto:
        """The compressed model."""
        model = ModelProto()
        model.CopyFrom(self.dense)
        known = {info.name: info for info in tensor_infos(model) if info.kind is not None}
        for name, tensor in named_tensors(model):
            if name in plan and name in known:
                pattern, axis = plan[name]
                view = known[name].view(axis)
                matrix = torch.from_numpy(view.to_matrix(numpy_helper.to_array(tensor)).copy())
                pruned = view.from_matrix((matrix * nm_mask(magnitude(matrix), pattern)).numpy())
                tensor.CopyFrom(numpy_helper.from_array(pruned, name))
        compress(model, sorted(set(plan.values())))
        fuse(model)
        return model


def _graph_specs(model: ModelProto, batch: Batch) -> list[InputSpec]:
    types = input_types(model.graph)
    given = dict(zip(types, as_call(batch).args, strict=False)) | as_call(batch).kwargs
    counts = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim[:1]] for value in model.graph.input}
    shapes = {name: (*(counts[name] or [0]), *np.shape(given[name])[1:]) for name in types}
    return [InputSpec(name, (shape[0] or 1, *shape[1:]), types[name].name) for name, shape in shapes.items()]


def _specs(batch: Batch) -> list[InputSpec]:
    call = as_call(batch)
    named = [*((None, value) for value in call.args), *call.kwargs.items()]
    return [
        InputSpec(name, (1, *value.shape[1:]), str(value.dtype).removeprefix("torch."))
        for name, value in named
        if isinstance(value, Tensor)
    ]
