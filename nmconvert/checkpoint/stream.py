"""Copying a file with some tensors changed on the way: read, edit and write overlap, in buffers of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from nmconvert.checkpoint.base import Edit, Edits, Slot
from nmconvert.errors import CheckpointError

BLOCK = 16 << 20  # bytes at a time: large enough for the disk, small enough to be still in cache when it is written
_BUFFERS = 4


@dataclass(frozen=True)
class Piece:
    """Bytes [begin, end) of the file, part of one of the regions, with the edits that fall into them."""

    region: int
    begin: int
    end: int
    edits: tuple[tuple[Slot, Edit, tuple[int, int] | None], ...] = ()  # rows of the slot, None: all of it


def edited_slots(slots: Mapping[str, Slot], edits: Edits) -> list[list[tuple[Slot, Edit]]]:
    """The edits that must be made together, because their tensors overlap, in file order."""
    chosen = sorted(((slots[name], edit) for name, edit in edits.items()), key=lambda pair: pair[0].span)
    groups: list[list[tuple[Slot, Edit]]] = []
    end = -1
    for slot, edit in chosen:
        begin, stop = slot.span
        if begin < end:
            groups[-1].append((slot, edit))
        elif stop > begin:
            groups.append([(slot, edit)])
        end = max(end, stop)
    return groups


def pieces(regions: Sequence[tuple[int, int]], groups: Sequence[list[tuple[Slot, Edit]]]) -> Iterator[Piece]:
    """Cut ``regions`` of the file (ascending) into pieces; a group of edits lies within one region."""
    waiting = list(reversed(groups))
    for index, (begin, end) in enumerate(regions):
        position = begin
        while waiting and waiting[-1][0][0].span[0] < end:
            group = waiting.pop()
            first, last = group[0][0].span[0], max(slot.span[1] for slot, _ in group)
            yield from _plain(index, position, first)
            yield from _edited(index, first, last, group)
            position = last
        yield from _plain(index, position, end)


def _plain(region: int, begin: int, end: int) -> Iterator[Piece]:
    for start in range(begin, end, BLOCK):
        yield Piece(region, start, min(start + BLOCK, end))


def _edited(region: int, begin: int, end: int, group: list[tuple[Slot, Edit]]) -> Iterator[Piece]:
    slot, edit = group[0]
    block_rows: int = getattr(edit, "block_rows", 0)
    if len(group) > 1 or block_rows <= 0 or end - begin <= BLOCK or not slot.is_contiguous:
        yield Piece(region, begin, end, tuple((slot, edit, None) for slot, edit in group))
        return
    rows = slot.info.shape[0]
    row_bytes = (end - begin) // rows
    step = max(1, BLOCK // row_bytes // block_rows) * block_rows
    for row in range(0, rows, step):
        stop = min(row + step, rows)
        yield Piece(region, begin + row * row_bytes, begin + stop * row_bytes, ((slot, edit, (row, stop)),))


def pump(
    source: BinaryIO,
    pieces: Iterator[Piece],
    *,
    write: Callable[[Piece, memoryview], None],
    check: Callable[[Piece, memoryview], None] = lambda piece, data: None,
) -> None:
    """Read each piece, ``check`` it as it was, edit it, ``write`` it; three stages that overlap, each in file order.

    Raises:
        CheckpointError: the file ends too early, or an edit returned a tensor of another shape or dtype.
    """
    buffers = [bytearray() for _ in range(_BUFFERS)]
    written: list[Future[None] | None] = [None] * _BUFFERS

    def read(index: int, piece: Piece) -> memoryview:
        size = piece.end - piece.begin
        if len(buffers[index]) < size:
            buffers[index] = bytearray(size)
        data = memoryview(buffers[index])[:size]
        source.seek(piece.begin)
        if source.readinto(data) != size:  # type: ignore[attr-defined]
            raise CheckpointError(f"{source.name}: ends too early, {piece.end:,} bytes expected; copy the file anew")
        check(piece, data)
        return data

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        try:
            upcoming: Future[memoryview] | None = None
            previous: Piece | None = None
            for count, piece in enumerate(pieces):
                index = count % _BUFFERS
                if (busy := written[index]) is not None:
                    busy.result()
                following = reader.submit(read, index, piece)
                if upcoming is not None and previous is not None:
                    written[(count - 1) % _BUFFERS] = writer.submit(write, previous, _apply(previous, upcoming.result()))
                upcoming, previous = following, piece
            if upcoming is not None and previous is not None:
                writer.submit(write, previous, _apply(previous, upcoming.result())).result()
            for future in written:
                if future is not None:
                    future.result()
        finally:
            writer.shutdown(cancel_futures=True)


def _apply(piece: Piece, data: memoryview) -> memoryview:
    for slot, edit, rows in piece.edits:
        if rows is None:
            tensor = slot.view(data, piece.begin)
        else:
            tensor = torch.frombuffer(data, dtype=slot.info.dtype).view(rows[1] - rows[0], *slot.info.shape[1:])
        changed = edit(tensor)
        _same_kind(slot, tensor, changed)
        if changed is not tensor:
            tensor.copy_(changed)
    return data


def _same_kind(slot: Slot, before: Tensor, after: Tensor) -> None:
    if after.shape != before.shape or after.dtype != before.dtype:
        raise CheckpointError(
            f"'{slot.info.name}': {list(before.shape)} {before.dtype} cannot become {list(after.shape)} {after.dtype}"
        )
