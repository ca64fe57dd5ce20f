"""Zip archives whose records are stored, not compressed: where each lies, and how a copy gets new bytes and checksums.

Only what PyTorch's own reader relies on is accepted; what differs between the central directory and the bytes, or lies
over something else, is an error. After PKWARE's APPNOTE 6.3.10.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nmconvert.checkpoint.base import Edit, Slot, damaged
from nmconvert.checkpoint.stream import Piece, pieces, pump
from nmconvert.errors import CheckpointError

_LOCAL, _CENTRAL, _END, _END64, _LOCATOR64, _DESCRIPTOR = (
    b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08",
)  # fmt: skip
_STORED, _DEFLATED = 0, 8
_STREAMED = 1 << 3  # the checksum follows the data
_ENCRYPTED = 1 << 0
_MAX32, _MAX16 = 0xFFFFFFFF, 0xFFFF


_LARGE = 1 << 24  # bytes
_MOST_INFLATED = 100  # times: texts come to twenty, what is made to fill memories to a thousand


@dataclass(frozen=True)
class Record:
    """One record: its data is ``packed`` bytes at ``offset``, and ``size`` when they are unpacked, with checksum ``crc``.

    ``entry`` is its part of the central directory.
    """

    name: str
    header: int
    offset: int
    size: int
    packed: int
    crc: int
    flags: int
    method: int
    entry: bytes

    @property
    def end(self) -> int:
        """Where its data ends."""
        return self.offset + self.packed


@dataclass(frozen=True)
class Archive:
    """The records of a zip file, in the order of the file, and where its central directory begins."""

    path: Path
    records: Mapping[str, Record]
    directory: int

    def read(self, name: str) -> bytes:
        """One record, whose checksum is verified."""
        record = self.records[name]
        with self.path.open("rb") as file:
            file.seek(record.offset)
            data = file.read(record.packed)
        if record.method == _DEFLATED:
            data = self._inflate(record, data)
        if zlib.crc32(data) != record.crc:
            raise damaged(self.path, f"the checksum of '{name}' does not match")
        return data

    def stored(self, record: Record) -> int:
        """The offset of a record that can be read and changed in place.

        Raises:
            CheckpointError: it is compressed.
        """
        if record.method != _STORED:
            raise CheckpointError(
                f"{self.path}: '{record.name}' is compressed; load the file in torch and torch.save it once more"
            )
        return record.offset

    def _inflate(self, record: Record, data: bytes) -> bytes:
        if record.size > _LARGE and record.size > _MOST_INFLATED * len(data):
            raise damaged(self.path, f"'{record.name}', {len(data):,} bytes, would unpack to {record.size:,}")
        try:
            unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, record.size + 1)
        except zlib.error as error:
            raise damaged(self.path, f"'{record.name}' cannot be unpacked") from error
        if len(unpacked) != record.size:
            raise damaged(self.path, f"'{record.name}' is not the size it should be")
        return unpacked


def open_archive(path: Path) -> Archive:
    """Read the central directory of ``path`` and check it against the records.

    Raises:
        CheckpointError: not a whole zip file, or one whose records are encrypted or overlap.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        directory, length, count = _find_directory(file, size, path)
        file.seek(directory)
        raw = file.read(length)
        records: dict[str, Record] = {}
        position = 0
        try:
            for _ in range(count):
                record, position = _read_entry(file, raw, position, path)
                if record.name in records:
                    raise damaged(path, f"two records are called '{record.name}'")
                records[record.name] = record
        except (struct.error, UnicodeDecodeError) as error:
            raise damaged(path, "its directory is cut short") from error
    ordered = sorted(records.values(), key=lambda record: record.header)
    for record, following in zip(ordered, [*(r.header for r in ordered[1:]), directory], strict=True):
        if record.end > following:
            raise damaged(path, f"'{record.name}' lies over the record that follows")
    return Archive(path, {record.name: record for record in ordered}, directory)


def _find_directory(file: BinaryIO, size: int, path: Path) -> tuple[int, int, int]:
    """(offset, length, number of entries) of the central directory."""
    tail = min(size, 22 + _MAX16)
    file.seek(size - tail)
    data = file.read(tail)
    end = data.rfind(_END)
    if end < 0 or len(data) - end < 22:
        raise damaged(path, "it ends before its directory (an incomplete download?)")
    count, length, offset = struct.unpack_from("<HII", data, end + 10)
    end += size - tail
    stop = end
    file.seek(max(0, end - 20))
    locator = file.read(20)
    if locator[:4] == _LOCATOR64 and end >= 20:
        (end64,) = struct.unpack_from("<Q", locator, 8)
        file.seek(min(end64, size))
        record = file.read(56)
        if record[:4] != _END64 or len(record) < 56:
            raise damaged(path, "the end of its directory is not where it should be")
        count, length, offset = struct.unpack_from("<QQQ", record, 32)
        stop = end64
    if offset + length > stop:
        raise damaged(path, "its directory is not where it should be")
    return offset, length, count


