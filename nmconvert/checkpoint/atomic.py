"""Files and folders that appear whole or not at all.

What is being written carries the name ``.<final name>.<random>.nmconvert-part`` in the final folder, and is locked
(flock) as long as its writer lives. It gets its final name by one rename after everything is on the disk. What a killed
process left behind is not locked, and is removed by the next one that writes to the same name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nmconvert.errors import CheckpointError

_SUFFIX = ".nmconvert-part"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def is_partial(path: Path) -> bool:
    """Whether ``path`` is the temporary name of something unfinished."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes ``target`` when the block ends, and vanishes when it raises.

    Raises:
        CheckpointError: the folder is not there or not writable, or the disk is full.
    """
    target = Path(os.path.realpath(target))
    with _one_line(target):
        if target.is_dir():
            raise CheckpointError(f"{target}: is a folder; give the name of a file with --output")
        if target.exists() and not target.is_file():
            raise CheckpointError(
                f"{target}: is a device or a pipe, which no file can replace; give another name with --output"
            )
        _remove_leftovers(target)
        partial = _partial_name(target)
        try:
            # 0o666 less the umask, as any program would create it (tempfile makes private files).
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with open(partial, "w+b", opener=lambda *_: descriptor) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                partial.replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()
            raise
        _sync(target.parent)


@contextmanager
def atomic_folder(target: Path, *, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder that becomes ``target`` when the block ends, and vanishes when it raises.

    An existing ``target`` is replaced if it is empty or ``replaceable(target)``: nobody's home folder is swept away.

    Raises:
        CheckpointError: ``target`` is in the way, cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(target))
    with _one_line(target):
        if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or replaceable(target))):
            raise CheckpointError(f"{target}: exists and was not written by nmconvert; give another name with --output")
        _remove_leftovers(target)
        partial = _partial_name(target)
        try:
            partial.mkdir()
            with _opened(partial) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield partial
                for file in [*partial.rglob("*"), partial]:
                    _sync(file)
                _swap_in(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(target.parent)


def _partial_name(target: Path) -> Path:
    # A name may take 255 bytes; ours must fit where the target's does.
    room = 255 - len(_SUFFIX) - 10
    stem = os.fsencode(target.name)[:room].decode(errors="ignore")  # a name need not be UTF-8
    return target.with_name(f".{stem}.{secrets.token_hex(4)}{_SUFFIX}")


def _remove_leftovers(target: Path) -> None:
    prefix = _partial_name(target).name.removesuffix(_SUFFIX)[:-8]
    for entry in target.parent.iterdir():
        if not (entry.name.startswith(prefix) and len(entry.name) == len(prefix) + 8 + len(_SUFFIX) and is_partial(entry)):
            continue
        # What is not locked has no writer any more.
        with contextlib.suppress(BlockingIOError, FileNotFoundError), _opened(entry) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _swap_in(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    # One system call exchanges the two names, so that there is a whole folder under the final one at any moment.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, bytes(partial), _AT_FDCWD, bytes(target), _RENAME_EXCHANGE) != 0:
        raise CheckpointError(
            f"{target}: exists, and {os.strerror(ctypes.get_errno())} on exchanging it for the new one; remove it first"
        )
    shutil.rmtree(partial)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _one_line(target: Path) -> Iterator[None]:
    """Turn what the system says about writing ``target`` into one line that can be acted on."""
    try:
        yield
    except OSError as error:
        # A copy that finds the disk full names the file that it read.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = f"{os.strerror(error.errno).lower()}; free some space, or choose another folder with --output"
        elif error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(target.parent):
            raise  # it is not about what is written
        elif isinstance(error, FileNotFoundError) and not target.parent.is_dir():
            why = "its folder does not exist; create it, or choose another with --output"
        elif error.errno in _UNWRITABLE:
            why = f"{(error.strerror or str(error)).lower()}; choose another folder with --output"
        else:
            raise
        raise CheckpointError(f"{target}: cannot be written: {why}") from error
