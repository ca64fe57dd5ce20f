"""Files and folders appear whole or not at all: full disks, kills, races, and folders that cannot be written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
from pathlib import Path
from typing import BinaryIO

import pytest
from containers import keep_writing, kill_after, names

from nmconvert.checkpoint import atomic
from nmconvert.checkpoint.atomic import atomic_file, atomic_folder, is_partial
from nmconvert.errors import CheckpointError


def never(path: Path) -> bool:
    return False


def always(path: Path) -> bool:
    return True


def write_and_fail(file: BinaryIO, error: type[BaseException]) -> None:
    file.write(b"new")
    raise error


def test_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with atomic_file(target) as file:
        file.write(b"new")
        assert [is_partial(path) for path in tmp_path.iterdir()] == [True]
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with atomic_file(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    (tmp_path / "b").symlink_to("a")
    for name in names(tmp_path):
        with pytest.raises(CheckpointError, match="is a device or a pipe"), atomic_file(tmp_path / name):
            pass
    assert (tmp_path / "a").is_fifo()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_file(target) as file:
        write_and_fail(file, error)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "real")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "real").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, ".hidden", "with space"])
def test_any_name(tmp_path: Path, name: str) -> None:
    with atomic_file(tmp_path / name) as file:
        file.write(b"x")
    assert names(tmp_path) == [name]


def test_missing_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="its folder does not exist; create it, or choose another with --output"),
        atomic_file(tmp_path / "no" / "a"),
    ):
        pass


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    for target in (tmp_path / "taken" / "a", tmp_path / "taken" / "b" / "c"):
        with pytest.raises(CheckpointError, match="cannot be written"), atomic_file(target):
            pass
        with pytest.raises(CheckpointError, match="cannot be written"), atomic_folder(target, replaceable=never):
            pass


def test_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder; give the name of a file"), atomic_file(tmp_path):
        pass


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="needs a folder that even root cannot write: /sys")
def test_folder_that_cannot_be_written() -> None:
    with (
        pytest.raises(CheckpointError, match=r"/sys/a: cannot be written: .*; choose another folder"),
        atomic_file(Path("/sys/a")),
    ):
        pass


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root nothing is forbidden, so the system's answer is played here."""

    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic.os, "open", refuse)
    with (
        pytest.raises(CheckpointError, match="permission denied; choose another folder with --output"),
        atomic_file(tmp_path / "a"),
    ):
        pass


@pytest.fixture
def small_files() -> object:
    """No file may grow beyond 64 KiB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_file_that_grows_too_large(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with (
        pytest.raises(CheckpointError, match="a: cannot be written: file too large; free some space"),
        atomic_file(tmp_path / "a") as file,
    ):
        file.write(bytes(1 << 17))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.usefixtures("small_files")
def test_folder_that_grows_too_large(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="cannot be written: file too large"),
        atomic_folder(tmp_path / "f", replaceable=never) as folder,
    ):
        (folder / "one").write_bytes(bytes(1 << 17))
    assert names(tmp_path) == []


def test_a_copy_that_finds_the_disk_full_names_the_target(tmp_path: Path) -> None:
    """shutil names the file that it read, about which there is nothing to do."""
    with (
        pytest.raises(CheckpointError, match="f: cannot be written: no space left on device; free some space"),
        atomic_folder(tmp_path / "f", replaceable=never),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "elsewhere/config.json")
    assert names(tmp_path) == []


def test_a_folder_in_which_nothing_can_be_created() -> None:
    match = "/proc/a: cannot be written: .*; choose another folder with --output"
    with pytest.raises(CheckpointError, match=match), atomic_file(Path("/proc/a")):
        pass


def test_full_disk(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        (tmp_path / "a").write_bytes(b"old")
        with (
            pytest.raises(CheckpointError, match="no space left on device; free some space"),
            atomic_file(tmp_path / "a") as file,
        ):
            file.write(bytes(1 << 20))
        assert (tmp_path / "a").read_bytes() == b"old"
        assert names(tmp_path) == ["a"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "f"
    with atomic_folder(target, replaceable=never) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "x"
    assert names(tmp_path) == ["f"]


def test_folder_is_exchanged(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").write_text("x")
    with atomic_folder(tmp_path / "f", replaceable=always) as folder:
        (folder / "new").write_text("y")
        assert names(tmp_path / "f") == ["old"]
    assert names(tmp_path / "f") == ["new"]
    assert names(tmp_path) == ["f"]


def test_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "f", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="was not written by nmconvert"), atomic_folder(target, replaceable=never):
            pass
    assert (tmp_path / "f" / "mine").read_text() == "x"


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").write_text("x")
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_folder(tmp_path / "f", replaceable=always) as folder,
        (folder / "new").open("wb") as file,
    ):
        write_and_fail(file, KeyboardInterrupt)
    assert names(tmp_path / "f") == ["old"]
    assert names(tmp_path) == ["f"]


# ── kills ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_kill_at_any_moment(tmp_path: Path, kind: str) -> None:
    """There is one whole version under the final name whenever the writer is killed, and the next one cleans up."""
    target = tmp_path / "out"
    leftovers = 0
    for attempt in range(8):
        kill_after(0.003 * attempt + 0.001, keep_writing, target, kind)
        contents = [target.read_bytes()] if kind == "file" else [(target / name).read_bytes() for name in "abc"]
        assert all(len(content) == (300_000 if kind == "file" else 50_000) for content in contents)
        assert len(set(b"".join(contents))) == 1
        others = [path for path in tmp_path.iterdir() if path != target]
        assert len(others) <= 1
        assert all(is_partial(path) for path in others)
        leftovers += len(others)
    assert leftovers > 0, "no kill came in the middle of a write: the test shows nothing"
    if kind == "file":
        with atomic_file(target) as file:
            file.write(b"x")
    else:
        with atomic_folder(target, replaceable=always) as folder:
            (folder / "a").write_text("x")
    assert names(tmp_path) == ["out"]


def test_two_writers_at_once(tmp_path: Path) -> None:
    """The second does not take away what the first is still writing; the last to finish wins."""
    with atomic_file(tmp_path / "a") as first:
        first.write(b"first")
        with atomic_file(tmp_path / "a") as second:
            second.write(b"second")
        assert (tmp_path / "a").read_bytes() == b"second"
    assert (tmp_path / "a").read_bytes() == b"first"


def test_leftovers_of_other_targets_stay(tmp_path: Path) -> None:
    other = tmp_path / ".b.00000000.nmconvert-part"
    own = tmp_path / ".a.00000000.nmconvert-part"
    for path in (other, own):
        path.write_text("x")
    with atomic_file(tmp_path / "a"):
        pass
    assert names(tmp_path) == [other.name, "a"]
