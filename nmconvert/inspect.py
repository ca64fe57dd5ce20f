"""The inspect stage: what pattern each tensor of any checkpoint or ONNX file satisfies, ours or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nmconvert.checkpoint import Checkpoint, open_checkpoint
from nmconvert.checkpoint.onnx_file import OnnxCheckpoint, read_whole_model
from nmconvert.detect import tightest
from nmconvert.errors import NmconvertError
from nmconvert.export.calls import PackedLayer, packed_layers
from nmconvert.manifest import Layer, Manifest
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
    patterns: dict[Axis, Pattern | None]
    packed: bool = False
    promised: Layer | None = None

    def meets(self, required: Pattern) -> bool:
        """Whether one of the axes satisfies ``required``: as sparse, in groups that nest."""
        return any(found is not None and implies(found, required) for found in self.patterns.values())


@dataclass(frozen=True)
class Inspection:
    """All tensors with two dimensions or more, and the manifest if the file carries one."""

    path: Path
    format: str
    tensors: tuple[Found, ...]
    others: int
    manifest: Manifest | None

    def failing(self, required: Pattern) -> tuple[Found, ...]:
        """The tensors that should meet ``required`` and do not: those of the manifest, or if there is none, those with a
        pattern of their own; all weights where nothing is sparse.
        """
        promised = tuple(found for found in self.tensors if found.promised)
        sparse = promised or tuple(found for found in self.tensors if any(found.patterns.values()))
        return tuple(found for found in sparse or self.tensors if not found.meets(required))


def implies(found: Pattern, required: Pattern) -> bool:
    """Whether every matrix that is ``found`` is ``required`` too: exact for equal m and for multiples either way."""
    if found.m == required.m:
        return found.n <= required.n
    if required.m % found.m == 0:
        return found.n * (required.m // found.m) <= required.n
    return found.n <= required.n and found.m >= required.m


def inspect(path: Path, *, trust: bool = False) -> Inspection:
    """Find the patterns of every tensor in ``path``; nothing is taken from the manifest but what it promises.

    Raises:
        CheckpointError: the file cannot be read.
    """
    checkpoint = open_checkpoint(path, trust=trust)
    text = checkpoint.manifest_text()
    manifest = None if text is None else Manifest.from_json(text, str(path))
    packed = list(packed_layers(read_whole_model(path), str(path))) if isinstance(checkpoint, OnnxCheckpoint) else []
    parts = {name for layer in packed for name in layer.node.input[1:4]}
    tensors = [info for info in checkpoint.tensors() if info.name not in parts]
    weights = [info for info in tensors if len(info.shape) > 1 and info.numel and info.dtype in PRUNABLE_DTYPES]
    found = [_packed(layer, manifest) for layer in packed] + [_dense(checkpoint, info, manifest) for info in weights]
    return Inspection(path, checkpoint.format, tuple(found), len(tensors) - len(weights), manifest)


def _packed(layer: PackedLayer, manifest: Manifest | None) -> Found:
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
    )


def _dense(checkpoint: Checkpoint, info: TensorInfo, manifest: Manifest | None) -> Found:
    weight = checkpoint.read(info.name)
    promised = manifest.layer(info.name) if manifest else None
    known = promised.info if promised else replace(info, kind=info.kind or guess_kind(info.name, info.shape))
    nonzero = weight != 0
    density = float(nonzero.float().mean()) if nonzero.numel() < 1 << 24 else float(nonzero.sum() / nonzero.numel())
    return Found(
        info.name,
        info.shape,
        info.dtype_name,
        density,
        info.nbytes,
        {axis: _tightest(nonzero, known, axis) for axis in AXES},
        promised=promised,
    )


def _tightest(nonzero: Tensor, info: TensorInfo, axis: Axis) -> Pattern | None:
    try:
        view = info.view(axis)
    except NmconvertError:  # six dimensions or more: no layer's weight
        return None
    return tightest(view.to_matrix(nonzero).to(torch.uint8).numpy())
