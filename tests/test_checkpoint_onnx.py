"""ONNX models as checkpoints: external data, odd graphs, and nothing half written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from containers import MANIFEST, halve_largest, sha256
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_models import conv_net, model_of, random_input, run, session

from nmconvert.checkpoint import open_checkpoint
from nmconvert.checkpoint.onnx_file import read_model, read_whole_model, save_model
from nmconvert.errors import CheckpointError, UsageError
from nmconvert.export.compress import compress
from nmconvert.pattern import Pattern

WEIGHTS = ("first.weight", "second.weight", "head.weight")


def edit_all(source: Path, target: Path) -> None:
    open_checkpoint(source).write_copy(target, dict.fromkeys(WEIGHTS, halve_largest), lambda: MANIFEST)


def check_edited(source: Path, target: Path) -> None:
    before, after = onnx.load(source), onnx.load(target)
    onnx.checker.check_model(str(target), full_check=True)
    assert [node.SerializeToString() for node in before.graph.node] == [node.SerializeToString() for node in after.graph.node]
    old, new = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (before, after))
    assert list(old) == list(new)
    for name, array in old.items():
        np.testing.assert_array_equal(new[name], np.where(array > 0, 0, array) if name in WEIGHTS else array)
    assert open_checkpoint(target).manifest_text() == MANIFEST


def test_one_file(tmp_path: Path) -> None:
    onnx.save(conv_net(None), tmp_path / "a.onnx")
    before = sha256(tmp_path / "a.onnx")
    edit_all(tmp_path / "a.onnx", tmp_path / "b.onnx")
    check_edited(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert sha256(tmp_path / "a.onnx") == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "b.onnx"}


def test_a_dimension_below_zero(tmp_path: Path) -> None:
    model = conv_net(None)
    model.graph.initializer[0].dims[0] *= -1
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match=r"a\.onnx: damaged: tensor '.*' has a dimension below zero"):
        open_checkpoint(tmp_path / "a.onnx")


def test_an_attribute_that_is_no_number(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["X", "W"], ["Y"], group="two")
    onnx.save(model_of([node], {"W": random_input((8, 4, 3))}, ["n", 8, 4]), tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match=r"a\.onnx: damaged: Conv 'Y': group is b'two', and no whole number"):
        open_checkpoint(tmp_path / "a.onnx").tensors()


def test_lists_of_entries_are_not_read(tmp_path: Path) -> None:
    model = model_of([helper.make_node("MatMul", ["X", "W"], ["Y"])], {}, ["n", 4])
    values, indices = (numpy_helper.from_array(a, "W") for a in (random_input((2,)), np.array([3, 9], np.int64)))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match=r"a\.onnx: stores 'W' as a list of entries; write all weights as initializer"):
        open_checkpoint(tmp_path / "a.onnx")


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data(tmp_path: Path, one_file: bool) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    source, target = tmp_path / "from" / "a.onnx", tmp_path / "to" / "b.onnx"
    onnx.save(
        conv_net(None),
        source,
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location="weights.bin" if one_file else None,
        size_threshold=0,
    )
    files = {path: sha256(path) for path in source.parent.iterdir()}
    assert len(files) == (2 if one_file else 5)
    edit_all(source, target)
    check_edited(source, target)
    assert {path: sha256(path) for path in source.parent.iterdir()} == files
    assert {path.name for path in target.parent.iterdir()} == {"b.onnx", "b.onnx.data"}
    session(target)


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """Of 96 MB in 12 tensors, all of them edited."""
    tensors = {f"w{i}": np.ones((1024, 2048), np.float32) for i in range(12)}
    nodes = [helper.make_node("MatMul", ["X", name], [f"y{name}"]) for name in tensors]
    nodes.append(helper.make_node("Sum", [f"y{name}" for name in tensors], ["Y"]))
    onnx.save(model_of(nodes, tensors, ["n", 1024]), tmp_path / "a.onnx", save_as_external_data=True, location="a.bin")
    program = """
