"""What ``torch.save`` writes since 1.6: a zip archive of ``data.pkl`` and one record a storage; so is TorchScript.

The manifest is a further record, ``nmconvert.json``, which torch does not look at. Neither kind is executed to be read
(:mod:`nmconvert.checkpoint.pickles`); trust is asked for where loading the file in torch would execute it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from nmconvert.checkpoint.base import Edits, FileCheckpoint, Rewrite, Slot, link_shared, manifest_from_bytes
from nmconvert.checkpoint.pickles import Structure, TensorRef, read_pickle, require_trust, state_dicts
from nmconvert.checkpoint.stream import edited_slots
from nmconvert.checkpoint.zip_records import Archive, Record, rewrite_archive
from nmconvert.errors import CheckpointError
from nmconvert.manifest import MANIFEST
from nmconvert.tensor import TensorInfo, dtype_name


def open_torch_zip(archive: Archive, prefix: str, *, trust: bool) -> FileCheckpoint:
    """A torch checkpoint whose records lie under ``prefix`` (with a slash at its end).

    Raises:
        UntrustedFileError: it holds a program or objects, and ``trust`` is False.
        CheckpointError: it is damaged, holds no tensors, or is of a machine with another byte order.
    """
    path, records = archive.path, archive.records
    if f"{prefix}byteorder" in records and archive.read(f"{prefix}byteorder") == b"big":
        raise CheckpointError(f"{path}: written on a big-endian machine; load it in torch and torch.save it here")
    kind = "torch zip"
    if f"{prefix}constants.pkl" in records:
        require_trust(path, "a TorchScript archive, which is a program", trust=trust)
        kind = "TorchScript"
    structure = read_pickle(io.BytesIO(archive.read(f"{prefix}data.pkl")), path)
    if kind == "torch zip" and structure.foreign:
        require_trust(path, describe(structure), trust=trust)
        kind = "pickled module"
    slots = link_shared(make_slots(path, structure, lambda ref: _locate(archive, prefix, ref)))
    name = f"{prefix}{MANIFEST}"
    manifest = manifest_from_bytes(archive.read(name), path) if name in records else None

    return FileCheckpoint(path, kind, slots, manifest, rewriter(archive, slots, name))


def rewriter(archive: Archive, slots: Mapping[str, Slot], manifest: str) -> Rewrite:
    """How to write an archive again, with the manifest in the record of that name."""

    def rewrite(source: BinaryIO, target: BinaryIO, edits: Edits, text: Callable[[], str] | None) -> None:
        rewrite_archive(archive, source, target, edited_slots(slots, edits), manifest, text)

    return rewrite


def describe(structure: Structure) -> str:
    """What an untrusted file holds, for its error."""
    names = structure.foreign
    more = f" and {len(names) - 1} more kinds of object" if len(names) > 1 else ""
    return f"holds pickled Python objects ({names[0]}{more})"


def make_slots(path: Path, structure: Structure, locate: Callable[[TensorRef], tuple[int, int, int | None]]) -> Sequence[Slot]:
    """The slots of all state dicts of a pickle; ``locate`` gives offset, size and checksum of a tensor's storage.

    Raises:
        CheckpointError: there is no state dict, or objects lie too deep within each other to look for it.
    """
    try:
        found = state_dicts(structure.root)
    except RecursionError as error:
        raise CheckpointError(f"{path}: its objects are nested too deeply; save the model's state_dict() alone") from error
    if not found:
        raise CheckpointError(f"{path}: holds no state dict with tensors; save the model's state_dict() in it")
    slots = []
    for number, (where, tensors) in enumerate(found):
        for name, ref in tensors.items():
            info = TensorInfo(f"{where}/{name}" if where else name, ref.shape, dtype_name(ref.dtype), secondary=number > 0)
            offset, nbytes, crc = locate(ref)
            slots.append(Slot(info, offset, nbytes, ref.start, ref.stride, crc))
    return slots


def _locate(archive: Archive, prefix: str, ref: TensorRef) -> tuple[int, int, int]:
    record: Record | None = archive.records.get(f"{prefix}data/{ref.storage.key}")
    if record is None or record.size != ref.storage.nbytes:
        held = "missing" if record is None else f"{record.size:,} bytes"
        raise CheckpointError(
            f"{archive.path}: damaged: storage {ref.storage.key} should be {ref.storage.nbytes:,} bytes and is {held}; "
            "copy the file anew"
        )
    return archive.stored(record), record.size, record.crc
