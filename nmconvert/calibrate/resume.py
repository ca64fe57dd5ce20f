"""What an interrupted calibration has done, kept in a file beside its result: see ``resume`` of ``prune_model``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nmconvert.checkpoint.atomic import atomic_file

Done = dict[str, Any]
"""Tensors, numbers and texts only: it is read with ``weights_only``."""


def fingerprint(state: Mapping[str, Tensor], batches: Sequence[Any], *settings: object) -> str:
    """Equal for equal models, batches and settings: another run's file is then of use."""
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in [*state.values(), *(leaf for leaf in tree_leaves(list(batches)) if isinstance(leaf, Tensor))]:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(file: Path, key: str) -> Done:
    """What a run with the same fingerprint left in ``file``; empty where there is none, or it is another's."""
    if not file.exists():
        return {}
    try:
        stored = torch.load(file, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError):
        return {}  # damaged: begin anew, as if there were none
    return stored if isinstance(stored, dict) and stored.get("key") == key else {}


def write(file: Path, key: str, done: Done) -> None:
    """Replace ``file`` atomically."""
    with atomic_file(file) as stream:
        torch.save({**done, "key": key}, stream)
