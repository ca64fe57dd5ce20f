"""Checkpoints to test with, and what holds for every container."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from nmconvert.arrays import Array
from nmconvert.checkpoint import Checkpoint, open_checkpoint
from nmconvert.checkpoint.atomic import atomic_file, atomic_folder

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


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def sha256(path: Path) -> str:
    """Of a file, to see that it was not touched."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def halve_largest(tensor: Tensor) -> Tensor:
    """An edit that is easy to check: positive entries become zero."""
    return torch.where(tensor > 0, torch.zeros_like(tensor), tensor)


class InBlocks:
    """The same edit on blocks of rows; keeps what is sealed, in the order in which it comes."""

    def __init__(self, block_rows: int) -> None:
        self.block_rows = block_rows
        self.sealed: list[Array] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        return halve_largest(tensor)

    def edit_rows(self, block: Array) -> None:
        """In place."""
        block[block > 0] = 0

    def seal(self, block: Array) -> None:
        """Once for each block, in order."""
        self.sealed.append(block.copy())

    @property
    def rows(self) -> list[int]:
        """The rows of each block."""
        return [len(block) for block in self.sealed]


def weights(checkpoint: Checkpoint) -> list[str]:
    """The tensors that a test edits: floating, two dimensions or more, not tied to another."""
    return [
        info.name
        for info in checkpoint.tensors()
        if info.torch_dtype.is_floating_point and len(info.shape) > 1 and info.shared_with is None
    ]


def edited_copy(source: Path, target: Path, *, trust: bool = False) -> list[str]:
    """Write a copy with all weights edited; returns their names."""
    checkpoint = open_checkpoint(source, trust=trust)
    chosen = weights(checkpoint)
    checkpoint.write_copy(target, dict.fromkeys(chosen, halve_largest), lambda: MANIFEST)
    return chosen


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


# ── processes that are killed ─────────────────────────────────────────────────────────────────────────────────────────


def kill_after(seconds: float, work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(ready, *arguments)`` in a process, and kill -9 it so long after it has set ``ready``."""
    context = multiprocessing.get_context("forkserver")  # imports torch once, not for each kill
    context.set_forkserver_preload(["nmconvert.checkpoint", "safetensors.torch"])
    ready = context.Event()
    process = context.Process(target=work, args=(ready, *arguments))
    process.start()
    assert ready.wait(60)
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def keep_copying(ready: Any, source: Path, target: Path) -> None:
    """Write edited copies until killed."""
    ready.set()
    while True:
        edited_copy(source, target)


def keep_writing(ready: Any, target: Path, kind: str) -> None:
    """Write files or folders of one letter until killed; ready after the first."""
    for letter in itertools.cycle(b"abcdefgh"):
        if kind == "file":
            with atomic_file(target) as file:
                for _ in range(75):
                    file.write(bytes([letter]) * 4000)
        else:
            with atomic_folder(target, replaceable=lambda old: True) as folder:
                for name in "abc":
                    (folder / name).write_bytes(bytes([letter]) * 50_000)
        ready.set()
