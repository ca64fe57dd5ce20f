"""What ``torch.save`` wrote before 1.6: five pickles, then the storages one after the other, each after its length.

The manifest follows the last storage: ``nmconvert.json``, its length as 8 bytes (little-endian), the JSON. torch stops
reading before it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from nmconvert.checkpoint.base import Edits, FileCheckpoint, link_shared, manifest_from_bytes
from nmconvert.checkpoint.pickles import Structure, TensorRef, read_pickle, require_trust
from nmconvert.checkpoint.stream import edited_slots, pieces, pump
from nmconvert.checkpoint.torch_zip import describe, make_slots, model_tensors, unread
from nmconvert.errors import CheckpointError
from nmconvert.manifest import MANIFEST

MAGIC = 0x1950A86A20F9469CFC6C
_TRAILER = MANIFEST.encode()


def open_torch_legacy(path: Path, *, trust: bool) -> FileCheckpoint:
    """A checkpoint in the format before zip.

    Raises:
        UntrustedFileError: it holds objects, and ``trust`` is False.
        CheckpointError: it is damaged, holds no tensors, or is of a machine with another byte order.
    """
    with path.open("rb") as file:
        magic, _version, system = (read_pickle(file, path).root for _ in range(3))
        if magic != MAGIC or not isinstance(system, dict):
            raise CheckpointError(f"{path}: damaged: no torch checkpoint behind its first bytes; copy the file anew")
        if system.get("little_endian") is False:
            raise CheckpointError(f"{path}: written on a big-endian machine; load it in torch and torch.save it here")
        structure = read_pickle(file, path)
        keys = read_pickle(file, path).root
        if structure.foreign:
            require_trust(path, describe(structure), trust=trust)
        offsets, end = _storages(file, structure, keys, path)
        manifest = _read_trailer(file, end, path)
    kind = "pickled module" if structure.foreign else "torch legacy"

    def locate(ref: TensorRef) -> tuple[int, int, None]:
        return offsets[ref.storage.key], ref.storage.nbytes, None

    tensors = model_tensors(path, structure)
    slots = link_shared(make_slots(tensors, locate))

    def rewrite(source: BinaryIO, target: BinaryIO, edits: Edits, text: Callable[[], str] | None) -> None:
        pump(source, target, pieces([(0, end)], edited_slots(slots, edits)))
        if text is not None:
            data = text().encode()
            target.write(_TRAILER + struct.pack("<Q", len(data)) + data)

    return FileCheckpoint(path, kind, slots, manifest, rewrite, unread(tensors))


def _storages(file: BinaryIO, structure: Structure, keys: Any, path: Path) -> tuple[dict[str, int], int]:
    """Where each storage's bytes begin, and where the last one's end."""
    position = file.tell()
    size = file.seek(0, 2)
    offsets = {}
    for key in map(str, keys if isinstance(keys, list) else []):
        storage = structure.storages.get(key)
        file.seek(position)
        header = file.read(8)
        if storage is None or len(header) < 8 or struct.unpack("<q", header)[0] != storage.numel:
            raise CheckpointError(f"{path}: damaged: storage {key} is not the size it should be; copy the file anew")
        offsets[key] = position + 8
        position += 8 + storage.nbytes
    if position > size or offsets.keys() != structure.storages.keys():
        raise CheckpointError(f"{path}: ends too early, {position:,} bytes expected and {size:,} there; copy the file anew")
    return offsets, position


def _read_trailer(file: BinaryIO, position: int, path: Path) -> str | None:
    file.seek(position)
    if file.read(len(_TRAILER)) != _TRAILER:
        return None
    (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    data = file.read(min(length, 1 << 30))
    return manifest_from_bytes(data, path) if len(data) == length else None