import resource, sys
from pathlib import Path
import torch
from nmconvert.checkpoint import open_checkpoint
torch.ones(2, 2).mul_(0)
source, target = map(Path, sys.argv[1:])
checkpoint = open_checkpoint(source)
edits = {info.name: lambda tensor: tensor.mul_(0) for info in checkpoint.tensors()}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint.write_copy(target, edits, lambda: "{}")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    # By way of a shell: Linux counts what a process holds when it forks as its child's.
    command = ["sh", "-c", '"$0" -c "$1" a.onnx b.onnx', sys.executable, program]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout) * 1024
    assert not numpy_helper.to_array(onnx.load(tmp_path / "b.onnx").graph.initializer[-1]).any()
    assert grown < 10 * tensors["w0"].nbytes, f"{grown:,} bytes"


def test_external_copies_replace_each_other_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(conv_net(None), source, save_as_external_data=True, size_threshold=0)
    for _ in range(3):
        edit_all(source, target)
        check_edited(source, target)
        assert len(list(tmp_path.glob("b.onnx*"))) == 2  # the data of the file before is gone


@pytest.mark.parametrize("name", ["backup.onnx", "backup.bin"])
def test_data_that_a_copy_of_the_model_reads_stays(tmp_path: Path, name: str) -> None:
    """A copied model still names the data file of the first; it may be what is read just now."""
    target = tmp_path / "b.onnx"
    save_model(conv_net(None), target, external=True)
    shutil.copy(target, tmp_path / name)
    before = open_checkpoint(tmp_path / name).read("second.weight")
    edit_all(tmp_path / name, target)
    check_edited(tmp_path / name, target)
    assert torch.equal(open_checkpoint(tmp_path / name).read("second.weight"), before)


def test_a_failing_copy_leaves_the_one_before(tmp_path: Path) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(conv_net(None), source, save_as_external_data=True, size_threshold=0)
    edit_all(source, target)
    before = {path: sha256(path) for path in tmp_path.iterdir()}

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        open_checkpoint(source).write_copy(target, {"second.weight": fail}, lambda: MANIFEST)

    def refuse(path: Path) -> None:
        assert session(path)
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        save_model(conv_net(), target, check=refuse, external=True)
    assert {path: sha256(path) for path in tmp_path.iterdir()} == before


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(conv_net().SerializeToString().replace(b"first.weight", b"first.weigh\xff"))
    with pytest.raises(CheckpointError, match=r"a\.onnx: damaged: a name in it is no UTF-8 text"):
        open_checkpoint(tmp_path / "a.onnx")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "missing.bin", "link.bin"])
def test_hostile_locations_of_external_data(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(100_000))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    onnx.save(conv_net(None), folder / "a.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(folder / "a.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"the external data '.*' of '.*' cannot be read; (keep the two|it lies out)"):
        edit_all(folder / "a.onnx", folder / "b.onnx")
    assert {path.name for path in folder.iterdir()} == {"a.onnx", "weights.bin", "link.bin"}
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_whole_model(folder / "a.onnx")


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("wrong", ["99999999999", "-5", "abc"])
def test_damaged_references_to_external_data(tmp_path: Path, key: str, wrong: str) -> None:
    onnx.save(conv_net(None), tmp_path / "a.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = wrong
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"first\.weight"):
        edit_all(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_truncated_external_data(tmp_path: Path) -> None:
    onnx.save(conv_net(None), tmp_path / "a.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"first\.weight"):
        edit_all(tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    whole = conv_net(None).SerializeToString()
    for count in range(1, len(whole), 97):
        (tmp_path / "a.onnx").write_bytes(whole[:count])
        with pytest.raises(CheckpointError, match=r"a\.onnx"):
            edit_all(tmp_path / "a.onnx", tmp_path / "b.onnx")
        assert not (tmp_path / "b.onnx").exists()
    (tmp_path / "a.onnx").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="not an ONNX model"):
        open_checkpoint(tmp_path / "a.onnx")


@pytest.mark.parametrize("form", ["raw", "typed"])
@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        (TensorProto.FLOAT, torch.float32),
        (TensorProto.FLOAT16, torch.float16),
        (TensorProto.BFLOAT16, torch.bfloat16),
        (TensorProto.DOUBLE, torch.float64),
    ],
)
def test_every_type_in_both_forms(tmp_path: Path, form: str, element: int, dtype: torch.dtype) -> None:
    values = np.array([[1.5, -2.25, 0.5, -0.0]])
    array: Any = values.astype(helper.tensor_dtype_to_np_dtype(element))
    tensor = helper.make_tensor("W", element, [1, 4], array.tobytes() if form == "raw" else values.ravel(), raw=form == "raw")
    model = model_of([helper.make_node("Identity", ["X"], ["Y"])], {}, [1])
    model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "a.onnx")
    checkpoint = open_checkpoint(tmp_path / "a.onnx")
    found = checkpoint.read("W")
    assert found.dtype == dtype
    assert found.double().tolist() == values.tolist()
    checkpoint.write_copy(tmp_path / "b.onnx", {"W": halve_largest}, lambda: MANIFEST)
    assert open_checkpoint(tmp_path / "b.onnx").read("W").double().tolist() == [[0, -2.25, 0, 0]]


