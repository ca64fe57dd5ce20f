"""ONNX models as checkpoints: initialisers and Constant nodes are the tensors.

External data is read and copied tensor by tensor.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
from torch import Tensor

from nmconvert.arrays import as_tensor
from nmconvert.checkpoint.atomic import atomic_file
from nmconvert.checkpoint.base import Edits, apply_whole
from nmconvert.errors import CheckpointError, ModelError, UsageError
from nmconvert.manifest import METADATA_KEY, metadata_text
from nmconvert.onnx_graph import DOMAIN, graphs, named_tensors, sort_nodes, tensor_infos, used_names
from nmconvert.tensor import TensorInfo

_ALIGNMENT = 4096  # of external tensors: what onnxruntime can map into memory
EXTERNAL_ABOVE = 1_800_000_000  # bytes; protobuf ends at 2 GiB


def open_onnx(path: Path) -> OnnxCheckpoint:
    """Read the graph of an ONNX file, not its external data.

    Raises:
        CheckpointError: it is not an ONNX model, or damaged.
    """
    return OnnxCheckpoint(path, read_model(path))


def read_model(path: Path) -> ModelProto:
    """The ModelProto of a file, external data left where it is.

    Raises:
        CheckpointError: it is not an ONNX model, or damaged.
    """
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{path}: not an ONNX model, or damaged; copy the file anew") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not _names_are_text(model):
        raise CheckpointError(f"{path}: damaged: a name in it is no UTF-8 text; write the model anew")
    if name := next((name for name, tensor in named_tensors(model) if any(size < 0 for size in tensor.dims)), None):
        raise CheckpointError(f"{path}: damaged: tensor '{name}' has a dimension below zero; write the model anew")
    if not model.graph.node and not model.graph.initializer:
        raise CheckpointError(f"{path}: an ONNX model without a graph, or not an ONNX model")
    if model.graph.sparse_initializer:
        listed = ", ".join(f"'{sparse.values.name}'" for sparse in model.graph.sparse_initializer[:3])
        raise CheckpointError(f"{path}: stores {listed} as a list of entries; write all weights as initializer")
    sort_nodes(model.graph)
    return model


def _names_are_text(model: ModelProto) -> bool:
    """protobuf gives other names as bytes, or raises where they are read; which one depends on its version."""
    try:
        return all(isinstance(name, str) for name in (*used_names(model), *dict(named_tensors(model))))
    except UnicodeDecodeError:
        return False


def read_whole_model(path: Path) -> ModelProto:
    """The ModelProto of a file with all external data loaded into it.

    Raises:
        CheckpointError: as :func:`read_model`, or the external data is not there.
    """
    model = read_model(path)
    for tensor in every_tensor(model):
        _load_external(tensor, path)
    return model


class OnnxCheckpoint:
    """See :class:`nmconvert.checkpoint.base.Checkpoint`."""

    format = "ONNX"

    def __init__(self, path: Path, model: ModelProto) -> None:
        self.path = path
        self.model = model

    @cached_property
    def _tensors(self) -> dict[str, TensorProto]:
        return dict(named_tensors(self.model))

    def tensors(self) -> list[TensorInfo]:
        """See Checkpoint."""
        try:
            return tensor_infos(self.model)
        except ModelError as error:
            raise CheckpointError(f"{self.path}: damaged: {error}") from error

    def read(self, name: str) -> Tensor:
        """See Checkpoint."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: there is no tensor '{name}' in it; see nmconvert inspect")
        tensor = TensorProto()
        tensor.CopyFrom(self._tensors[name])
        _load_external(tensor, self.path)
        return _to_torch(tensor, self.path)

    def manifest_text(self) -> str | None:
        """See Checkpoint."""
        return metadata_text(self.model)

    def write_copy(self, target: Path, edit: Edits, manifest: Callable[[], str]) -> None:
        """See Checkpoint."""
        if edit and any(node.domain == DOMAIN for graph, _ in graphs(self.model) for node in graph.node):
            raise UsageError(f"{self.path}: is compressed already; prune the checkpoint that it was exported from")
        model = ModelProto()
        model.CopyFrom(self.model)
        for name, tensor in named_tensors(model):
            if name in edit and not uses_external_data(tensor):
                edited = apply_whole(edit[name], _to_torch(tensor, self.path))
                tensor.CopyFrom(_from_torch(edited, tensor.name))
        save_model(model, target, source=self.path, edit=edit, manifest=manifest)


def every_tensor(model: ModelProto) -> Iterator[TensorProto]:
    """The tensors of :func:`nmconvert.onnx_graph.named_tensors`, without names."""
    return (tensor for _, tensor in named_tensors(model))


