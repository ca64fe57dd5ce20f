"""safetensors: 8 bytes of header length, a JSON header, the tensors' bytes; the manifest is in its ``__metadata__``.

Read and written here rather than by the safetensors package, which maps the file into memory and writes only what is
in memory as a whole. The header comes first, but the manifest is known last: room is left for it, filled with the
spaces that the format allows behind the JSON, and if the room was not enough, the data moves back once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from nmconvert.checkpoint.base import Edits, FileCheckpoint, Slot, damaged, link_shared
from nmconvert.checkpoint.stream import BLOCK, edited_slots, pieces, pump
from nmconvert.errors import CheckpointError
from nmconvert.manifest import METADATA_KEY
from nmconvert.tensor import TensorInfo

_MAX_HEADER = 100_000_000  # the format's own limit
_ROOM, _ROOM_PER_TENSOR = 2048, 320

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (9 bytes or more) is one."""
    return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _MAX_HEADER


def open_safetensors(path: Path) -> FileCheckpoint:
    """A safetensors file.

    Raises:
        CheckpointError: its header is not what the format asks for, or the file is cut short.
    """
    header, begin = _read_header(path)
    size = path.stat().st_size
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata is not a table of strings")
    manifest = metadata.pop(METADATA_KEY, None)
    slots = sorted(
        (_slot(path, name, entry, begin) for name, entry in header.items()), key=lambda slot: (slot.offset, slot.nbytes)
    )
    position = begin
    for slot in slots:
        if slot.offset != position:
            raise damaged(path, f"'{slot.info.name}' begins at byte {slot.offset:,} and not at {position:,}")
        position += slot.nbytes
    if position != size:
        raise damaged(path, f"it should be {position:,} bytes and is {size:,}")

    def rewrite(source: BinaryIO, target: BinaryIO, edits: Edits, text: Callable[[], str] | None) -> None:
        room = _ROOM + sum(_ROOM_PER_TENSOR + len(name) for name in header)
        start = _padded(8 + len(_encode(header, metadata)) + (room if text else 0))
        target.seek(start)
        pump(source, target, pieces([(begin, size)], edited_slots(by_name, edits)))
        encoded = _encode(header, {**metadata, METADATA_KEY: text()} if text else metadata)
        if 8 + len(encoded) > start:
            needed = _padded(8 + len(encoded))
            _move_back(target, start, size - begin, needed - start)
            start = needed
        target.seek(0)
        target.write(struct.pack("<Q", start - 8) + encoded.ljust(start - 8))

    by_name = link_shared(slots)
    return FileCheckpoint(path, "safetensors", by_name, manifest, rewrite)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise damaged(path, f"a header of {length:,} bytes")
        data = file.read(length)
    if len(data) < length:
        raise damaged(path, f"it ends within its header, after {8 + len(data):,} of {8 + length:,} bytes")
    try:
        header = json.loads(data.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not JSON ({str(error)[:80]})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a table")
    return header, 8 + length


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"'{name}' is there twice")
        table[name] = value
    return table


def _slot(path: Path, name: str, entry: Any, begin: int) -> Slot:
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(path, f"the header says too little about '{name}'") from error
    dtype = _DTYPES.get(str(kind))
    if dtype is None:
        raise CheckpointError(f"{path}: '{name}' has dtype {kind!r:.20}, which nmconvert does not know; leave it out")
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise damaged(path, f"the header gives no proper shape or place of '{name}'")
    info = TensorInfo(name, shape, dtype)
    if last - first != info.nbytes:
        raise damaged(path, f"'{name}' {list(shape)} {kind} cannot be {last - first:,} bytes")
    stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Slot(info, begin + first, last - first, 0, stride)


def _encode(header: dict[str, Any], metadata: dict[str, str]) -> bytes:
    table = {"__metadata__": metadata, **header} if metadata else header
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def _move_back(file: BinaryIO, start: int, length: int, distance: int) -> None:
    """Move ``length`` bytes at ``start`` by ``distance``, the last ones first."""
    for begin in reversed(range(start, start + length, BLOCK)):
        file.seek(begin)
        data = file.read(min(BLOCK, start + length - begin))
        file.seek(begin + distance)
        file.write(data)
