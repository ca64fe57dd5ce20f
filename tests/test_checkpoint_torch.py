"""torch.save's two formats: every nesting, name prefix and dtype comes out as it went in, but for what was edited."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from containers import MANIFEST, InBlocks, Tied, check_copy, edited_copy, halve_largest, load_all, sha256, weights
from torch import nn

from nmconvert.checkpoint import open_checkpoint, stream
from nmconvert.errors import CheckpointError
from nmconvert.inspect import inspect
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.verify import verify

ZIP = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def save(value: Any, path: Path, *, new: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4, 8, 8)).sum().backward()
    optimizer.step()
    return model, optimizer


@ZIP
def test_bare_state_dict(tmp_path: Path, new: bool) -> None:
    source = save(Tied().state_dict(), tmp_path / "a.pt", new=new)
    checkpoint = open_checkpoint(source)
    assert checkpoint.format == ("torch zip" if new else "torch legacy")
    infos = {info.name: info for info in checkpoint.tensors()}
    assert list(infos) == list(Tied().state_dict())
    assert infos["second.weight"].shared_with == "first.weight"
    assert infos["conv.weight"].shape == (8, 4, 3, 3)
    assert not any(info.secondary for info in infos.values())
    assert edited_copy(source, tmp_path / "b.pt") == ["conv.weight", "first.weight"]
    check_copy(source, tmp_path / "b.pt", {"/conv.weight", "/first.weight", "/second.weight"})
    Tied().load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True), strict=True)


@ZIP
@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "anything"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_nested_state_dict_with_prefixes(tmp_path: Path, new: bool, key: str, prefix: str) -> None:
    model, optimizer = trained()
    state = OrderedDict((prefix + name, tensor) for name, tensor in model.state_dict().items())
    value = {
        "epoch": 7,
        key: state,
        "optimizer": optimizer.state_dict(),
        "best": 0.5,
        "lr_scheduler": {"base": [torch.ones(3)]},
    }
    source = save(value, tmp_path / "a.pt", new=new)
    assert [info.name for info in open_checkpoint(source).tensors()] == list(model.state_dict())
    edited_copy(source, tmp_path / "b.pt")
    edited = {f"/{key}/{prefix}{name}" for name in ("conv.weight", "first.weight", "second.weight")}
    check_copy(source, tmp_path / "b.pt", edited)
    again = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(again) == list(value)
    assert (again["epoch"], again["best"]) == (7, 0.5)


@ZIP
@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.eye(16).to_sparse(), "a sparse tensor"),
        (torch.eye(16).to_sparse_csr(), "a sparse tensor"),
        (torch.empty(16, 16, device="meta"), "a meta tensor, without values"),
        (torch.quantize_per_tensor(torch.eye(16), 0.1, 0, torch.qint8), "a quantised tensor"),
    ],
    ids=["sparse", "csr", "meta", "quantised"],
)
def test_what_is_no_dense_tensor_is_a_row_with_its_reason(tmp_path: Path, new: bool, tensor: torch.Tensor, what: str) -> None:
    source = save({"a.weight": tensor, "b.weight": torch.randn(16, 16)}, tmp_path / "a.pt", new=new)
    result = prune(source, Pattern(2, 4), trust=True)
    rows = {row.name: row for row in result.plan.rows}
    assert [row.name for row in result.plan.pruned] == ["b.weight"]
    assert rows["a.weight"].reason == f"{what}: only dense ones are pruned"
    assert rows["a.weight"].info.shape == (16, 16)
    assert inspect(result.output, trust=True).others == 1
    assert not verify(result.output, source, trust=True).failed


@ZIP
@pytest.mark.parametrize(
    "tensor",
    [torch.randn(1, 32).expand(16, 32), torch.randn(40).as_strided((8, 8), (1, 1)), torch.randn(300)[::100].expand(8, 3)],
    ids=["expanded", "windows", "apart"],
)
def test_entries_that_share_memory_stay_dense(tmp_path: Path, new: bool, tensor: torch.Tensor) -> None:
    source = save({"a.weight": tensor, "b.weight": torch.randn(16, 16)}, tmp_path / "a.pt", new=new)
    result = prune(source, Pattern(2, 4))
    assert [row.name for row in result.plan.pruned] == ["b.weight"]
    assert "its entries share memory (expanded)" in str(result.plan.rows[0].reason)
    assert torch.equal(torch.load(result.output, weights_only=True)["a.weight"], tensor)


def test_prefix_of_some_names_stays(tmp_path: Path) -> None:
    source = save({"module.a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "a.pt")
    assert [info.name for info in open_checkpoint(source).tensors()] == ["module.a", "b"]


def test_prefix_that_tells_two_tensors_apart_stays(tmp_path: Path) -> None:
    source = save({"_orig_mod.a": torch.ones(2, 2), "a": torch.zeros(2, 2)}, tmp_path / "a.pt")
    assert [info.name for info in open_checkpoint(source).tensors()] == ["_orig_mod.a", "a"]


@ZIP
def test_ema_beside_the_model_is_secondary(tmp_path: Path, new: bool) -> None:
    value = {"ema": Tied().state_dict(), "model": Tied().state_dict()}
    source = save(value, tmp_path / "a.pt", new=new)
    infos = {info.name: info.secondary for info in open_checkpoint(source).tensors()}
    assert infos["conv.weight"] is False
    assert infos["ema/conv.weight"] is True
    assert torch.equal(open_checkpoint(source).read("conv.weight"), value["model"]["conv.weight"])
    assert torch.equal(open_checkpoint(source).read("ema/conv.weight"), value["ema"]["conv.weight"])
    edited_copy(source, tmp_path / "b.pt")
    names = ("conv.weight", "first.weight", "second.weight")
    check_copy(source, tmp_path / "b.pt", {f"/{part}/{name}" for part in ("model", "ema") for name in names})


@ZIP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path: Path, new: bool, dtype: torch.dtype) -> None:
    state = {"w": torch.randn(6, 10).to(dtype), "steps": torch.tensor(3), "mask": torch.tensor([True, False])}
    source = save(state, tmp_path / "a.pt", new=new)
    checkpoint = open_checkpoint(source)
    assert [info.torch_dtype for info in checkpoint.tensors()] == [dtype, torch.int64, torch.bool]
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor)
    edited_copy(source, tmp_path / "b.pt")
    check_copy(source, tmp_path / "b.pt", {"/w"})


@ZIP
def test_views_of_one_storage(tmp_path: Path, new: bool) -> None:
    whole = torch.randn(6, 8)
    state = {
        "upper": whole[:3],
        "lower": whole[3:],
        "turned": torch.randn(5, 7).t(),
        "expanded": torch.randn(1, 4).expand(3, 4),
    }
    source = save(state, tmp_path / "a.pt", new=new)
    checkpoint = open_checkpoint(source)
    assert [info.shared_with for info in checkpoint.tensors()] == [None] * 4
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    edits = dict.fromkeys(("upper", "turned"), halve_largest)
    checkpoint.write_copy(tmp_path / "b.pt", edits, lambda: MANIFEST)
    check_copy(source, tmp_path / "b.pt", {"/upper", "/turned"})


@ZIP
def test_overlapping_views_are_shared(tmp_path: Path, new: bool) -> None:
    whole = torch.randn(6, 8)
    source = save({"whole": whole, "part": whole[2:4], "again": whole}, tmp_path / "a.pt", new=new)
    assert [info.shared_with for info in open_checkpoint(source).tensors()] == [None, "whole", "whole"]


def test_plain_values_beside_the_weights_need_no_trust(tmp_path: Path) -> None:
    value = {
        "state_dict": {"w": torch.randn(4, 4)},
        "args": argparse.Namespace(lr=0.1, path=Path("x")),
        "best": np.float64(0.5),
        "curve": np.arange(3),
    }
    source = save(value, tmp_path / "a.pt")
    edited_copy(source, tmp_path / "b.pt")
    again = torch.load(tmp_path / "b.pt", weights_only=False)
    assert again["args"] == value["args"]
    assert torch.equal(again["state_dict"]["w"], halve_largest(value["state_dict"]["w"]))


@ZIP
def test_nothing_but_the_edited_tensor_changes(tmp_path: Path, new: bool) -> None:
    source = save({"a": torch.randn(40, 40), "b": torch.randn(30, 30)}, tmp_path / "a.pt", new=new)
    digest = sha256(source)
    open_checkpoint(source).write_copy(tmp_path / "b.pt", {"b": halve_largest}, lambda: MANIFEST)
    before, after = source.read_bytes(), (tmp_path / "b.pt").read_bytes()
    begin = before.index(open_checkpoint(source).read("b").numpy().tobytes())
    assert after[:begin] == before[:begin]
    assert sha256(source) == digest


@ZIP
def test_a_second_copy_replaces_the_manifest(tmp_path: Path, new: bool) -> None:
    source = save({"w": torch.randn(4, 4)}, tmp_path / "a.pt", new=new)
    open_checkpoint(source).write_copy(tmp_path / "b.pt", {}, lambda: "x" * 1000)
    open_checkpoint(tmp_path / "b.pt").write_copy(tmp_path / "c.pt", {}, lambda: MANIFEST)
    open_checkpoint(source).write_copy(tmp_path / "d.pt", {}, lambda: MANIFEST)
    assert (tmp_path / "c.pt").read_bytes() == (tmp_path / "d.pt").read_bytes()
    assert open_checkpoint(source).manifest_text() is None


def test_the_manifest_of_an_archive_packed_anew_is_replaced(tmp_path: Path) -> None:
    source = save({"w": torch.randn(4, 4)}, tmp_path / "a.pt")
    open_checkpoint(source).write_copy(tmp_path / "b.pt", {}, lambda: "old")
    with zipfile.ZipFile(tmp_path / "b.pt") as packed, zipfile.ZipFile(tmp_path / "c.pt", "w") as other:
        for name in reversed(packed.namelist()):
            other.writestr(name, packed.read(name))
    edited_copy(tmp_path / "c.pt", tmp_path / "d.pt")
    check_copy(source, tmp_path / "d.pt", {"/w"})
    with zipfile.ZipFile(tmp_path / "d.pt") as archive:
        assert archive.testzip() is None
        assert len(set(archive.namelist())) == len(archive.namelist())


def test_zip_is_whole_for_every_reader(tmp_path: Path) -> None:
    source = save({"a": torch.randn(40, 40), "empty": torch.zeros(0, 4), "b": torch.randn(3, 3)}, tmp_path / "a.pt")
    edited_copy(source, tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        assert archive.testzip() is None
        assert archive.namelist()[-1] == "a/nmconvert.json"
        assert archive.read("a/nmconvert.json").decode() == MANIFEST
    mapped = torch.load(tmp_path / "b.pt", mmap=True, weights_only=True)
    assert torch.equal(mapped["a"], load_all(tmp_path / "b.pt")["/a"])


@ZIP
def test_large_tensors_are_edited_in_blocks_of_rows(tmp_path: Path, new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 1000)
    source = save({"a": torch.randn(3), "w": torch.randn(50, 33), "z": torch.randn(700)}, tmp_path / "a.pt", new=new)
    edit = InBlocks(3)
    open_checkpoint(source).write_copy(tmp_path / "b.pt", {"w": edit}, lambda: MANIFEST)
    assert edit.rows == [6] * 8 + [2]
    assert np.array_equal(np.concatenate(edit.sealed), load_all(tmp_path / "b.pt")["/w"])
    check_copy(source, tmp_path / "b.pt", {"/w"})


def test_edits_come_in_file_order_and_the_manifest_last(tmp_path: Path) -> None:
    names = [f"w{number}" for number in range(12)]
    source = save({name: torch.randn(4, 4) for name in names}, tmp_path / "a.pt")
    calls: list[str] = []

    def edit(name: str) -> Any:
        return lambda tensor: calls.append(name) or tensor

    edits = {name: edit(name) for name in reversed(names)}
    open_checkpoint(source).write_copy(tmp_path / "b.pt", edits, lambda: calls.append("manifest") or MANIFEST)
    assert calls == [*names, "manifest"]


@pytest.mark.parametrize("wrong", [lambda t: t[:1], lambda t: t.double()])
def test_an_edit_that_changes_shape_or_dtype(tmp_path: Path, wrong: Any) -> None:
    source = save({"w": torch.randn(4, 4)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"'w': \[4, 4\] torch.float32 cannot become"):
        open_checkpoint(source).write_copy(tmp_path / "b.pt", {"w": wrong}, lambda: MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_unknown_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save({"w": torch.randn(4, 4)}, tmp_path / "a.pt"))
    with pytest.raises(CheckpointError, match="no tensor 'v'"):
        checkpoint.read("v")
    with pytest.raises(CheckpointError, match="no tensor 'v'"):
        checkpoint.write_copy(tmp_path / "b.pt", {"v": halve_largest}, lambda: MANIFEST)


def test_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no state dict with tensors"):
        open_checkpoint(save({"epoch": 3, "optimizer": {"m": torch.ones(2)}}, tmp_path / "a.pt"))


def test_big_endian(tmp_path: Path) -> None:
    source = save({"w": torch.randn(4, 4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(CheckpointError, match="big-endian machine; load it in torch"):
        open_checkpoint(tmp_path / "b.pt")


def test_compressed_weights(tmp_path: Path) -> None:
    source = save({"w": torch.zeros(40, 40)}, tmp_path / "a.pt")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match=r"'a/data/0' is compressed; load the file in torch and torch.save it once more"):
        open_checkpoint(tmp_path / "b.pt")


def test_legacy_pickle_protocols(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 4)}
    for protocol in (2, 3, 4, 5):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
        assert torch.equal(open_checkpoint(tmp_path / "a.pt").read("w"), state["w"])


@pytest.mark.parametrize(
    "name",
    [
        "resnet20-12fca82f.th",
        "resnet32-d509ac18.th",
        "resnet56-4bfd9763.th",
        "fastestdet_coco_ap05_0.2532.pth",
        "stories260K.pt",
    ],
)
def test_real_checkpoints(data_dir: Path, tmp_path: Path, name: str) -> None:
    source = data_dir / "checkpoints" / name
    before = load_all(source)
    checkpoint = open_checkpoint(source)
    for info in checkpoint.tensors():
        ours = checkpoint.read(info.name)
        assert any(path.endswith(info.name) and torch.equal(ours, tensor) for path, tensor in before.items())
    target = tmp_path / name
    names = edited_copy(source, target)
    assert len(names) >= 20
    check_copy(source, target, {path for path in before if any(path.endswith((f"/{n}", f"/module.{n}")) for n in names)})


def test_a_bare_pickle_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CheckpointError, match=r"a bare pickle; .* pass --trust only if"):
        open_checkpoint(tmp_path / "a.pkl")
    with pytest.raises(CheckpointError, match=r"torch.save its state dict"):
        open_checkpoint(tmp_path / "a.pkl", trust=True)


def test_nothing_to_edit_is_a_plain_copy(tmp_path: Path) -> None:
    source = save(Tied().state_dict(), tmp_path / "a.pt")
    open_checkpoint(source).write_copy(tmp_path / "b.pt", {}, lambda: MANIFEST)
    check_copy(source, tmp_path / "b.pt", set())
    assert weights(open_checkpoint(source)) == ["conv.weight", "first.weight"]
