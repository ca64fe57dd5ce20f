from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from onnx_models import conv_net
from test_export_torch import IMAGE, SPEC, Net, net

from nmconvert.checkpoint import open_checkpoint
from nmconvert.errors import CheckpointError, ModelError, UsageError
from nmconvert.export import export
from nmconvert.inputs import InputSpec
from nmconvert.onnx_graph import DOMAIN
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.verify import Verification, verify


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ONNX model with its pruned, packed, dense and inlined copies, and a state dict with its pruned and exported ones."""
    folder = tmp_path_factory.mktemp("verify")
    onnx.save(conv_net(None), folder / "source.onnx")
    pruned = prune(folder / "source.onnx", Pattern(2, 4), include=["*.weight"]).output
    found = {"source": folder / "source.onnx", "pruned": pruned}
    for flavour in ("compressed", "dense", "inlined"):
        found[flavour] = export(pruned, output=folder / f"{flavour}.onnx", flavour=flavour).output
    torch.save(net().state_dict(), folder / "net.pt")
    settings = {"model": SPEC.format("Net"), "input": [str(spec) for spec in IMAGE]}
    found["net"] = folder / "net.pt"
    found["net pruned"] = prune(found["net"], Pattern(2, 4), model=net(), settings=settings).output
    found["net onnx"] = export(found["net pruned"]).output
    return found


def failed(result: Verification) -> dict[str, str]:
    return {check.what: check.seen for check in result.failed}


@pytest.mark.parametrize("name", ["pruned", "compressed", "dense", "inlined", "net pruned", "net onnx"])
def test_what_we_write_holds(files: dict[str, Path], name: str) -> None:
    result = verify(files[name])
    assert failed(result) == {}
    assert len(result.checks) >= 3


def changed(files: dict[str, Path], name: str, tmp_path: Path, change: Callable[[ModelProto], object]) -> Path:
    model = onnx.load(files[name])
    change(model)
    (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "changed.onnx"


def tensor_of(model: ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def flip(model: ModelProto, name: str, byte: int = 0, bit: int = 0) -> None:
    tensor = tensor_of(model, name)
    raw = bytearray(tensor.raw_data)
    raw[byte] ^= 1 << bit
    tensor.raw_data = bytes(raw)


def set_attribute(model: ModelProto, name: str, value: Any) -> None:
    node = next(node for node in model.graph.node if node.domain == DOMAIN)
    for attr in node.attribute:
        if attr.name == name:
            attr.CopyFrom(helper.make_attribute(name, value))


def swap(model: ModelProto, first: str, second: str) -> None:
    """Exchange two layers' packed constants in the calls."""
    names = {f"{a}.{part}": f"{b}.{part}" for a, b in ((first, second), (second, first)) for part in ("values", "mask")}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_the_values(files: dict[str, Path], tmp_path: Path, bit: int) -> None:
    path = changed(files, "compressed", tmp_path, lambda model: flip(model, "second.weight.values", 5, bit))
    assert "SHA-256" in failed(verify(path))["second.weight"]


@pytest.mark.parametrize("byte", [0, 3, -1])
def test_a_flipped_bit_in_the_mask(files: dict[str, Path], tmp_path: Path, byte: int) -> None:
    for bit in range(8):
        path = changed(files, "compressed", tmp_path, lambda model, bit=bit: flip(model, "first.weight.mask", byte, bit))
        seen = failed(verify(path))["first.weight"]
        assert "damaged" in seen or "SHA-256" in seen or "not 2:4" in seen, (bit, seen)


@pytest.mark.parametrize("name", ["pruned", "dense"])
def test_a_flipped_bit_in_dense_zeros(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = changed(files, name, tmp_path, lambda model: flip(model, "first.weight", 2, 1))
    seen = failed(verify(path))["first.weight"]
    assert "SHA-256" in seen or seen == "not 2:4 along the channel axis"


def test_a_zero_that_is_none_any_more(files: dict[str, Path], tmp_path: Path) -> None:
    def fill(model: ModelProto) -> None:
        tensor = tensor_of(model, "first.weight")
        tensor.CopyFrom(
            numpy_helper.from_array(np.where(numpy_helper.to_array(tensor) == 0, 1, 2).astype(np.float32), tensor.name)
        )

    assert failed(verify(changed(files, "dense", tmp_path, fill)))["first.weight"] == "not 2:4 along the channel axis"


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 1), ("m", 8), ("axis", "kernel"), ("perm", [0, 1, 2, 3]), ("shape", [8, 8, 9, 1]), ("permuted", [8, 8, 3, 3])],
)
def test_changed_attributes(files: dict[str, Path], tmp_path: Path, name: str, value: Any) -> None:
    result = verify(changed(files, "compressed", tmp_path, lambda model: set_attribute(model, name, value)))
    assert "first.weight" in failed(result), failed(result)


