"""Hugging Face folders: weights in one file or in shards with an index, beside configuration and tokenizer files.

The copy holds the same files. Weights that the folder also holds in another framework's format are left out of it, for
they would still be the old ones. A single weight file carries the manifest itself; beside shards it is the file
``nmconvert.json``, for it is complete only when the last shard is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nmconvert.checkpoint.atomic import atomic_folder, is_partial
from nmconvert.checkpoint.base import Edits, FileCheckpoint, manifest_from_bytes
from nmconvert.errors import CheckpointError
from nmconvert.manifest import MANIFEST
from nmconvert.tensor import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# In the order in which transformers and diffusers prefer them.
_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin")
_OTHER_WEIGHTS = (  # next to the weights, and anywhere in the folder
    ("*.safetensors", "*pytorch_model*.bin", "*.index.json", "*.pth", "*.pt"),
    ("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.onnx.data", "*.gguf", "*.tflite"),
)
_IGNORED_FOLDERS = {".git", ".cache", "__pycache__"}


class OpenFile(Protocol):
    """How a weight file is opened, whatever its format."""

    def __call__(self, path: Path, *, trust: bool) -> FileCheckpoint:
        """See :func:`nmconvert.checkpoint.open_checkpoint`."""


@dataclass(frozen=True)
class FolderCheckpoint:
    """A folder whose weights are in ``shards``; ``index`` names the shard of each tensor, if there are several."""

    path: Path
    format: str
    shards: Mapping[str, FileCheckpoint]  # by file name
    index: str | None
    open_file: OpenFile

    def tensors(self) -> list[TensorInfo]:
        """See :class:`nmconvert.checkpoint.Checkpoint`."""
        return [info for shard in self.shards.values() for info in shard.tensors()]

    def read(self, name: str) -> Tensor:
        """See :class:`nmconvert.checkpoint.Checkpoint`."""
        return self._shard(name).read(name)

    def manifest_text(self) -> str | None:
        """See :class:`nmconvert.checkpoint.Checkpoint`."""
        if self.index is None:
            return next(iter(self.shards.values())).manifest
        file = self.path / MANIFEST
        return manifest_from_bytes(file.read_bytes(), file) if file.is_file() else None

    def write_copy(self, target: Path, edit: Edits, manifest: Callable[[], str]) -> None:
        """See :class:`nmconvert.checkpoint.Checkpoint`; an existing folder is replaced only if nmconvert wrote it."""
        for name in edit:
            self._shard(name)
        files = list(_companions(self.path))
        with atomic_folder(target, replaceable=lambda old: _has_manifest(old, self.open_file)) as folder:
            for file in files:
                (folder / file.parent).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.path / file, folder / file)
            if self.index is not None:
                shutil.copyfile(self.path / self.index, folder / self.index)
            for file_name, shard in self.shards.items():
                edits = {name: function for name, function in edit.items() if name in shard.slots}
                with shard.path.open("rb") as source, (folder / file_name).open("w+b") as out:
                    shard.rewrite(source, out, edits, manifest if self.index is None else None)
            if self.index is not None:
                (folder / MANIFEST).write_text(manifest(), "utf-8")

    def _shard(self, name: str) -> FileCheckpoint:
        for shard in self.shards.values():
            if name in shard.slots:
                return shard
        raise CheckpointError(f"{self.path}: there is no tensor '{name}' in it; see nmconvert inspect")


def open_hf_folder(path: Path, open_file: OpenFile, *, trust: bool) -> FolderCheckpoint:
    """The checkpoint in folder ``path``, each weight file opened with ``open_file``.

    Raises:
        CheckpointError: it holds no weights, or the index does not fit the shards.
    """
    index = next((f"{name}.index.json" for name in _WEIGHTS if (path / f"{name}.index.json").is_file()), None)
    single = next((name for name in _WEIGHTS if (path / name).is_file()), None)
    if single is None and index is None:
        found = sorted(file.name for file in path.glob("*.safetensors"))
        if len(found) > 1 and all("-of-" in name for name in found):
            raise CheckpointError(
                f"{path}: has shards ({found[0]} …), and no {_WEIGHTS[0]}.index.json that says what is in each"
            )
        if len(found) != 1:
            raise CheckpointError(
                f"{path}: a folder without {_WEIGHTS[0]}, its index, or {_WEIGHTS[2]}; name the weight file itself"
            )
        single = found[0]
    if single is not None and (index is None or _WEIGHTS.index(single) < _WEIGHTS.index(index.removesuffix(".index.json"))):
        return FolderCheckpoint(path, "Hugging Face folder", {single: open_file(path / single, trust=trust)}, None, open_file)
    assert index is not None
    weight_map = _read_index(path / index)
    shards = {name: open_file(path / name, trust=trust) for name in sorted(set(weight_map.values()))}
    _check_index(path / index, weight_map, shards)
    return FolderCheckpoint(path, "Hugging Face folder", shards, index, open_file)


def _has_manifest(path: Path, open_file: OpenFile) -> bool:
    """Whether folder ``path`` is a result of nmconvert: its manifest file, or its weight file's own, is there."""
    try:
        return open_hf_folder(path, open_file, trust=True).manifest_text() is not None
    except CheckpointError:
        return False


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: not the index of a sharded checkpoint; copy the file anew") from error
    for file in files:
        # A name that led out of the folder would have any file of this machine read as a shard.
        if not isinstance(file, str) or Path(file).name != file or not (path.parent / file).is_file():
            raise CheckpointError(f"{path}: the shard {file!r:.80} is not in the folder; copy it there")
    return dict(weight_map)


def _check_index(path: Path, weight_map: Mapping[str, str], shards: Mapping[str, FileCheckpoint]) -> None:
    for name, file in weight_map.items():
        if name not in shards[file].slots:
            raise CheckpointError(f"{path}: damaged: '{name}' is not in {file}; copy the folder anew")
    names: Sequence[str] = [name for shard in shards.values() for name in shard.slots]
    if len(set(names)) < len(names):
        twice = next(name for name in names if sum(name in shard.slots for shard in shards.values()) > 1)
        raise CheckpointError(f"{path}: damaged: '{twice}' is in two shards; copy the folder anew")


def _companions(path: Path) -> list[Path]:
    """Configuration, tokenizer and other files, relative to ``path``: all but weights and our own manifest."""
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in _IGNORED_FOLDERS and not is_partial(Path(name)))
        for name in sorted(files):
            file = Path(folder, name)
            globs = _OTHER_WEIGHTS[1] if Path(folder) != path else (*_OTHER_WEIGHTS[0], *_OTHER_WEIGHTS[1], MANIFEST)
            if file.is_file() and not is_partial(file) and not any(fnmatchcase(name, glob) for glob in globs):
                found.append(file.relative_to(path))
    return found
