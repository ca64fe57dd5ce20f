"""safetensors: read and written here, as the safetensors package and Hugging Face read and write them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from containers import MANIFEST, InBlocks, check_copy, edited_copy, halve_largest, load_all
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmconvert.checkpoint import open_checkpoint, safetensors_file, stream
from nmconvert.errors import CheckpointError


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "other": "ü"})
    return path


def raw(path: Path, header: Any, data: bytes, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]


@given(
    entries=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=8),
    manifest=st.text(max_size=5000),
)
def test_any_tensors(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[torch.dtype, list[int]]], manifest: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = {f"t{i}": (torch.randn(shape) * 3).to(dtype) for i, (dtype, shape) in enumerate(entries)}
    source = save(tensors, folder / "a.safetensors")
    checkpoint = open_checkpoint(source)
    assert {info.name: (info.shape, info.torch_dtype) for info in checkpoint.tensors()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        assert bits(checkpoint.read(name)) == bits(tensor)
    checkpoint.write_copy(folder / "b.safetensors", {}, lambda: manifest)
    for name, tensor in safetensors.torch.load_file(folder / "b.safetensors").items():
        assert bits(tensor) == bits(tensors[name])
    with safetensors.safe_open(folder / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "other": "ü", "nmconvert": manifest}
    assert open_checkpoint(folder / "b.safetensors").manifest_text() == manifest


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""


def test_edits(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(30, 20), "b": torch.randn(8, 4, 3, 3).half(), "c": torch.randn(7)}
    source = save(tensors, tmp_path / "a.safetensors")
    assert set(edited_copy(source, tmp_path / "b.safetensors")) == {"a", "b"}
    check_copy(source, tmp_path / "b.safetensors", {"/a", "/b"})


def test_format_is_seen_from_the_bytes(tmp_path: Path) -> None:
    source = save({"a": torch.randn(3, 3)}, tmp_path / "a.safetensors").rename(tmp_path / "a.bin")
    assert open_checkpoint(source).format == "safetensors"


@pytest.mark.parametrize("block_rows", [1, 4])
def test_blocks_of_rows(tmp_path: Path, block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 1 << 12)
    source = save({"a": torch.randn(11), "w": torch.randn(101, 40), "z": torch.randn(5000)}, tmp_path / "a.safetensors")
    edit = InBlocks(block_rows)
    open_checkpoint(source).write_copy(tmp_path / "b.safetensors", {"w": edit}, lambda: MANIFEST)
    assert sum(edit.rows) == 101
    assert len(edit.rows) > 3
    assert all(rows % block_rows == 0 for rows in edit.rows[:-1])
    check_copy(source, tmp_path / "b.safetensors", {"/w"})


def test_rows_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 64)
    source = save({"w": torch.randn(5, 40)}, tmp_path / "a.safetensors")
    edit = InBlocks(1)
    open_checkpoint(source).write_copy(tmp_path / "b.safetensors", {"w": edit}, lambda: MANIFEST)
    assert edit.rows == [1] * 5
    check_copy(source, tmp_path / "b.safetensors", {"/w"})


def test_a_manifest_larger_than_the_room_left_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "BLOCK", 1000)
    source = save({"w": torch.randn(60, 40)}, tmp_path / "a.safetensors")
    manifest = "m" * 30_001
    open_checkpoint(source).write_copy(tmp_path / "b.safetensors", {"w": halve_largest}, lambda: manifest)
    assert torch.equal(load_all(tmp_path / "b.safetensors")["/w"], halve_largest(load_all(source)["/w"]))
    assert open_checkpoint(tmp_path / "b.safetensors").manifest_text() == manifest


def test_copies_of_copies_do_not_grow(tmp_path: Path) -> None:
    files = [save({"w": torch.randn(60, 40)}, tmp_path / "0.safetensors")]
    for number in range(1, 4):
        files.append(tmp_path / f"{number}.safetensors")
        open_checkpoint(files[-2]).write_copy(files[-1], {}, lambda: MANIFEST)
    assert files[1].read_bytes() == files[2].read_bytes() == files[3].read_bytes()


def test_without_metadata(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.manifest_text() is None
    checkpoint.write_copy(tmp_path / "b.safetensors", {}, lambda: MANIFEST)
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"nmconvert": MANIFEST}


GOOD = {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def test_the_example_that_the_hostile_ones_change_is_good(tmp_path: Path) -> None:
    assert torch.equal(open_checkpoint(raw(tmp_path / "a", GOOD, bytes(16))).read("w"), torch.zeros(2, 2))


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {**GOOD["w"], **changes}}


@pytest.mark.parametrize(
    ("header", "size", "why"),
    [
        (entry(data_offsets=[0, 20]), 20, "cannot be 20 bytes"),
        (entry(data_offsets=[16, 0]), 16, "cannot be -16 bytes"),
        (entry(data_offsets=[-16, 0]), 16, "no proper shape or place"),
        (entry(data_offsets=[4, 20]), 20, "begins at byte"),
        (entry(data_offsets=[0]), 16, "says too little"),
        (entry(data_offsets=[0.0, 16.0]), 16, "no proper shape or place"),
        (entry(shape=[2, -2]), 16, "no proper shape or place"),
        (entry(shape=[2**40, 2**40]), 16, "cannot be 16 bytes"),
        (entry(shape=4), 16, "says too little"),
        (entry(shape=[True, 4]), 16, "no proper shape or place"),
        (entry(dtype="F4"), 16, "dtype 'F4', which nmconvert does not know"),
        (entry(dtype=["F32"]), 16, "which nmconvert does not know"),
        ({"w": 3}, 16, "says too little"),
        ({"w": {}}, 16, "says too little"),
        (GOOD, 15, "should be 1?[0-9]+ bytes"),
        (GOOD, 17, "should be 1?[0-9]+ bytes"),
        ({**GOOD, "v": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, 16, "'v' begins at byte"),
        ({**GOOD, "v": {"dtype": "F32", "shape": [2], "data_offsets": [20, 28]}}, 28, "'v' begins at byte"),
        ({**GOOD, "__metadata__": {"a": 1}}, 16, "not a table of strings"),
        ({**GOOD, "__metadata__": "x"}, 16, "not a table of strings"),
        (b'{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"w":{}}', 16, "'w' is there twice"),
        (b'{"w":', 16, "not JSON"),
        (b"{" * 50_000, 16, "not JSON"),
        (b'{"\xff":1}', 16, "not JSON"),
    ],
    ids=range(24),
)
def test_hostile_headers(tmp_path: Path, header: Any, size: int, why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as caught:
        open_checkpoint(raw(tmp_path / "a.safetensors", header, bytes(size)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [3, 58, 61, 10_000, 99_999_999])
def test_hostile_header_length(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(raw(tmp_path / "a.safetensors", GOOD, bytes(16), length=length))


@pytest.mark.parametrize("length", [0, 100_000_001, 2**63, 2**64 - 1])
def test_impossible_header_length_is_no_safetensors_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(raw(tmp_path / "a.safetensors", GOOD, bytes(16), length=length))


def test_what_the_package_refuses_is_refused(tmp_path: Path) -> None:
    """Damage at every byte of the header: where the package will not read the file, neither will we."""
    source = save({"a": torch.randn(3, 5), "b": torch.randn(4).half()}, tmp_path / "a.safetensors")
    good = source.read_bytes()
    begin = 8 + struct.unpack("<Q", good[:8])[0]
    broken = tmp_path / "b.safetensors"
    refused = 0
    for position in range(begin):
        for flip in (0x01, 0x10, 0x80):
            broken.write_bytes(good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :])
            try:
                safetensors.torch.load_file(broken)
            except safetensors.SafetensorError:
                refused += 1
                with pytest.raises(CheckpointError):
                    open_checkpoint(broken)
    assert refused > begin
