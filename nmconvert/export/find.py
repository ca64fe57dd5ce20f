"""The sparse weights of a dense ONNX graph, found by their zeros."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import ModelProto, numpy_helper

from nmconvert.arrays import Array, digest
from nmconvert.detect import satisfies, tightest
from nmconvert.manifest import Layer
from nmconvert.onnx_graph import named_tensors, tensor_infos
from nmconvert.pattern import AXES, Axis, Pattern
from nmconvert.tensor import TensorInfo

_SPARSE_BELOW = 0.75  # denser patterns than this are taken for chance


def patterns_found(model: ModelProto) -> set[tuple[Pattern, Axis]]:
    """The tightest pattern of every weight along each axis, where it is sparser than chance would make it."""
    found = set()
    for info, weight in _weights(model):
        for axis in AXES:
            pattern = tightest(info.view(axis).to_matrix(weight))
            if pattern is not None and pattern.density < _SPARSE_BELOW:
                found.add((pattern, axis))
    return found


def sparsest_first(patterns: Iterable[tuple[Pattern, Axis]]) -> list[tuple[Pattern, Axis]]:
    """Always in the same order: by density, among equals the smaller m, the channel axis first."""
    return sorted(set(patterns), key=lambda choice: (choice[0].density, choice[0].m, choice[1]))


def sparse_layers(model: ModelProto, patterns: Iterable[tuple[Pattern, Axis]]) -> Iterator[Layer]:
    """The weights that satisfy one of ``patterns``, the sparsest that fits."""
    by_density = sparsest_first(patterns)
    for info, weight in _weights(model):
        for pattern, axis in by_density:
            view = info.view(axis)
            if view.columns > pattern.n and satisfies(view.to_matrix(weight), pattern):
                yield Layer(info, pattern, axis, digest(weight))
                break


def _weights(model: ModelProto) -> Iterator[tuple[TensorInfo, Array]]:
    tensors = dict(named_tensors(model))
    for info in tensor_infos(model):
        if info.kind is not None and info.reason is None and 0 not in info.shape:
            yield info, numpy_helper.to_array(tensors[info.name])
