from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_models import conv_net, model_of, sparse_weight
from strategies import random_weight

from nmconvert.export import export
from nmconvert.inspect import Found, Inspection, inspect
from nmconvert.pattern import Pattern
from nmconvert.prune import prune


def by_name(result: Inspection) -> dict[str, Found]:
    return {found.name: found for found in result.tensors}


def texts(found: Found) -> dict[str, str | None]:
    return {axis: None if pattern is None else str(pattern) for axis, pattern in found.patterns.items()}


def test_a_state_dict_that_somebody_else_pruned(tmp_path: Path) -> None:
    state = {
        "conv.weight": torch.from_numpy(sparse_weight("conv", (32, 16, 3, 3), "1:4")),
        "flat.weight": torch.from_numpy(sparse_weight("conv", (32, 16, 3, 3), "2:8", "kernel")),
        "linear.weight": torch.from_numpy(sparse_weight("linear", (64, 64), "2:4")).bfloat16(),
        "h.0.mlp.c_fc.weight": torch.from_numpy(sparse_weight("matmul", (64, 64), "2:4")),
        "dense.weight": random_weight((32, 32), 0),
        "conv.bias": torch.zeros(32),
        "steps": torch.zeros(4, 4, dtype=torch.int64),
    }
    torch.save(state, tmp_path / "a.pt")
    result = inspect(tmp_path / "a.pt")
    found = by_name(result)
    assert texts(found["conv.weight"])["channel"] == "1:4"
    assert texts(found["flat.weight"])["kernel"] == "2:8"
    assert texts(found["linear.weight"]) == {"channel": "2:4", "kernel": "2:4"}
    assert texts(found["h.0.mlp.c_fc.weight"])["channel"] == "2:4"  # stored [I, O]
    assert texts(found["dense.weight"]) == {"channel": None, "kernel": None}
    assert found["dense.weight"].density == 1
    assert found["linear.weight"].nbytes == 64 * 64 * 2
    assert found["linear.weight"].density == pytest.approx(0.5 * 0.9, abs=0.05)
    assert result.others == 2
    assert result.manifest is None


def test_sparser_than_it_was_asked_for(tmp_path: Path) -> None:
    weight = sparse_weight("linear", (64, 64), "1:8")
    torch.save({"a.weight": torch.from_numpy(weight), "b.weight": random_weight((64, 64), 1)}, tmp_path / "a.pt")
    result = prune(tmp_path / "a.pt", Pattern(2, 4))
    found = by_name(inspect(result.output))["a.weight"]
    assert found.promised is not None
    assert str(found.promised.pattern) == "2:4"
    assert texts(found)["channel"] == "1:8"


@pytest.mark.parametrize("flavour", ["compressed", "inlined"])
def test_onnx_with_zeros_in_place_and_packed(tmp_path: Path, flavour: str) -> None:
    onnx.save(conv_net("1:4"), tmp_path / "a.onnx")
    dense = by_name(inspect(tmp_path / "a.onnx"))
    assert {name: texts(found)["channel"] for name, found in dense.items()} == dict.fromkeys(dense, "1:4")
    packed_file = export(tmp_path / "a.onnx", output=tmp_path / "b.onnx", flavour=flavour).output
    packed = by_name(inspect(packed_file))
    assert packed.keys() == dense.keys()
    for name, found in packed.items():
        assert found.packed
        assert found.nbytes < 0.3 * dense[name].nbytes
        assert found.density == dense[name].density
        assert texts(found)["channel"] == "1:4"
        assert found.dtype == "float32"
        assert found.shape == dense[name].shape
        assert found.promised is not None


@pytest.mark.parametrize(("require", "failing"), [("2:4", set()), ("1:2", {"a.weight"}), ("1:4", {"a.weight"})])
def test_require_with_a_manifest_looks_at_what_was_promised(tmp_path: Path, require: str, failing: set[str]) -> None:
    torch.save({"a.weight": random_weight((64, 64), 0), "fc.weight": random_weight((10, 64), 1)}, tmp_path / "a.pt")
    pruned = prune(tmp_path / "a.pt", Pattern(2, 4)).output
    assert {found.name for found in inspect(pruned, require=Pattern.parse(require)).failing} == failing


def test_require_without_a_manifest_looks_at_what_is_sparse(tmp_path: Path) -> None:
    sparse = torch.from_numpy(sparse_weight("linear", (64, 64), "2:4"))
    torch.save({"a.weight": sparse, "b.weight": random_weight((64, 64), 0)}, tmp_path / "a.pt")
    assert not inspect(tmp_path / "a.pt", require=Pattern(2, 4)).failing
    assert [found.name for found in inspect(tmp_path / "a.pt", require=Pattern(1, 4)).failing] == ["a.weight"]
    torch.save({"b.weight": random_weight((64, 64), 0)}, tmp_path / "b.pt")
    assert [found.name for found in inspect(tmp_path / "b.pt", require=Pattern(2, 4)).failing] == ["b.weight"]


def test_require_holds_packed_layers_to_their_axis(tmp_path: Path) -> None:
    onnx.save(conv_net("2:4"), tmp_path / "a.onnx")
    packed = export(tmp_path / "a.onnx", output=tmp_path / "b.onnx").output
    assert not inspect(packed, require=Pattern(2, 4)).failing
    assert len(inspect(packed, require=Pattern(1, 4)).failing) == 3


def test_tensors_that_are_no_layers_weight_are_shown_without_a_pattern(tmp_path: Path) -> None:
    torch.save({"six": torch.zeros((2,) * 6), "empty": torch.zeros(0, 4)}, tmp_path / "a.pt")
    result = inspect(tmp_path / "a.pt")
    assert {found.name for found in result.tensors} == {"six"}
    assert result.others == 1


def test_a_transposed_weight_is_found_along_its_own_axis(tmp_path: Path) -> None:
    stored = np.ascontiguousarray(sparse_weight("matmul", (64, 32), "1:4").T)
    nodes = [helper.make_node("Transpose", ["W"], ["w"]), helper.make_node("MatMul", ["X", "w"], ["Y"])]
    onnx.save(model_of(nodes, {"W": stored}, [1, 64]), tmp_path / "a.onnx")
    assert texts(by_name(inspect(tmp_path / "a.onnx"))["W"])["channel"] == "1:4"
