"""The state of a run on disk, from which it goes on bit for bit.

A folder ``step-N`` holds the tensors, written by `torch.distributed.checkpoint`, so that any number of processes can read
what any number wrote, and ``progress.json``, all else. It gets its name when it is complete; older ones are then
removed. Random numbers, learning rate and the order of the data are functions of the step, and need no saving.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.optim import Optimizer

from nmconvert import dist
from nmconvert.errors import CheckpointError, UsageError, one_line
from nmconvert.imports import brief

PROGRESS = "progress.json"
_OURS = re.compile(r"(step|partial)-\d+")  # folders
_KNOWN = {  # what the metadata of tensors are made of; a pickle could name any program
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}  # fmt: skip


def check_folder(folder: Path) -> None:
    """Raise where ``folder`` for states holds what no run has left there: at the end of a run it is removed.

    Raises:
        UsageError: with the name of the first such thing.
    """
    if folder.is_symlink():
        raise UsageError(f"{folder}: states of a run go there, and it is a link; remove it, or choose another --output")
    others = [] if not folder.is_dir() else [path for path in sorted(folder.iterdir()) if not _is_ours(path)]
    if others:
        raise UsageError(f"{others[0]}: no state of a run; move it away: {folder} is removed when the run is done")


def _is_ours(path: Path) -> bool:
    return _OURS.fullmatch(path.name) is not None if path.is_dir() else path.stem == "log"


def save(folder: Path, step: int, tensors: dict[str, Tensor], progress: dict[str, Any], *, keep: int | None = None) -> None:
    """Write ``folder/step-N``; every process calls this. States but this one and step ``keep`` are removed.

    Raises:
        CheckpointError: it cannot be written; earlier states are then as they were.
    """
    target, partial = folder / f"step-{step}", folder / f"partial-{step}"
    if dist.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        with _quiet():
            save_tensors(tensors, checkpoint_id=partial, no_dist=dist.world() == 1)
    except CheckpointException as error:  # no Exception: nothing else would make one line of it
        shutil.rmtree(partial, ignore_errors=True)
        why = brief(next(iter(error.failures.values()))[0])
        raise CheckpointError(f"{folder}: the state of step {step} cannot be written: {why}; free some space") from error
    dist.barrier()
    if dist.rank() == 0:
        (partial / PROGRESS).write_text(json.dumps(progress))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for other in folder.iterdir():
            if other.is_dir() and _OURS.fullmatch(other.name) and other.name not in (target.name, f"step-{keep}"):
                shutil.rmtree(other, ignore_errors=True)
    dist.barrier()


def latest(folder: Path) -> Path | None:
    """The last complete state in ``folder``."""
    states = [state for state in folder.glob("step-*") if _OURS.fullmatch(state.name) and (state / PROGRESS).is_file()]
    return max(states, key=lambda state: int(state.name.removeprefix("step-")), default=None)


class _Metadata(pickle.Unpickler):
    """Makes nothing but the metadata of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _KNOWN.get(module.removesuffix("._local"), ()) or (
            module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a state")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """torch's own runs whatever program the metadata name."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As torch's, of what `_Metadata` makes."""
        with Path(self.path, ".metadata").open("rb") as file:
            metadata: Metadata = _Metadata(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _saved(state: Path) -> dict[str, Any]:
    """The metadata of the tensors in ``state``, by name.

    Raises:
        CheckpointError: there are none that can be read.
    """
    try:
        return dict(_Reader(state).read_metadata().state_dict_metadata)
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError(f"{state}: its metadata are damaged ({one_line(error)}); remove it and start anew") from error


def read_progress(state: Path) -> dict[str, Any]:
    """What `save` was given.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        progress: dict[str, Any] = json.loads((state / PROGRESS).read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{state / PROGRESS}: is damaged ({error}): remove {state} and start anew") from error
    if not isinstance(progress, dict):
        raise CheckpointError(f"{state / PROGRESS}: is damaged, no table: remove {state} and start anew")
    return progress


def load(state: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors``, sharded as they are, from ``state``.

    Raises:
        CheckpointError: a tensor is missing or has another shape: the run was of another model or other settings.
    """
    saved = _saved(state)
    for name, tensor in tensors.items():
        if name not in saved or saved[name].size != tensor.shape:
            raise CheckpointError(f"{state}: '{name}' is not in it as this run has it: was --resume given for another run?")
    try:
        with _quiet():
            load_tensors(tensors, storage_reader=_Reader(state), no_dist=dist.world() == 1)
    except CheckpointException as error:
        why = brief(next(iter(error.failures.values()))[0])
        raise CheckpointError(f"{state}: cannot be read: {why}; remove it and start anew") from error


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimiser remembers, by name of the parameter; shares memory with it."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def prepare_optimizer(model: nn.Module, optimizer: Optimizer, state: Path) -> None:
    """Give a fresh optimiser zeros of the kind that ``state`` has, for `load` to fill."""
    saved = _saved(state)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        for key, meta in saved.items():
            if key.startswith(prefix) and "." not in key.removeprefix(prefix):
                like_parameter = meta.size == parameter.shape
                dtype = meta.properties.dtype
                value = torch.zeros_like(parameter, dtype=dtype) if like_parameter else torch.zeros(meta.size, dtype=dtype)
                optimizer.state[parameter][key.removeprefix(prefix)] = value


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield
