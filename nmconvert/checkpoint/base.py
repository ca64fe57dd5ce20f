"""What every container offers: a list of tensors, one tensor at a time, and a changed copy.

A container that is one file is described by :class:`FileCheckpoint`: where each tensor lies in the file, and a function
that writes the file again with some of those bytes changed. Nothing else is read, and nothing else changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeAlias

import numpy as np

from nmconvert.arrays import Array, as_array
from nmconvert.checkpoint.atomic import atomic_file
from nmconvert.errors import CheckpointError
from nmconvert.tensor import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Edit: TypeAlias = "Callable[[Tensor], Tensor]"
"""Gets a tensor, returns one of the same shape and dtype; it may work in place. The tensor lasts as long as the call.

If it has a method ``seal``, that gets what was made of the tensor, as a NumPy array, before it is written.
"""

Edits: TypeAlias = "Mapping[str, Edit]"


class BlockEdit(Protocol):
    """An edit that can also be made block by block, so that a large tensor is never in memory as a whole.

    A tensor whose entries follow each other in the file goes through ``edit_rows`` if ``block_rows`` is positive: each block
    (but the last) is a multiple of that many rows, [r, *shape[1:]]. Blocks are edited in any order, several at once, in
    several threads, and sealed in order. They are NumPy arrays: nothing waits for torch.
    """

    block_rows: int

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor as a whole."""

    def edit_rows(self, block: Array) -> None:
        """Change some rows of the tensor in place."""

    def seal(self, block: Array) -> None:
        """Look at what was made of them."""


def apply_whole(edit: Edit, tensor: Tensor) -> Tensor:
    """``tensor``, all of it in memory, passed through ``edit``, and sealed."""
    edited = edit(tensor)
    if hasattr(edit, "seal"):
        edit.seal(as_array(edited))
    return edited


class Checkpoint(Protocol):
    """A trained model in a file or a folder."""

    @property
    def path(self) -> Path:
        """The file or the folder."""

    @property
    def format(self) -> str:
        """The container's name, for people."""

    def tensors(self) -> list[TensorInfo]:
        """The model's tensors, in the order of the file's own listing; those that cannot be read come last."""

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own; no other tensor is read."""

    def manifest_text(self) -> str | None:
        """The nmconvert manifest (JSON) that the file carries, if it does."""

    def write_copy(self, target: Path, edit: Edits, manifest: Callable[[], str]) -> None:
        """Write a copy to ``target``, atomically, with the tensors named in ``edit`` passed through their function.

        Each edit is called once (block by block where it allows that), in file order, then ``manifest``; all else stays
        as it is, byte for byte.

        Raises:
            CheckpointError: the file is damaged, or the copy cannot be written; ``target`` is then as it was before.
        """


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: ``nbytes`` of storage at ``offset`` of the file, of which it is a strided view."""

    info: TensorInfo
    offset: int
    nbytes: int
    start: int
    stride: tuple[int, ...]
    crc: int | None = None  # of the whole storage

    @property
    def is_contiguous(self) -> bool:
        """Whether its entries follow each other in the file."""
        expected = 1
        for size, stride in zip(reversed(self.info.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def span(self) -> tuple[int, int]:
        """The bytes of the file from its first entry to its last, [begin, end)."""
        itemsize = self.info.itemsize
        begin = self.offset + self.start * itemsize
        if not self.info.numel:
            return begin, begin
        last = sum((size - 1) * stride for size, stride in zip(self.info.shape, self.stride, strict=True))
        return begin, begin + (last + 1) * itemsize

    def view(self, storage: bytearray | memoryview, begin: int) -> Tensor:
        """The tensor in ``storage``, the bytes of the file from ``begin`` on; shares its memory."""
        import torch

        info = self.info
        if not info.numel:
            return torch.empty(info.shape, dtype=info.torch_dtype)
        first = self.span[0] - begin
        flat = torch.frombuffer(storage, dtype=torch.uint8)
        typed = flat[first : first + self.span[1] - self.span[0]].view(info.torch_dtype)
        return typed.as_strided(info.shape, self.stride)

    def rows_in(self, data: memoryview) -> Array:
        """``data`` as some of the tensor's rows [r, *shape[1:]]; shares its memory."""
        return np.frombuffer(data, np.dtype(self.info.dtype)).reshape(-1, *self.info.shape[1:])


Rewrite = Callable[[BinaryIO, BinaryIO, Edits, Callable[[], str] | None], None]


@dataclass(frozen=True)
class FileCheckpoint:
    """A container that is one file; ``rewrite(source, target, edits, manifest)`` is what differs between formats.

    Without a manifest (None), the copy carries none. ``unread`` are the tensors that are not dense, and so have no slot.
    """

    path: Path
    format: str
    slots: Mapping[str, Slot]
    manifest: str | None
    rewrite: Rewrite
    unread: tuple[TensorInfo, ...] = ()

    def tensors(self) -> list[TensorInfo]:
        """See :class:`Checkpoint`."""
        return [*(slot.info for slot in self.slots.values()), *self.unread]

    def read(self, name: str) -> Tensor:
        """See :class:`Checkpoint`; raises CheckpointError where the checksum of the storage is wrong."""
        slot = self._slot(name)
        begin, end = slot.span
        if slot.crc is not None and end - begin == slot.nbytes:
            data = read_exactly(self.path, begin, end - begin)
            if zlib.crc32(data) != slot.crc:
                raise damaged(self.path, f"the checksum of '{name}' does not match")
        else:
            data = read_exactly(self.path, begin, end - begin)
        return slot.view(data, begin)

    def manifest_text(self) -> str | None:
        """See :class:`Checkpoint`."""
        return self.manifest

    def write_copy(self, target: Path, edit: Edits, manifest: Callable[[], str]) -> None:
        """See :class:`Checkpoint`."""
        for name in edit:
            self._slot(name)
        with self.path.open("rb") as source, atomic_file(target) as out:
            self.rewrite(source, out, edit, manifest)

    def _slot(self, name: str) -> Slot:
        if name not in self.slots:
            raise CheckpointError(f"{self.path}: there is no tensor '{name}' in it; see nmconvert inspect")
        return self.slots[name]


def damaged(path: Path, why: str) -> CheckpointError:
    """The error of a file that is not what its format asks for."""
    return CheckpointError(f"{path}: damaged: {why}; copy the file anew")


def read_exactly(path: Path, offset: int, count: int) -> bytearray:
    """``count`` bytes of a file from ``offset`` on.

    Raises:
        CheckpointError: the file ends before.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = bytearray(count)
        if file.readinto(data) != count:
            raise CheckpointError(f"{path}: ends too early, {count:,} bytes expected at {offset:,}; copy the file anew")
    return data


def manifest_from_bytes(data: bytes, path: Path) -> str:
    """The manifest that ``path`` holds as ``data``.

    Raises:
        CheckpointError: it is no text.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: its nmconvert manifest is damaged ({error}): start from the file that it was made from"
        ) from error


def link_shared(slots: Sequence[Slot]) -> dict[str, Slot]:
    """Slots by name, with ``shared_with`` set where two of them overlap in the file."""
    linked: dict[str, Slot] = {}
    by_storage: dict[int, list[Slot]] = {}
    for slot in slots:
        begin, end = slot.span
        neighbours = by_storage.setdefault(slot.offset, [])
        first = next((other for other in neighbours if other.span[0] < end and begin < other.span[1]), None)
        neighbours.append(slot)
        if first is not None:
            root = linked[first.info.name].info.shared_with or first.info.name
            slot = replace(slot, info=replace(slot.info, shared_with=root))
        linked[slot.info.name] = slot
    return linked