def _read_entry(file: BinaryIO, raw: bytes, position: int, path: Path) -> tuple[Record, int]:
    fields = struct.unpack_from("<4sHHHHHHIIIHHHHHII", raw, position)
    signature, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size, _, _, _, header = fields
    end = position + 46 + name_size + extra_size + comment_size
    if signature != _CENTRAL or end > len(raw):
        raise damaged(path, "its directory is cut short")
    name = raw[position + 46 : position + 46 + name_size].decode()
    extra = raw[position + 46 + name_size : position + 46 + name_size + extra_size]
    size, packed, header = _zip64(extra, size, packed, header)
    if method not in (_STORED, _DEFLATED) or (method == _STORED and size != packed):
        raise damaged(path, f"'{name}' is packed in an unknown way")
    if flags & _ENCRYPTED:
        raise CheckpointError(f"{path}: '{name}' is encrypted; unpack the archive with its password first")
    file.seek(header)
    local = file.read(30)
    if len(local) < 30 or local[:4] != _LOCAL:
        raise damaged(path, f"'{name}' is not where the directory says")
    local_name, local_extra = struct.unpack_from("<HH", local, 26)
    if file.read(local_name) != raw[position + 46 : position + 46 + name_size]:
        raise damaged(path, f"'{name}' has another name in its own header")
    offset = header + 30 + local_name + local_extra
    return Record(name, header, offset, size, packed, crc, flags, method, raw[position:end]), end


def _zip64(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Sizes and offset, from the zip64 field where they do not fit into 32 bits."""
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, position)
        if tag == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            size = next(wide, size) if size == _MAX32 else size
            packed = next(wide, packed) if packed == _MAX32 else packed
            header = next(wide, header) if header == _MAX32 else header
        position += 4 + length
    return size, packed, header


def rewrite_archive(
    archive: Archive,
    source: BinaryIO,
    target: BinaryIO,
    groups: Sequence[list[tuple[Slot, Edit]]],
    appended: str,
    text: Callable[[], str] | None,
) -> None:
    """Copy the archive, with edits made in its records, and one record more, ``appended``, made and written last.

    All that was there stays where it was; only edited data and its checksums change. An earlier record of the name of
    the appended one is dropped.
    """
    records = list(archive.records.values())
    # Ours is the last one, and makes room; should another program have moved it, its bytes stay behind, unlisted.
    stop = records[-1].header if records[-1].name == appended else archive.directory
    records = [record for record in records if record.name != appended]
    regions, owner = _regions(records, stop)
    changing = {index for index, record in enumerate(records) if _is_edited(record, groups)}
    old, new = [0] * len(records), [0] * len(records)  # checksums

    def check(piece: Piece, data: memoryview) -> None:
        index = owner[piece.region]
        if index is None or records[index].method != _STORED:
            return
        old[index] = zlib.crc32(data, old[index])
        if piece.end == records[index].end and old[index] != records[index].crc:
            raise damaged(archive.path, f"the checksum of '{records[index].name}' does not match")

    def count(piece: Piece, data: memoryview) -> None:
        index = owner[piece.region]
        if index is not None and index in changing:
            new[index] = zlib.crc32(data, new[index])

    pump(source, target, pieces(regions, groups), before=check, after=count)
    entries = [record.entry for record in records]
    for index in changing:
        _patch_crc(source, target, records[index], new[index])
        entries[index] = entries[index][:16] + struct.pack("<I", new[index]) + entries[index][20:]
    target.seek(stop)
    if text is not None:
        entries.append(_append(target, appended, text().encode()))
    _write_directory(target, entries)


def _regions(records: Sequence[Record], stop: int) -> tuple[list[tuple[int, int]], list[int | None]]:
    """Cut [0, stop) into records' data and what is between; for each region the record that it is the data of."""
    regions: list[tuple[int, int]] = []
    owner: list[int | None] = []
    position = 0
    for index, record in enumerate(records):
        regions += [(position, record.offset), (record.offset, record.end)]
        owner += [None, index]
        position = record.end
    return [*regions, (position, stop)], [*owner, None]


def _is_edited(record: Record, groups: Sequence[list[tuple[Slot, Edit]]]) -> bool:
    return any(record.offset <= group[0][0].offset < record.end for group in groups)


def _patch_crc(source: BinaryIO, target: BinaryIO, record: Record, crc: int) -> None:
    if not record.flags & _STREAMED:
        target.seek(record.header + 14)
        target.write(struct.pack("<I", crc))
        return
    source.seek(record.end)
    descriptor = source.read(8)
    # Its signature is optional; without one, four bytes that are the old checksum are the descriptor.
    for shift, expected in ((4, _DESCRIPTOR + struct.pack("<I", record.crc)), (0, struct.pack("<I", record.crc))):
        if descriptor.startswith(expected):
            target.seek(record.end + shift)
            target.write(struct.pack("<I", crc))
            return


def _append(target: BinaryIO, name: str, data: bytes) -> bytes:
    """Write a stored record at the end of ``target``; returns its entry of the directory."""
    header = target.tell()
    encoded = name.encode()
    crc = zlib.crc32(data)
    common = struct.pack("<HHHHHIIIH", 20, 1 << 11, 0, 0, 0x21, crc, len(data), len(data), len(encoded))
    target.write(_LOCAL + common + struct.pack("<H", 0) + encoded + data)
    wide = struct.pack("<HHQ", 1, 8, header) if header >= _MAX32 else b""
    tail = struct.pack("<HHHHII", len(wide), 0, 0, 0, 0, min(header, _MAX32))
    return _CENTRAL + struct.pack("<H", 20) + common + tail + encoded + wide


def _write_directory(target: BinaryIO, entries: Sequence[bytes]) -> None:
    start = target.tell()
    for entry in entries:
        target.write(entry)
    end, count = target.tell(), len(entries)
    target.write(_END64 + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, end - start, start))
    target.write(_LOCATOR64 + struct.pack("<IQI", 0, end, 1))
    small = (min(count, _MAX16), min(count, _MAX16), min(end - start, _MAX32), min(start, _MAX32))
    target.write(_END + struct.pack("<HHHHIIH", 0, 0, *small, 0))