def test_constant_nodes_are_tensors(tmp_path: Path) -> None:
    weight = random_input((8, 4))
    nodes = [
        helper.make_node("Constant", [], ["W"], value=numpy_helper.from_array(weight, "inner name")),
        helper.make_node("MatMul", ["X", "W"], ["Y"]),
    ]
    onnx.save(model_of(nodes, {}, [1, 8]), tmp_path / "a.onnx")
    open_checkpoint(tmp_path / "a.onnx").write_copy(tmp_path / "b.onnx", {"W": halve_largest}, lambda: MANIFEST)
    x = random_input((1, 8))
    np.testing.assert_allclose(run(tmp_path / "b.onnx", x), x @ np.where(weight > 0, 0, weight), rtol=1e-5)


def test_compressed_files_are_not_pruned_again(tmp_path: Path) -> None:
    model = conv_net()
    compress(model, [(Pattern(2, 4), "channel")])
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="is compressed already; prune the checkpoint that it was exported from"):
        open_checkpoint(tmp_path / "a.onnx").write_copy(tmp_path / "b.onnx", {"head.bias": halve_largest}, lambda: MANIFEST)
    with pytest.raises(CheckpointError, match="there is no tensor 'x' in it"):
        open_checkpoint(tmp_path / "a.onnx").read("x")


def test_the_metadata_entry_is_replaced_and_others_stay(tmp_path: Path) -> None:
    model = conv_net(None)
    model.metadata_props.add(key="author", value="somebody")
    model.metadata_props.add(key="nmconvert", value="old")
    onnx.save(model, tmp_path / "a.onnx")
    edit_all(tmp_path / "a.onnx", tmp_path / "b.onnx")
    after = read_model(tmp_path / "b.onnx")
    assert {entry.key: entry.value for entry in after.metadata_props} == {"author": "somebody", "nmconvert": MANIFEST}


def test_two_branches_with_external_tensors_of_one_name(tmp_path: Path) -> None:
    from test_onnx_graph import branch, if_model

    weights = [random_input((8, 64), seed=seed) for seed in range(3)]
    model: ModelProto = if_model(
        branch("then", "w", {"w": weights[0]}), branch("else", "w", {"w": weights[1]}), {"V": weights[2]}
    )
    onnx.save(model, tmp_path / "a.onnx")
    save_model(onnx.load(tmp_path / "a.onnx"), tmp_path / "b.onnx", external=True)
    (tmp_path / "c").mkdir()
    open_checkpoint(tmp_path / "b.onnx").write_copy(tmp_path / "c" / "d.onnx", {}, lambda: MANIFEST)
    for file in ("b.onnx", "c/d.onnx"):
        for x in (random_input((4, 8)), -random_input((4, 8))):
            assert np.array_equal(run(tmp_path / file, x), run(tmp_path / "a.onnx", x))