def test_swapped_layers(tmp_path: Path) -> None:
    twice = conv_net(None)
    second = tensor_of(twice, "second.weight")
    second.CopyFrom(
        numpy_helper.from_array(np.random.default_rng(9).standard_normal((8, 8, 3, 3)).astype(np.float32), second.name)
    )
    head = tensor_of(twice, "head.weight")
    head.CopyFrom(numpy_helper.from_array(np.ones((10, 8), np.float32), head.name))
    onnx.save(twice, tmp_path / "a.onnx")
    pruned = prune(tmp_path / "a.onnx", Pattern(2, 4)).output
    packed = export(pruned, output=tmp_path / "b.onnx").output
    path = changed({"b": packed}, "b", tmp_path, lambda model: swap(model, "first.weight", "second.weight"))
    assert "output 0" in failed(verify(path, pruned))


def test_without_its_manifest(files: dict[str, Path], tmp_path: Path) -> None:
    path = changed(files, "compressed", tmp_path, lambda model: model.metadata_props.pop())
    seen = "none: nothing in this file says what it should be; only the patterns of its packed weights could be checked"
    assert failed(verify(path)) == {"manifest": seen}
    path = changed(files, "dense", tmp_path, lambda model: model.metadata_props.pop())
    assert failed(verify(path)) == {"manifest": "none: nothing in this file says what it should be; see nmconvert inspect"}


def test_a_layer_that_the_manifest_does_not_know(files: dict[str, Path], tmp_path: Path) -> None:
    def forget(model: ModelProto) -> None:
        entry = model.metadata_props[0]
        entry.value = entry.value.replace('"head.weight"', '"gone.weight"')

    seen = failed(verify(changed(files, "compressed", tmp_path, forget)))
    assert seen["head.weight"] == "packed, but the manifest does not know it"
    assert "there is no tensor 'gone.weight'" in seen["gone.weight"]


def test_damaged_manifest_and_malformed_calls(files: dict[str, Path], tmp_path: Path) -> None:
    def cut(model: ModelProto) -> None:
        model.metadata_props[0].value = model.metadata_props[0].value[:-5]

    with pytest.raises(CheckpointError, match=r"changed\.onnx: its nmconvert manifest is damaged"):
        verify(changed(files, "compressed", tmp_path, cut))
    for name, value in (("n", 0), ("axis", "depth"), ("perm", [0, 0, 1, 2]), ("shape", [0]), ("code_shape", [1])):
        with pytest.raises(CheckpointError, match=r"changed\.onnx: node 'first' \(SparseConvRelu\) is malformed"):
            verify(changed(files, "compressed", tmp_path, lambda model, n=name, v=value: set_attribute(model, n, v)))


def test_a_graph_that_does_not_run(files: dict[str, Path], tmp_path: Path) -> None:
    def rename(model: ModelProto) -> None:
        model.graph.node[1].op_type = "Nothing"

    seen = failed(verify(changed(files, "dense", tmp_path, rename)))
    assert {"ONNX checker", "stock onnxruntime"} <= set(seen)
    assert all("\n" not in text for text in seen.values())


def test_outputs_that_are_no_numbers(files: dict[str, Path], tmp_path: Path) -> None:
    def poison(model: ModelProto) -> None:
        tensor = tensor_of(model, "head.bias")
        tensor.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), tensor.name))

    seen = failed(verify(changed(files, "compressed", tmp_path, poison)))
    assert seen["stock onnxruntime"] == "an output holds NaN or infinite values for a random input"


