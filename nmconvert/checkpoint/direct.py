"""Writing large files past the page cache (O_DIRECT).

What is written once and not read again soon has no use for the page cache, but pays for it: on the machine where this was
measured a stream of blocks reaches the disk at 2 to 3 GB/s so (3 where several are under way, 2.5 one after the other), and at
1 to 1.5 GB/s through the cache, with one core busy copying. Nothing is left to be flushed at the end, either.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 4096  # of addresses, offsets and sizes; no block device asks for more
BUFFER = 4 << 20  # bytes at a time; a file that is smaller is written in the ordinary way
_BUFFERS = 4


class Appender:
    """Writes on at the end of ``file``; :meth:`close` leaves the file's position behind what was written.

    One buffer is filled while the other ones are written. Where the file system knows nothing of O_DIRECT, or the file is
    small, all goes through the page cache.
    """

    def __init__(self, file: BinaryIO) -> None:
        file.flush()
        self._file = file
        self._position = file.tell()  # of what is in the buffer
        self._buffer = _aligned(BUFFER)
        self._filled = 0
        self._limit = BUFFER - self._position % _ALIGNMENT  # the first write ends where a page does: the others begin at one
        self._descriptor = _reopened(file)
        self._directly = self._descriptor is not None
        self._lock = Lock()  # of the file's position
        self._threads = ThreadPoolExecutor(_BUFFERS - 1)
        self._pending: deque[tuple[Future[None], npt.NDArray[np.uint8]]] = deque()

    def write(self, data: memoryview) -> None:
        """Append ``data``."""
        left = np.frombuffer(data, np.uint8)
        while len(left):
            taken = min(len(left), self._limit - self._filled)
            self._buffer[self._filled : self._filled + taken] = left[:taken]  # without the interpreter's lock
            self._filled += taken
            left = left[taken:]
            if self._filled == self._limit:
                self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        while self._pending:
            self._finished()
        self._file.seek(self._position)

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._threads.shutdown()
            if self._descriptor is not None:
                os.close(self._descriptor)

    def _flush(self) -> None:
        data = self._buffer[: self._filled].data
        self._pending.append((self._threads.submit(self._write_out, data, self._position), self._buffer))
        self._buffer = _aligned(BUFFER) if len(self._pending) < _BUFFERS else self._finished()
        self._position += self._filled
        self._filled, self._limit = 0, BUFFER

    def _finished(self) -> npt.NDArray[np.uint8]:
        """The buffer that was written longest ago."""
        written, buffer = self._pending.popleft()
        written.result()
        return buffer

    def _write_out(self, data: memoryview, position: int) -> None:
        if len(data) < BUFFER or not self._write_directly(data, position):
            with self._lock:
                self._file.seek(position)
                self._file.write(data)

    def _write_directly(self, data: memoryview, position: int) -> bool:
        """False where the file system allows no direct writing."""
        written = 0
        while self._directly and self._descriptor is not None and written < len(data):
            try:
                written += os.pwrite(self._descriptor, data[written:], position + written)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._directly = False
        return written == len(data)


def _aligned(size: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)  # a mapping begins at a page


def _reopened(file: BinaryIO) -> int | None:
    """A second descriptor of the same file, for direct writing; None where there is no such thing."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(f"/proc/self/fd/{file.fileno()}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