def save_model(
    model: ModelProto,
    target: Path,
    *,
    source: Path | None = None,
    edit: Edits | None = None,
    manifest: Callable[[], str] | None = None,
    check: Callable[[Path], None] | None = None,
    external: bool | None = None,
) -> None:
    """Write ``model`` to ``target``, atomically, with a data file beside it where tensors are external or too large.

    External tensors are read from beside ``source`` one at a time, and pass through ``edit`` on their way. The data file gets
    a name that no earlier one has, so that an old model keeps its old data until the new model is there. ``check`` gets the
    path of the whole new model before it takes the name ``target``; if it raises, nothing is left.

    Raises:
        CheckpointError: the copy cannot be written; ``target`` is then as it was before.
    """
    tensors = list(named_tensors(model))  # two branches of an If may have tensors of one name
    if external is None:
        inside = sum(len(tensor.raw_data) for _, tensor in tensors)
        external = inside > EXTERNAL_ABOVE or any(uses_external_data(tensor) for _, tensor in tensors)
    if not external:
        _write_model(model, target, manifest, check)
        return
    before = {path for path in data_files(target) if path.name.startswith(target.name) and path.suffix == ".data"}
    data = target.with_name(f"{target.name}.data")
    if data.exists():
        data = target.with_name(f"{target.name}.{secrets.token_hex(4)}.data")
    try:
        with atomic_file(data) as file:
            for name, tensor in tensors:
                _move_out(name, tensor, file, data.name, source, edit or {})
        _write_model(model, target, manifest, check)
    except BaseException:
        data.unlink(missing_ok=True)
        raise
    for old in before - {data} - _read_by_others(target, source):
        old.unlink(missing_ok=True)


def _write_model(
    model: ModelProto, target: Path, manifest: Callable[[], str] | None, check: Callable[[Path], None] | None
) -> None:
    if manifest is not None:
        set_metadata(model, METADATA_KEY, manifest())
    with atomic_file(target) as file:
        file.write(model.SerializeToString())
        file.flush()
        if check is not None:
            check(Path(file.name))


def set_metadata(model: ModelProto, key: str, value: str) -> None:
    """Set one entry of the model-level metadata, the only one that every tool keeps."""
    for entry in list(model.metadata_props):
        if entry.key == key:
            model.metadata_props.remove(entry)
    model.metadata_props.add(key=key, value=value)


def _move_out(name: str, tensor: TensorProto, file: BinaryIO, location: str, source: Path | None, edit: Edits) -> None:
    """Write one tensor's bytes to the data file and leave a reference in its place. Small tensors stay."""
    loaded = tensor
    if uses_external_data(tensor):
        assert source is not None
        loaded = TensorProto()  # one of its own: a model keeps the memory of what is cleared in it
        loaded.CopyFrom(tensor)
        _load_external(loaded, source)
        if name in edit:
            loaded = _from_torch(apply_whole(edit[name], _to_torch(loaded, source)), tensor.name)
    if len(loaded.raw_data) < 1024:
        tensor.CopyFrom(loaded)
        return
    file.seek(-file.tell() % _ALIGNMENT, 1)
    offset = file.tell()
    file.write(loaded.raw_data)
    length = len(loaded.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def data_files(path: Path) -> set[Path]:
    """The files beside it that a model at ``path`` has tensors in; none where it cannot be read."""
    if not path.is_file():
        return set()
    try:
        tensors = list(every_tensor(read_model(path)))
    except CheckpointError:
        return set()
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return {path.with_name(name) for name in names if name and "/" not in name and not name.startswith(".")}


def _read_by_others(target: Path, source: Path | None) -> set[Path]:
    """What other models in the folder of ``target`` have tensors in: a copy of an old model reads the old one's data."""
    others = {*target.parent.glob("*.onnx"), *([source] if source else [])} - {target}
    return {file for other in others for file in data_files(other)}


def _load_external(tensor: TensorProto, path: Path) -> None:
    if not uses_external_data(tensor):
        return
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    try:
        load_external_data_for_tensor(tensor, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        outside = Path(location).is_absolute() or ".." in Path(location).parts
        remedy = "it lies outside of the model's folder, where nothing is read" if outside else "keep the two files together"
        raise CheckpointError(f"{path}: the external data '{location}' of '{tensor.name}' cannot be read; {remedy}") from error
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _to_torch(tensor: TensorProto, path: Path) -> Tensor:
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: tensor '{tensor.name}' is damaged: {error}") from error
    return as_tensor(np.array(array))  # a copy that may be written to


def _from_torch(tensor: Tensor, name: str) -> TensorProto:
    if tensor.dtype == torch.bfloat16:
        raw = tensor.contiguous().view(torch.uint16).numpy().tobytes()
        return onnx.helper.make_tensor(name, TensorProto.BFLOAT16, list(tensor.shape), raw, raw=True)
    return numpy_helper.from_array(tensor.contiguous().numpy(), name)