# ── against another file ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "against"),
    [
        ("compressed", "pruned"),
        ("compressed", "dense"),
        ("compressed", "inlined"),
        ("inlined", "compressed"),
        ("dense", "compressed"),
        ("pruned", "compressed"),
        ("net onnx", "net pruned"),
        ("net pruned", "net onnx"),
        ("net pruned", "net"),
    ],
)
def test_files_that_agree(files: dict[str, Path], name: str, against: str) -> None:
    result = verify(files[name], files[against])
    assert failed(result) == {}
    assert len(result.checks) > len(verify(files[name]).checks)


def test_packed_weights_are_compared_one_by_one(files: dict[str, Path]) -> None:
    seen = {check.what: check.seen for check in verify(files["compressed"], files["dense"]).checks}
    assert seen["first.weight"] == "the same weight, bit for bit"


@pytest.mark.parametrize(
    ("name", "against"), [("compressed", "source"), ("source", "compressed"), ("net onnx", "net"), ("net", "net pruned")]
)
def test_files_that_do_not_agree(files: dict[str, Path], name: str, against: str) -> None:
    assert any(what.startswith("output") or what.endswith("weight") for what in failed(verify(files[name], files[against])))


@pytest.mark.parametrize("name", ["pruned", "compressed"])
def test_against_the_dense_original_it_says_what_differs_and_why(files: dict[str, Path], name: str) -> None:
    result = verify(files[name], files["source"])
    sparse = [check for check in result.checks if check.seen.startswith("identical where it is kept")]
    assert "first.weight" in {check.what for check in sparse}
    assert set(failed(result)) == {"output 0"}
    assert failed(result)["output 0"].endswith(f"; {len(sparse)} of its weights are pruned from that file's")


def test_pruned_from_another_file(files: dict[str, Path], tmp_path: Path) -> None:
    def negate(model: ModelProto) -> None:
        tensor = tensor_of(model, "first.weight")
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))

    other = changed(files, "source", tmp_path, negate)
    for name in ("pruned", "compressed"):
        assert "first.weight" in failed(verify(files[name], other))


def test_a_checkpoint_against_another(files: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(files["net pruned"], weights_only=True)
    cases: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
        "fc.bias": (lambda s: s["fc.bias"].mul_(0), "values differ"),
        "fc.weight": (lambda s: s["fc.weight"].add_(1), "values differ"),
        "head.bias": (lambda s: s.pop("head.bias"), "only in"),
        "new": (lambda s: s.update(new=torch.ones(2)), "only in"),
        "grouped.bias": (lambda s: s.update({"grouped.bias": torch.ones(3)}), "against another shape or type"),
        "deconv.bias": (lambda s: s.update({"deconv.bias": s["deconv.bias"].half()}), "against another shape or type"),
    }
    for name, (change, text) in cases.items():
        other = {key: tensor.clone() for key, tensor in state.items()}
        change(other)
        torch.save(other, tmp_path / "other.pt")
        assert text in failed(verify(tmp_path / "other.pt", files["net"]))[name], name


def test_what_is_missing_for_a_comparison_is_said(files: dict[str, Path], tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match="holds weights only; name the module with --model"):
        verify(files["compressed"], tmp_path / "a.pt")
    with pytest.raises(ModelError, match="choose the model's size with --model-arg"):
        verify(files["net onnx"], files["net"], model=SPEC.format("tokens"))
    with pytest.raises(UsageError, match="the model has no input 'z': it takes X"):
        verify(files["compressed"], files["dense"], inputs=[InputSpec("z", (1,))])
    result = verify(files["net onnx"], tmp_path / "a.pt", model=SPEC.format("Net"))
    assert any(what.startswith("output") for what in failed(result))


def test_inputs_given_wrongly_are_no_fault_of_the_file(files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="the model has no input 'nosuch': it takes X"):
        verify(files["compressed"], inputs=[InputSpec("nosuch", (1,))])


def test_own_readers_agree_with_the_module(files: dict[str, Path]) -> None:
    """What verify calls a checkpoint's weights is what a strict load gives."""
    model = Net()
    model.load_state_dict(torch.load(files["net pruned"], weights_only=True), strict=True)
    checkpoint = open_checkpoint(files["net pruned"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor)
