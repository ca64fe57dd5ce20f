"""Checkpoints to test with, and what holds for every container."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from nmconvert.checkpoint import Checkpoint, open_checkpoint

MANIFEST = '{"format": 1, "note": "é"}'


class Tied(nn.Module):
    """A convolution, two linear layers that share their weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("seen", torch.arange(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(self.conv(x).mean((2, 3)))) + self.seen.sum()
        return y


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dicts, lists and tuples, by path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{path}/{index}")


def load_all(path: Path) -> dict[str, Tensor]:
    """All tensors of a file as other programs read it."""
    if path.suffix == ".safetensors":
        return {f"/{name}": tensor for name, tensor in safetensors.torch.load_file(path).items()}
    return dict(tensors_of(torch.load(path, map_location="cpu", weights_only=True)))


def sha256(path: Path) -> str:
    """Of a file, to see that it was not touched."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def halve_largest(tensor: Tensor) -> Tensor:
    """An edit that is easy to check: positive entries become zero."""
    return torch.where(tensor > 0, torch.zeros_like(tensor), tensor)


class InBlocks:
    """The same edit, made in place, on blocks of rows; counts its calls and the rows that it saw."""

    def __init__(self, block_rows: int) -> None:
        self.block_rows = block_rows
        self.rows: list[int] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.rows.append(len(tensor))
        return tensor.masked_fill_(tensor > 0, 0)


def weights(checkpoint: Checkpoint) -> list[str]:
    """The tensors that a test edits: floating, two dimensions or more, not tied to another."""
    return [
        info.name
        for info in checkpoint.tensors()
        if info.dtype.is_floating_point and len(info.shape) > 1 and info.shared_with is None
    ]


def edited_copy(source: Path, target: Path, *, trust: bool = False) -> list[str]:
    """Write a copy with all weights edited; returns their names."""
    checkpoint = open_checkpoint(source, trust=trust)
    names = weights(checkpoint)
    checkpoint.write_copy(target, dict.fromkeys(names, halve_largest), lambda: MANIFEST)
    return names


def check_copy(source: Path, target: Path, edited: set[str]) -> None:
    """The tensors at the paths in ``edited`` were edited, the others are the same, in the file as others read it."""
    before, after = load_all(source), load_all(target)
    assert list(before) == list(after)
    for path, tensor in before.items():
        assert tensor.dtype == after[path].dtype
        assert tensor.stride() == after[path].stride(), path
        expected = halve_largest(tensor) if path in edited else tensor
        assert torch.equal(after[path], expected), path
    assert open_checkpoint(target).manifest_text() == MANIFEST
