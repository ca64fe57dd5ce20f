"""Permuting the channels of a bare ONNX graph: its constants in another order, and proof by a run that nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

from nmconvert.arrays import as_array, as_tensor
from nmconvert.calibrate.axes_onnx import find_channels
from nmconvert.calibrate.correct import disagreement, disagreement_of_most
from nmconvert.calibrate.onnx_driver import chooses, computed, graph_inputs, input_types, tolerance
from nmconvert.calibrate.onnx_ops import constant_values
from nmconvert.calibrate.permute import Permutation, Reader, reorder
from nmconvert.calibrate.replay import Batch, as_call
from nmconvert.errors import ModelError
from nmconvert.inputs import example_feed
from nmconvert.onnx_graph import named_tensors
from nmconvert.tensor import Row


def permute_onnx(
    model: ModelProto, rows: Sequence[Row], feeds: Mapping[str, Tensor], *, seed: int = 0
) -> tuple[dict[str, Tensor], list[Permutation]]:
    """The constants of ``model`` (which is left as it is) that get another order for the weights of ``rows``, by name.

    ``feeds`` are an example of the graph's inputs, half precision as float32.

    Raises:
        ModelError: onnxruntime cannot run the graph, or the permuted one computes something else.
    """
    tensors = dict(named_tensors(model))
    readers = [_reader(row, constant_values(tensors[row.name])) for row in rows]
    orders, done = reorder(find_channels(model, feeds), readers, seed=seed)
    changed: dict[str, Tensor] = {}
    for (name, dim), order in orders.items():
        tensor = changed[name] if name in changed else as_tensor(numpy_helper.to_array(tensors[name]).copy())
        changed[name] = tensor.index_select(dim, order)
    if changed:
        names = [value.name for value in model.graph.output]
        measure = disagreement_of_most if chooses(model) else disagreement
        apart = measure(computed(with_tensors(model, changed), feeds, names), computed(model, feeds, names))
        if not apart <= tolerance(model):
            raise ModelError(f"the permuted graph gives something else (relative error {apart:.1e}): leave --permute out")
    return changed, done


def example_inputs(model: ModelProto, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Inputs for one run: two samples of ``batches``, or random ones of the graph's own shapes."""
    if not batches:
        tensors = {name: torch.from_numpy(array) for name, array in example_feed(model, batch=2).items()}
        return {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    args = as_call(graph_inputs(model.graph, batches[:1])[0]).args
    fixed = {value.name for value in model.graph.input if any(d.dim_value for d in value.type.tensor_type.shape.dim[:1])}
    return {n: x if n in fixed else x[:2] for n, x in zip(input_types(model.graph), args, strict=True)}


def _reader(row: Row, weight: Tensor) -> Reader:
    info = row.info
    assert row.pattern is not None
    assert row.axis is not None
    assert info.kind is not None
    return Reader.of(row.name, weight, info.kind, info.groups, row.pattern, row.axis, info.transposed)


def with_tensors(model: ModelProto, tensors: Mapping[str, Tensor]) -> ModelProto:
    """A copy of ``model`` with other values for some of its constants."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for name, tensor in named_tensors(copy):
        if name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(as_array(tensors[name]), tensor.name))
    return copy
