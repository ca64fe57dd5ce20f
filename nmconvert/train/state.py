"""The state of a run on disk, from which it goes on bit for bit.

A folder ``step-N`` holds the tensors, written by `torch.distributed.checkpoint`, so that any number of processes can read
what any number wrote, and ``progress.json``, all else. It gets its name when it is complete; older ones are then
removed. Random numbers, learning rate and the order of the data are functions of the step, and need no saving.
"""

from __future__ import annotations

import json
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
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.optim import Optimizer

from nmconvert import dist
from nmconvert.errors import CheckpointError
from nmconvert.imports import brief

PROGRESS = "progress.json"


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
            if other.is_dir() and other.name not in (target.name, f"step-{keep}"):
                shutil.rmtree(other, ignore_errors=True)
    dist.barrier()


def latest(folder: Path) -> Path | None:
    """The last complete state in ``folder``."""
    states = [state for state in folder.glob("step-*") if (state / PROGRESS).is_file()]
    return max(states, key=lambda state: int(state.name.removeprefix("step-")), default=None)


def read_progress(state: Path) -> dict[str, Any]:
    """What `save` was given.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        progress: dict[str, Any] = json.loads((state / PROGRESS).read_text())
    except ValueError as error:
        raise CheckpointError(f"{state / PROGRESS}: is damaged ({error}): remove {state} and start anew") from error
    return progress


def load(state: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors``, sharded as they are, from ``state``.

    Raises:
        CheckpointError: a tensor is missing or has another shape: the run was of another model or other settings.
    """
    saved = FileSystemReader(state).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        if name not in saved or saved[name].size != tensor.shape:  # type: ignore[union-attr]
            raise CheckpointError(f"{state}: '{name}' is not in it as this run has it: was --resume given for another run?")
    try:
        with _quiet():
            load_tensors(tensors, checkpoint_id=state, no_dist=dist.world() == 1)
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
    saved = FileSystemReader(state).read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        for key, meta in saved.items():
            if key.startswith(prefix) and "." not in key.removeprefix(prefix):
                like_parameter = meta.size == parameter.shape  # type: ignore[union-attr]
                dtype = meta.properties.dtype  # type: ignore[union-attr]
                value = (
                    torch.zeros_like(parameter, dtype=dtype) if like_parameter else torch.zeros(meta.size, dtype=dtype)  # type: ignore[union-attr]
                )
                optimizer.state[parameter][key.removeprefix(prefix)] = value


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield
