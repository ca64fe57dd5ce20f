"""What ``torch.save`` writes since 1.6: a zip archive of ``data.pkl`` and one record a storage; so is TorchScript.

The manifest is a further record, ``nmconvert.json``, which torch does not look at. Neither kind is executed to be read
(:mod:`nmconvert.checkpoint.pickles`); trust is asked for where loading the file in torch would execute it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO

from nmconvert.checkpoint.base import Edits, FileCheckpoint, Rewrite, Slot, link_shared, manifest_from_bytes
from nmconvert.checkpoint.pickles import AnyTensor, OtherTensor, Structure, TensorRef, read_pickle, require_trust, state_dicts
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
    tensors = model_tensors(path, structure)
    slots = link_shared(make_slots(tensors, lambda ref: _locate(archive, prefix, ref)))
    name = f"{prefix}{MANIFEST}"
    manifest = manifest_from_bytes(archive.read(name), path) if name in records else None

    return FileCheckpoint(path, kind, slots, manifest, rewriter(archive, slots, name), unread(tensors))


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


def model_tensors(path: Path, structure: Structure) -> list[tuple[TensorInfo, AnyTensor]]:
    """The tensors of all state dicts of a pickle, each with what is known of it.

    Raises:
        CheckpointError: there is no state dict, or objects lie too deep within each other to look for it.
    """
    try:
        found = state_dicts(structure.root)
    except RecursionError as error:
        raise CheckpointError(f"{path}: its objects are nested too deeply; save the model's state_dict() alone") from error
    if not found:
        raise CheckpointError(f"{path}: holds no state dict with tensors; save the model's state_dict() in it")
    return [
        (_info(f"{where}/{name}" if where else name, ref, secondary=number > 0), ref)
        for number, (where, tensors) in enumerate(found)
        for name, ref in tensors.items()
    ]


def _info(name: str, ref: AnyTensor, *, secondary: bool) -> TensorInfo:
    if isinstance(ref, OtherTensor):
        reason = f"{ref.kind}: only dense ones are pruned"
        return TensorInfo(name, ref.shape, "uint8", secondary=secondary, reason=reason, unread=True)
    shared = "its entries share memory (expanded): save it .contiguous() to have it pruned" if _overlaps(ref) else None
    return TensorInfo(name, ref.shape, dtype_name(ref.dtype), secondary=secondary, reason=shared)


def _overlaps(ref: TensorRef) -> bool:
    """Whether two entries lie in one place, so that they cannot be changed apart."""
    steps = [(size, step) for size, step in zip(ref.shape, ref.stride, strict=True) if size > 1]
    extent = 1 + sum((size - 1) * step for size, step in steps)
    return any(step == 0 for _, step in steps) or prod(ref.shape) > extent


def make_slots(
    tensors: Sequence[tuple[TensorInfo, AnyTensor]], locate: Callable[[TensorRef], tuple[int, int, int | None]]
) -> Sequence[Slot]:
    """The slots of those that are dense; ``locate`` gives offset, size and checksum of a tensor's storage."""
    slots = []
    for info, ref in tensors:
        if isinstance(ref, TensorRef):
            offset, nbytes, crc = locate(ref)
            slots.append(Slot(info, offset, nbytes, ref.start, ref.stride, crc))
    return slots


def unread(tensors: Sequence[tuple[TensorInfo, AnyTensor]]) -> tuple[TensorInfo, ...]:
    """Those that are not dense."""
    return tuple(info for info, _ in tensors if info.unread)


def _locate(archive: Archive, prefix: str, ref: TensorRef) -> tuple[int, int, int]:
    record: Record | None = archive.records.get(f"{prefix}data/{ref.storage.key}")
    if record is None or record.size != ref.storage.nbytes:
        held = "missing" if record is None else f"{record.size:,} bytes"
        raise CheckpointError(
            f"{archive.path}: damaged: storage {ref.storage.key} should be {ref.storage.nbytes:,} bytes and is {held}; "
            "copy the file anew"
        )
    return archive.stored(record), record.size, record.crc
