"""The inspect stage: what pattern each tensor of any checkpoint or ONNX file satisfies, ours or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nmconvert.checkpoint import Checkpoint, open_checkpoint
from nmconvert.checkpoint.onnx_file import OnnxCheckpoint, read_whole_model
from nmconvert.detect import satisfies, tightest
from nmconvert.errors import NmconvertError
from nmconvert.export.calls import PackedLayer, inlined_layers, packed_layers
from nmconvert.manifest import Layer, Manifest
from nmconvert.onnx_graph import packed_inputs
from nmconvert.pattern import AXES, Axis, Pattern
from nmconvert.rules import guess_kind
from nmconvert.tensor import PRUNABLE_DTYPES, TensorInfo


@dataclass(frozen=True)
class Found:
    """One tensor: the tightest pattern along each axis (None: dense), its density, and the bytes it takes in the file.

    ``packed`` marks a weight stored as values and mask. ``promised`` is the manifest's entry.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    density: float
    nbytes: int
    patterns: Mapping[Axis, Pattern | None]
    packed: bool = False
    promised: Layer | None = None
    meets: bool = True  # the pattern that was required, along one of the axes


@dataclass(frozen=True)
class Inspection:
    """All tensors with two dimensions or more, and the manifest if the file carries one."""

    path: Path
    format: str
    tensors: tuple[Found, ...]
    others: int
    manifest: Manifest | None

    @property
    def failing(self) -> tuple[Found, ...]:
        """The tensors that should meet the required pattern and do not: of those in the manifest, or where there is none, of
        those that satisfy any pattern; of all where nothing is sparse.
        """
        promised = tuple(found for found in self.tensors if found.promised)
        sparse = promised or tuple(found for found in self.tensors if any(found.patterns.values()))
        return tuple(found for found in sparse or self.tensors if not found.meets)


def inspect(path: Path, *, require: Pattern | None = None, trust: bool = False) -> Inspection:
    """Find the patterns of every tensor in ``path``, and whether each meets ``require``.

    The patterns come from the zeros alone; of the manifest only what it promises is taken.

    Raises:
        CheckpointError: the file cannot be read.
    """
    checkpoint = open_checkpoint(path, trust=trust)
    manifest = Manifest.of(checkpoint)
    packed: list[PackedLayer] = []
    if isinstance(checkpoint, OnnxCheckpoint):
        model = read_whole_model(path)
        packed = list(packed_layers(model, str(path))) or list(inlined_layers(model, manifest.layers if manifest else ()))
    parts = {name for layer in packed for name in packed_inputs(layer.node)}
    tensors = [info for info in checkpoint.tensors() if info.name not in parts]
    weights = [
        info for info in tensors if len(info.shape) > 1 and info.numel and info.dtype in PRUNABLE_DTYPES and not info.unread
    ]
    found = [_packed(layer, manifest, require) for layer in packed]
    found += [_dense(checkpoint, info, manifest, require) for info in weights]
    return Inspection(path, checkpoint.format, tuple(found), len(tensors) - len(weights), manifest)


def _packed(layer: PackedLayer, manifest: Manifest | None, require: Pattern | None) -> Found:
    matrix = layer.matrix()
    return Found(
        layer.name,
        layer.view.shape,
        str(layer.values.dtype),
        float((matrix != 0).mean()),
        layer.nbytes,
        {layer.axis: tightest(matrix)},
        packed=True,
        promised=manifest.layer(layer.name) if manifest else None,
        meets=require is None or satisfies(matrix, require),
    )


def _dense(checkpoint: Checkpoint, info: TensorInfo, manifest: Manifest | None, require: Pattern | None) -> Found:
    nonzero = checkpoint.read(info.name) != 0
    promised = manifest.layer(info.name) if manifest else None
    known = promised.info if promised else replace(info, kind=info.kind or guess_kind(info.name, info.shape))
    matrices = {axis: matrix for axis in AXES if (matrix := _matrix(nonzero, known, axis)) is not None}
    return Found(
        info.name,
        info.shape,
        info.dtype,
        int(nonzero.sum()) / nonzero.numel(),
        info.nbytes,
        {axis: tightest(matrix) for axis, matrix in matrices.items()},
        promised=promised,
        meets=require is None or any(satisfies(matrix, require) for matrix in matrices.values()),
    )


def _matrix(nonzero: Tensor, info: TensorInfo, axis: Axis) -> npt.NDArray[np.bool_] | None:
    try:
        return info.view(axis).to_matrix(nonzero).numpy()
    except NmconvertError:  # too many dimensions: no layer's weight
        return None
