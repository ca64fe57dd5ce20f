"""Writing past the page cache: the same bytes at the same places, and the ordinary way where there is no other."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmconvert.checkpoint import direct
from nmconvert.checkpoint.direct import Appender


@pytest.fixture(scope="module")
def small_buffer() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "BUFFER", 8192)
        yield 8192


def written(path: Path, start: int, parts: list[bytes]) -> bytes:
    """What is in ``path`` after ``parts`` were appended behind ``start`` bytes, and a mark behind them."""
    with path.open("w+b") as file:
        file.write(b"s" * start)
        with Appender(file) as out:
            for part in parts:
                out.write(memoryview(part))
        file.write(b"end")
    return path.read_bytes()


@settings(max_examples=30)
@given(start=st.integers(0, 9000), sizes=st.lists(st.integers(0, 30000), max_size=6), seed=st.integers(0, 255))
def test_the_bytes_follow_each_other(
    tmp_path_factory: pytest.TempPathFactory, small_buffer: int, start: int, sizes: list[int], seed: int
) -> None:
    parts = [bytes((seed + i) % 251 for i in range(size)) for size in sizes]
    assert written(tmp_path_factory.mktemp("direct") / "a", start, parts) == b"s" * start + b"".join(parts) + b"end"


@pytest.mark.parametrize("function", ["open", "pwrite"])
def test_where_the_file_system_cannot(
    tmp_path: Path, small_buffer: int, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, function, refuse)
    data = os.urandom(100_000)
    assert written(tmp_path / "a", 100, [data]) == b"s" * 100 + data + b"end"


def test_a_full_disk_is_told(tmp_path: Path, small_buffer: int) -> None:
    """A limit on the file's size stands in for the end of the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with (tmp_path / "a").open("w+b") as file, pytest.raises(OSError, match="File too large"), Appender(file) as out:
            out.write(memoryview(bytes(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert str(tmp_path / "a") not in map(os.path.realpath, Path("/proc/self/fd").iterdir())
