"""Copying a file with some tensors changed on the way: read, edit and write overlap, in buffers of bounded size."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from nmconvert.arrays import as_array
from nmconvert.checkpoint.base import Edit, Edits, Slot
from nmconvert.checkpoint.direct import Appender
from nmconvert.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2 << 20  # bytes at a time: large enough for the disk, small enough to stay in the cache from stage to stage
_WAITING = 4  # blocks that were read or edited ahead
_MAX_WORKERS = 8


@dataclass(frozen=True)
class Piece:
    """Bytes [begin, end) of the file, part of one of the regions, with the edits that fall into them."""

    region: int
    begin: int
    end: int
    edits: tuple[tuple[Slot, Edit], ...] = ()
    rows: bool = False  # whether it is a block of rows of the one slot that is edited, or the whole of all that are


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
    if len(group) > 1 or block_rows <= 0 or not slot.is_contiguous:
        yield Piece(region, begin, end, tuple(group))
        return
    rows = slot.info.shape[0]
    row_bytes = (end - begin) // rows
    step = max(1, BLOCK // row_bytes // block_rows) * block_rows
    for row in range(0, rows, step):
        stop = min(row + step, rows)
        yield Piece(region, begin + row * row_bytes, begin + stop * row_bytes, ((slot, edit),), rows=True)


def pump(
    source: BinaryIO,
    target: BinaryIO,
    pieces: Iterator[Piece],
    *,
    before: Callable[[Piece, memoryview], None] | None = None,
    after: Callable[[Piece, memoryview], None] | None = None,
) -> None:
    """Append each piece to ``target``: read, looked at by ``before``, edited, sealed, looked at by ``after``, and written.

    The stages overlap. Reading, sealing and writing go through the file in order, each in a thread of its own. Blocks of rows
    are edited by as many threads as there are cores; whole tensors one after the other, with all cores.

    Raises:
        CheckpointError: the file ends too early, or an edit returned a tensor of another shape or dtype.
    """
    workers = min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
    budget, in_flight = (workers + _WAITING) * BLOCK, 0
    reader, editor, sealer, writer = (ThreadPoolExecutor(1) for _ in range(4))
    blocks = ThreadPoolExecutor(workers)
    writes: deque[tuple[Future[None], int]] = deque()
    free: deque[bytearray] = deque()
    try:
        with Appender(target) as out:
            for piece in pieces:
                size = max(piece.end - piece.begin, BLOCK)
                while writes and (in_flight + size > budget or writes[0][0].done()):
                    future, written = writes.popleft()
                    future.result()
                    in_flight -= written
                buffer = free.pop() if free and size == BLOCK else bytearray(size)
                ready = reader.submit(_read, source, piece, buffer, before)
                if piece.edits:
                    ready = (blocks if piece.rows else editor).submit(_apply, piece, ready)
                if piece.edits or after:
                    ready = sealer.submit(_seal, piece, ready, after)
                writes.append((writer.submit(_write, out, ready), size))
                if size == BLOCK:
                    writes[-1][0].add_done_callback(partial(_give_back, free, buffer))
                in_flight += size
            for future, _ in writes:
                future.result()
    finally:
        for executor in (reader, editor, blocks, sealer, writer):
            executor.shutdown(cancel_futures=True)


def _give_back(free: deque[bytearray], buffer: bytearray, written: Future[None]) -> None:
    free.append(buffer)


def _read(source: BinaryIO, piece: Piece, buffer: bytearray, before: Callable[[Piece, memoryview], None] | None) -> memoryview:
    size = piece.end - piece.begin
    data = memoryview(buffer)[:size]
    source.seek(piece.begin)
    if source.readinto(data) != size:  # type: ignore[attr-defined]
        raise CheckpointError(f"{source.name}: ends too early, {piece.end:,} bytes expected; copy the file anew")
    if before:
        before(piece, data)
    return data


def _seal(piece: Piece, edited: Future[memoryview], after: Callable[[Piece, memoryview], None] | None) -> memoryview:
    data = edited.result()
    for slot, edit in piece.edits:
        if hasattr(edit, "seal"):
            edit.seal(slot.rows_in(data) if piece.rows else as_array(slot.view(data, piece.begin)))
    if after:
        after(piece, data)
    return data


def _write(out: Appender, ready: Future[memoryview]) -> None:
    out.write(ready.result())


def _apply(piece: Piece, read: Future[memoryview]) -> memoryview:
    data = read.result()
    for slot, edit in piece.edits:
        if piece.rows:
            edit.edit_rows(slot.rows_in(data))  # type: ignore[attr-defined]
        else:
            _edit_whole(slot, edit, slot.view(data, piece.begin))
    return data


def _edit_whole(slot: Slot, edit: Edit, tensor: Tensor) -> None:
    import torch

    with torch.no_grad():
        changed = edit(tensor)
    _same_kind(slot, tensor, changed)
    if changed.data_ptr() != tensor.data_ptr():  # a view of a 1×1 filter, changed in place, is there already
        tensor.copy_(changed)


def _same_kind(slot: Slot, before: Tensor, after: Tensor) -> None:
    if after.shape != before.shape or after.dtype != before.dtype:
        raise CheckpointError(
            f"'{slot.info.name}': {list(before.shape)} {before.dtype} cannot become {list(after.shape)} {after.dtype}"
        )
