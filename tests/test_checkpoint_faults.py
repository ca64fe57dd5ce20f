"""Damaged inputs and writes that cannot finish, for every container: one line, the input untouched, no half file."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from containers import (
    MANIFEST,
    check_copy,
    edited_copy,
    halve_largest,
    keep_copying,
    kill_after,
    load_all,
    names,
    sha256,
    weights,
)
from safetensors.torch import save_file

from nmconvert.checkpoint import open_checkpoint
from nmconvert.errors import CheckpointError, NmconvertError


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"first.weight": torch.randn(60, 50), "first.bias": torch.randn(60), "second.weight": torch.randn(40, 60)}


def make_zip(folder: Path) -> Path:
    torch.save({"state_dict": state(), "epoch": 1}, folder / "a.pt")
    return folder / "a.pt"


def make_legacy(folder: Path) -> Path:
    torch.save({"state_dict": state(), "epoch": 1}, folder / "a.th", _use_new_zipfile_serialization=False)
    return folder / "a.th"


def make_safetensors(folder: Path) -> Path:
    save_file(state(), folder / "a.safetensors")
    return folder / "a.safetensors"


def make_folder(folder: Path) -> Path:
    (folder / "a").mkdir()
    save_file(state(), folder / "a" / "model.safetensors")
    (folder / "a" / "config.json").write_text("{}")
    return folder / "a"


FILES: list[Callable[[Path], Path]] = [make_zip, make_legacy, make_safetensors]
ALL = pytest.mark.parametrize("make", [*FILES, make_folder])


def error_of(work: Callable[[], object]) -> str | None:
    try:
        work()
    except NmconvertError as error:
        return str(error)
    return None


def is_readable(path: Path) -> bool:
    try:
        load_all(path)
    except Exception:  # what other programs raise
        return False
    return True


def digest(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {file.name: sha256(file) for file in files}


@pytest.mark.parametrize("make", FILES)
def test_cut_short_anywhere(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path)
    data = source.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 8, 9, 64, *(rng.randrange(len(data)) for _ in range(60)), len(data) - 1]:
        source.write_bytes(data[:length])
        with pytest.raises(CheckpointError) as caught:
            edited_copy(source, tmp_path / "copy")
        assert "\n" not in str(caught.value)
        assert str(source) in str(caught.value)
        assert names(tmp_path) == [source.name]


def test_a_flipped_bit_in_a_zip_is_noticed(tmp_path: Path) -> None:
    """Every record has a checksum; what has none is the padding, headers that readers ignore, and times."""
    source = make_zip(tmp_path)
    data = source.read_bytes()
    records = [(b"a/data/0", 60 * 50 * 4), (b"a/data/1", 60 * 4), (b"a/data/2", 40 * 60 * 4)]
    rng = random.Random(0)
    for name, size in records:
        begin = data.index(state()["first.weight"].numpy().tobytes()) if name == b"a/data/0" else None
        for _ in range(8):
            position = rng.randrange(begin, begin + size) if begin else data.index(name) + len(name) + 100 + rng.randrange(100)
            source.write_bytes(data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])
            with pytest.raises(CheckpointError, match=f"the checksum of '{name.decode()}' does not match; copy the file anew"):
                edited_copy(source, tmp_path / "copy")
    assert names(tmp_path) == ["a.pt"]


def test_reading_a_tensor_checks_it(tmp_path: Path) -> None:
    source = make_zip(tmp_path)
    data = bytearray(source.read_bytes())
    data[data.index(state()["first.weight"].numpy().tobytes()) + 17] ^= 4
    source.write_bytes(data)
    assert open_checkpoint(source).read("first.bias").shape == (60,)
    with pytest.raises(CheckpointError, match=r"the checksum of 'first.weight' does not match"):
        open_checkpoint(source).read("first.weight")


@pytest.mark.parametrize("make", FILES)
def test_flipped_bits_anywhere(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Whatever is damaged, it is an error of ours or a copy that other programs read as they read the damaged file."""
    source = make(tmp_path)
    data = source.read_bytes()
    rng = random.Random(1)
    target = source.with_stem("copy")
    good = 0
    for _ in range(150):
        position = rng.choice(
            [rng.randrange(len(data)), rng.randrange(min(len(data), 700)), len(data) - 1 - rng.randrange(900)]
        )
        source.write_bytes(data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])
        target.unlink(missing_ok=True)
        message = error_of(partial(edited_copy, source, target))
        if message is None:
            assert is_readable(target) or not is_readable(source)
            good += 1
        else:
            assert "\n" not in message
            assert names(tmp_path) == [source.name]
    assert 0 < good < 150


@pytest.fixture
def small_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@ALL
def test_full_disk(tmp_path: Path, make: Callable[[Path], Path], request: pytest.FixtureRequest) -> None:
    source = make(tmp_path)
    before = digest(source)
    request.getfixturevalue("small_files")
    with pytest.raises(CheckpointError, match="cannot be written: file too large; free some space"):
        edited_copy(source, tmp_path / "copy")
    assert names(tmp_path) == [source.name]
    assert digest(source) == before


@ALL
def test_file_in_place_of_the_folder(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path)
    (tmp_path / "taken").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written: not a directory; choose another folder"):
        edited_copy(source, tmp_path / "taken" / "copy")


@ALL
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_interrupted(tmp_path: Path, make: Callable[[Path], Path], error: type[BaseException]) -> None:
    source = make(tmp_path)
    before = digest(source)
    checkpoint = open_checkpoint(source)

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise error

    def no_manifest() -> str:
        raise error

    for edits, manifest in (({"second.weight": fail}, lambda: MANIFEST), ({}, no_manifest)):
        with pytest.raises(error):
            checkpoint.write_copy(tmp_path / "copy", edits, manifest)
    assert names(tmp_path) == [source.name]
    assert digest(source) == before


@ALL
def test_killed(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source, target = make(tmp_path), tmp_path / "copy"
    before = digest(source)
    for attempt in range(6):
        kill_after(0.002 + 0.004 * attempt, keep_copying, source, target)
        assert digest(source) == before
        if target.exists():
            assert open_checkpoint(target).manifest_text() == MANIFEST
            for name in weights(open_checkpoint(source)):
                assert torch.equal(open_checkpoint(target).read(name), halve_largest(open_checkpoint(source).read(name)))
    edited_copy(source, target)
    assert names(tmp_path) == sorted([source.name, "copy"])
    if source.is_file() and source.suffix != ".safetensors":
        check_copy(source, target, {"/state_dict/first.weight", "/state_dict/second.weight"})


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty; copy the file anew"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "only a Git LFS pointer; run 'git lfs pull'"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 .Keras. file"),
        (b"GGUF" + bytes(100), "a GGUF file, which is quantised already"),
        (b"\x93NUMPY" + bytes(100), "a NumPy array"),
        (b"\x1f\x8b" + bytes(100), "a gzip file; unpack it first"),
        (b"<!DOCTYPE html><html>", "not a checkpoint that nmconvert knows"),
        (b"PK\x03\x04" + bytes(100), "ends before its directory .an incomplete download"),
        (b"\x80\x02" + bytes(100), "a bare pickle"),
        (b"\x08", "not a checkpoint that nmconvert knows"),
        (b"\x08\x01", "an ONNX model without a graph"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=what):
        open_checkpoint(tmp_path / "a.pt")


def test_archives_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    with pytest.raises(CheckpointError, match=r"a\.npz: NumPy arrays; save the model's state_dict with torch\.save"):
        open_checkpoint(tmp_path / "a.npz")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: no such file or directory"):
        open_checkpoint(tmp_path / "a.pt")
