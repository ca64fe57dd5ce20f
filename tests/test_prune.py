from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from containers import Tied, sha256
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import conv_net, model_of, random_input, run
from strategies import DTYPES, naive_mask, patterns, random_weight
from torch import Tensor, nn

from nmconvert.arrays import as_array, digest
from nmconvert.checkpoint import open_checkpoint, stream
from nmconvert.errors import ModelError, PatternError, UsageError, WeightError
from nmconvert.magnitude import has_negative_zero
from nmconvert.manifest import Manifest
from nmconvert.matrix import MatrixView
from nmconvert.pattern import AXES, Axis, Pattern
from nmconvert.prune import default_output, prune
from nmconvert.runtime import kernels
from nmconvert.verify import verify


def naive_prune(weight: Tensor, kind: Any, pattern: Pattern, axis: Axis, groups: int = 1) -> Tensor:
    """The mask of the naive reference, applied to the weight."""
    view = MatrixView.of(kind, weight.shape, axis, groups)
    mask = naive_mask(view.to_matrix(weight).abs().double().numpy(), pattern)
    return torch.where(view.from_matrix(torch.from_numpy(mask)), weight, torch.zeros_like(weight))


def manifest_of(path: Path) -> Manifest:
    text = open_checkpoint(path).manifest_text()
    assert text is not None
    return Manifest.from_json(text, str(path))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patterns(dense=False), st.sampled_from(AXES), st.sampled_from(DTYPES), st.integers(2, 40), st.integers(0, 2**16))
def test_a_state_dict_equals_the_naive_reference(
    tmp_path: Path, pattern: Pattern, axis: Axis, dtype: torch.dtype, channels: int, seed: int
) -> None:
    state = {
        "conv.weight": random_weight((6, channels, 2, 2), seed, dtype, ties=True),
        "deconv.weight": random_weight((channels, 4, 2, 2), seed + 1, dtype),
        "linear.weight": random_weight((5, channels), seed + 2, dtype),
        "h.0.attn.c_attn.weight": random_weight((channels, 7), seed + 3, dtype),
        "last.weight": random_weight((2, 2), seed, dtype),
        "linear.bias": random_weight((5,), seed, dtype),
    }
    torch.save(state, tmp_path / "a.pt")
    include = ["conv.*", "deconv.*", "linear.weight", "h.*"]
    if channels <= pattern.n and axis == "channel":  # the convolution's K is four times that
        include = ["conv.*"]
    if 4 * channels <= pattern.n:
        with pytest.raises(UsageError, match="nothing to prune"):
            prune(tmp_path / "a.pt", pattern, axis, include=include)
        return
    result = prune(tmp_path / "a.pt", pattern, axis, include=include)
    assert result.output == tmp_path / f"a.nm{pattern.n}-{pattern.m}.pt"
    after = torch.load(result.output, weights_only=True)
    kinds = {
        "conv.weight": "conv",
        "deconv.weight": "conv_transpose",
        "linear.weight": "linear",
        "h.0.attn.c_attn.weight": "matmul",
    }
    pruned = {row.name for row in result.plan.pruned}
    for name, weight in state.items():
        expected = naive_prune(weight, kinds[name], pattern, axis) if name in pruned else weight
        assert after[name].dtype == dtype
        assert torch.equal(after[name], expected), name
    for layer in manifest_of(result.output).layers:
        assert layer.digest == digest(as_array(after[layer.name]))
        kept, total = after[layer.name].double().square().sum(), state[layer.name].double().square().sum()
        assert layer.energy == pytest.approx(float(kept / total) if total else 1.0, rel=1e-5)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(24, 24, 1, 1), (24, 24, 1), (1, 24, 1, 1), (24, 24, 3, 1)])
def test_kernels_of_one_position(tmp_path: Path, shape: tuple[int, ...], axis: Axis) -> None:
    """Their matrix is the weight itself, seen with other strides."""
    weight = random_weight(shape, 0)
    torch.save({"a.weight": weight}, tmp_path / "a.pt")
    after = torch.load(prune(tmp_path / "a.pt", Pattern(2, 4), axis, include=["a.weight"]).output, weights_only=True)
    assert torch.equal(after["a.weight"], naive_prune(weight, "conv", Pattern(2, 4), axis))


def test_in_blocks_of_rows_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"conv.weight": random_weight((64, 9, 3, 3), 0), "a.weight": random_weight((70, 33), 1)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    whole = prune(tmp_path / "a.safetensors", Pattern(2, 4), output=tmp_path / "whole.safetensors")
    monkeypatch.setattr(stream, "BLOCK", 2000)
    blocks = prune(tmp_path / "a.safetensors", Pattern(2, 4), output=tmp_path / "blocks.safetensors")
    for first, second in zip(whole.manifest.layers, blocks.manifest.layers, strict=True):
        assert first.digest == second.digest
        assert first.energy == pytest.approx(second.energy)
    first, second = (safetensors.torch.load_file(r.output) for r in (whole, blocks))
    assert all(torch.equal(first[name], second[name]) for name in state)


def test_a_negative_zero_in_one_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are edited by several threads at once; what one finds no other may overwrite."""

    def slowly(weight: Any) -> bool:
        found = has_negative_zero(weight)
        sleep(0.0 if found else 0.005)
        return found

    weight = random_weight((64, 32), 0)
    weight[20:40] *= weight[20:40] > 0  # as a mask leaves them
    safetensors.torch.save_file({"a.weight": weight}, tmp_path / "a.safetensors")
    monkeypatch.setattr(stream, "BLOCK", 512)
    monkeypatch.setattr("nmconvert.prune.has_negative_zero", slowly)
    for _ in range(4):
        assert not verify(prune(tmp_path / "a.safetensors", Pattern(2, 4)).output).failed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, bad: float) -> None:
    state = {"good.weight": torch.ones(8, 8), "bad.weight": torch.ones(8, 8)}
    state["bad.weight"][3, 5] = bad
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(
        WeightError, match=r"a\.pt: bad\.weight: holds NaN or infinite weights; repair the checkpoint or --exclude"
    ):
        prune(tmp_path / "a.pt", Pattern(2, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert prune(tmp_path / "a.pt", Pattern(2, 4), exclude=["bad*"]).plan.pruned


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_energy_of_very_large_and_small_weights(tmp_path: Path, scale: float) -> None:
    torch.save({"a.weight": random_weight((8, 8), 0) * scale}, tmp_path / "a.pt")
    torch.save({"a.weight": random_weight((8, 8), 0)}, tmp_path / "b.pt")
    found, expected = (prune(tmp_path / name, Pattern(2, 4)).layer("a.weight").energy for name in ("a.pt", "b.pt"))
    assert found == pytest.approx(expected, rel=1e-4)


def test_what_was_said_is_kept_and_each_stage_recorded(tmp_path: Path) -> None:
    torch.save({"a.weight": random_weight((8, 8), 0)}, tmp_path / "a.pt")
    first = prune(tmp_path / "a.pt", Pattern(2, 4), settings={"model": "m:f", "input": None})
    second = prune(first.output, Pattern(1, 4), "kernel", output=tmp_path / "b.pt")
    manifest = manifest_of(second.output)
    assert manifest.settings == {"model": "m:f", "source": str(first.output.resolve())}
    assert [(stage["stage"], stage["pattern"]) for stage in manifest.history] == [("prune", "2:4"), ("prune", "1:4")]
    assert str(manifest.layers[0].pattern) == "1:4"


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    torch.save({"a.weight": random_weight((8, 8), 0)}, tmp_path / "a.pt")
    (tmp_path / "link.pt").symlink_to("a.pt")
    before = sha256(tmp_path / "a.pt")
    for output in ("a.pt", "link.pt"):
        with pytest.raises(UsageError, match="is read by this run; give another name with --output"):
            prune(tmp_path / "a.pt", Pattern(2, 4), output=tmp_path / output)
    assert sha256(tmp_path / "a.pt") == before


def test_the_current_folder_is_no_name_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a.weight": random_weight((8, 8), 0)}, tmp_path / "a.pt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in ("", ".", ".."):
        with pytest.raises(UsageError, match="give"):
            prune(tmp_path / "a.pt", Pattern(2, 4), output=Path(output))


def test_a_folder_of_somebody_else_is_refused_before_the_work(tmp_path: Path) -> None:
    source, home = tmp_path / "model", tmp_path / "home"
    source.mkdir()
    safetensors.torch.save_file({"layer.weight": torch.full((8, 8), torch.nan)}, source / "model.safetensors")
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="home: exists and was not written by nmconvert"):  # not: a weight is NaN
        prune(source, Pattern(2, 4), output=home)


def test_nothing_to_prune_says_the_commonest_reason(tmp_path: Path) -> None:
    torch.save(
        {"embed.weight": torch.ones(8, 8), "fc.weight": torch.ones(8, 8), "embed2.weight": torch.ones(4, 4)}, tmp_path / "a.pt"
    )
    with pytest.raises(UsageError, match=r"a\.pt: nothing to prune among its 3 tensors; most often: an embedding, by its name"):
        prune(tmp_path / "a.pt", Pattern(2, 4))
    torch.save({"b": torch.ones(8)}, tmp_path / "b.pt")
    with pytest.raises(UsageError, match="none has two dimensions or more"):
        prune(tmp_path / "b.pt", Pattern(2, 4))
    with pytest.raises(PatternError):
        prune(tmp_path / "b.pt", Pattern(0, 4))
    torch.save({"a.weight": torch.ones(8, 8)}, tmp_path / "c.pt")
    with pytest.raises(UsageError, match="missing: there is no such folder for --output; make it first"):
        prune(tmp_path / "c.pt", Pattern(2, 4), output=tmp_path / "missing" / "d.pt")


def test_heads_that_were_tied_when_saved(tmp_path: Path) -> None:
    table, other = random_weight((16, 8), 0), random_weight((16, 8), 2)
    state = {"tok_embeddings.weight": table, "a.weight": random_weight((8, 8), 1), "b.weight": table.clone()}
    state |= {"seg_embeddings.weight": other, "c.weight": other.clone()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    found = {row.name: row.reason for row in prune(tmp_path / "a.safetensors", Pattern(2, 4)).plan.rows}
    assert found == {
        "tok_embeddings.weight": "an embedding, by its name",
        "a.weight": None,
        "b.weight": "tied: an equal copy of tok_embeddings.weight",
        "seg_embeddings.weight": "an embedding, by its name",
        "c.weight": "tied: an equal copy of seg_embeddings.weight",
    }


class Mixed(nn.Module):
    """Layers whose names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.two = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(8, 8))
        self.three = nn.Conv1d(8, 8, 3)


def test_with_a_model_the_kinds_are_known(tmp_path: Path) -> None:
    model = Mixed()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    result = prune(tmp_path / "a.pt", Pattern(1, 2), model=model)
    rows = {row.name: row for row in result.plan.rows}
    assert (rows["one.weight"].info.kind, rows["one.weight"].info.groups) == ("conv_transpose", 2)
    assert rows["table"].reason == "not the weight of a convolution or a linear layer"
    assert not any(row.assumed for row in result.plan.pruned)
    after = torch.load(result.output, weights_only=True)
    expected = naive_prune(model.one.weight.detach(), "conv_transpose", Pattern(1, 2), "channel", groups=2)
    assert torch.equal(after["one.weight"], expected)
    Mixed().load_state_dict(after, strict=True)


@pytest.mark.parametrize(("prefix", "shown"), [("module.", ""), ("_orig_mod.", ""), ("model.", "model.")])
def test_with_a_model_prefixes_are_seen_through(tmp_path: Path, prefix: str, shown: str) -> None:
    model = Mixed()
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in model.state_dict().items()}}, tmp_path / "a.pt")
    result = prune(tmp_path / "a.pt", Pattern(1, 2), model=model)
    assert {row.name for row in result.plan.pruned} == {shown + name for name in ("one.weight", "two.weight", "three.weight")}


def test_with_a_model_its_second_state_dict_is_pruned_too(tmp_path: Path) -> None:
    model, average = Mixed(), Mixed()
    torch.save({"model": model.state_dict(), "ema": average.state_dict()}, tmp_path / "a.pt")
    for known in (model, None):
        result = prune(tmp_path / "a.pt", Pattern(1, 2), model=known)
        after = torch.load(result.output, weights_only=True)
        for part, before in (("model", model), ("ema", average)):
            expected = naive_prune(before.two.weight.detach(), "linear", Pattern(1, 2), "channel")
            assert torch.equal(after[part]["two.weight"], expected)


def test_a_model_that_does_not_fit_is_named(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(8, 8)}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="none of its tensors is a weight of the model; name the right one with --model"):
        prune(tmp_path / "a.pt", Pattern(2, 4), model=Mixed())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for given_model in (None, model):
        result = prune(tmp_path / "a.pt", Pattern(2, 4), model=given_model)
        after = torch.load(result.output, weights_only=True)
        assert after["first.weight"].data_ptr() == after["second.weight"].data_ptr()
        assert torch.equal(after["first.weight"], naive_prune(model.first.weight.detach(), "linear", Pattern(2, 4), "channel"))


class Parts(nn.Module):
    """Weights as people have them that are no layer's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.normed = nn.utils.weight_norm(nn.Linear(16, 16))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.free = nn.Parameter(torch.randn(16, 16))
        self.lstm = nn.LSTM(16, 16)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_with_a_model_every_weight_has_its_own_reason(tmp_path: Path) -> None:
    torch.save(Parts().state_dict(), tmp_path / "a.pt")
    rows = {row.name: row for row in prune(tmp_path / "a.pt", Pattern(2, 4), model=Parts()).plan.rows}
    assert rows["one.weight"].pattern == Pattern(2, 4)
    assert rows["two.weight"].reason == "shares its storage with one.weight, pruned there"
    for name in ("normed.weight_v", "spectral.parametrizations.weight.original"):
        assert "a weight is computed from it: fold it in first" in (rows[name].reason or "")
    assert rows["free"].reason == rows["lstm.weight_ih_l0"].reason == "not the weight of a convolution or a linear layer"
    asked = {"include": ["free", "*weight_ih*"], "model": Parts(), "output": tmp_path / "b.pt"}
    assert {row.name for row in prune(tmp_path / "a.pt", Pattern(2, 4), **asked).plan.pruned} == {"free", "lstm.weight_ih_l0"}
    with pytest.raises(UsageError, match="most often: a weight is computed from it"):
        prune(tmp_path / "a.pt", Pattern(2, 4), include=["normed.weight_v"], model=Parts())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_weights_are_computed_from_stays_dense_without_the_model(tmp_path: Path) -> None:
    """Pruned, it could not be packed: no file has zeros where a norm multiplies."""
    parts = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(16, 16)),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 3)),
        nn.utils.spectral_norm(nn.Linear(16, 16)),
        nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)),
        nn.Linear(16, 16),
    )
    torch.save(parts.state_dict(), tmp_path / "a.pt")
    rows = {row.name: row for row in prune(tmp_path / "a.pt", Pattern(2, 4)).plan.rows}
    assert [name for name, row in rows.items() if row.pattern] == ["4.weight"]
    for name in ("0.weight_v", "1.parametrizations.weight.original1", "2.weight_orig", "3.parametrizations.weight.original"):
        assert "a weight is computed from it: fold it in first" in (rows[name].reason or "")
    asked = prune(tmp_path / "a.pt", Pattern(2, 4), include=["0.weight_v"])
    assert [row.name for row in asked.plan.pruned] == ["0.weight_v"]


def test_a_model_of_another_size_is_named(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(16, 8)).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a\.pt: '0\.weight' is \[8, 16\], and \[8, 16, 3\] in the model; name the right one"):
        prune(tmp_path / "a.pt", Pattern(2, 4), model=nn.Sequential(nn.Conv1d(16, 8, 3)))


def test_default_outputs(tmp_path: Path) -> None:
    (tmp_path / "folder.v1").mkdir()
    assert default_output(tmp_path / "folder.v1", Pattern(2, 4)) == tmp_path / "folder.v1.nm2-4"
    assert default_output(Path("a.b.pth"), Pattern(1, 16)) == Path("a.b.nm1-16.pth")


def test_a_folder_that_is_given_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy stands beside it, under the name that it has on the disk."""
    (tmp_path / "gpt.v1" / "sub").mkdir(parents=True)
    for here, name in (("gpt.v1", "."), ("gpt.v1/sub", "..")):
        monkeypatch.chdir(tmp_path / here)
        assert default_output(Path(name), Pattern(2, 4)) == tmp_path / "gpt.v1.nm2-4"


def test_a_link_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "0a1b").touch()
    (tmp_path / "net.pt").symlink_to(tmp_path / "store" / "0a1b")
    assert default_output(tmp_path / "net.pt", Pattern(2, 4)) == tmp_path / "net.nm2-4.pt"


# ── ONNX ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("axis", AXES)
def test_onnx_equals_the_naive_reference(tmp_path: Path, axis: Axis) -> None:
    onnx.save(conv_net(None), tmp_path / "a.onnx")
    result = prune(tmp_path / "a.onnx", Pattern(2, 4), axis)
    assert not any(row.assumed for row in result.plan.rows if row.pattern)
    before, after = (
        {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in onnx.load(path).graph.initializer}
        for path in (tmp_path / "a.onnx", result.output)
    )
    for name in ("first.weight", "second.weight"):
        assert torch.equal(after[name], naive_prune(before[name], "conv", Pattern(2, 4), axis))
    assert torch.equal(after["head.weight"], before["head.weight"])  # the output layer


TRANSPOSED = [
    (helper.make_node("MatMul", ["X", "w"], ["Y"]), "matmul", [1, 6]),
    (helper.make_node("Gemm", ["X", "w"], ["Y"], transB=1), "linear", [1, 8]),
    (helper.make_node("MatMul", ["w", "X"], ["Y"]), "linear", [8, 2]),
]


@pytest.mark.parametrize(("node", "kind", "x"), TRANSPOSED)
def test_onnx_weights_behind_a_transpose(tmp_path: Path, node: Any, kind: Any, x: list[int]) -> None:
    stored = random_input((8, 6))
    nodes = [helper.make_node("Transpose", ["W"], ["w"], perm=[1, 0]), node]
    onnx.save(model_of(nodes, {"W": stored}, x), tmp_path / "a.onnx")
    result = prune(tmp_path / "a.onnx", Pattern(2, 4), include=["W"])
    after = numpy_helper.to_array(onnx.load(result.output).graph.initializer[0])
    expected = naive_prune(torch.from_numpy(stored.T.copy()), kind, Pattern(2, 4), "channel").numpy().T
    assert np.array_equal(after, expected)
    layer = manifest_of(result.output).layers[0]
    assert (layer.info.transposed, layer.digest) == ((1, 0), digest(after))


@pytest.mark.parametrize("opset", range(7, 23))
def test_every_opset_that_onnxruntime_loads(tmp_path: Path, opset: int) -> None:
    onnx.save(conv_net(None, opset=opset), tmp_path / "a.onnx")
    result = prune(tmp_path / "a.onnx", Pattern(2, 4), include=["*.weight"])
    x = random_input((2, 8, 6, 6))
    model = onnx.load(tmp_path / "a.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight"):
            weight = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
            kind: Any = "conv" if weight.ndim == 4 else "linear"
            tensor.CopyFrom(numpy_helper.from_array(naive_prune(weight, kind, Pattern(2, 4), "channel").numpy(), tensor.name))
    assert np.array_equal(run(result.output, x), run(model, x))


def test_int8_weights_are_left_dense_with_the_reason(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["Q", "scale"], ["q"]),
        helper.make_node("MatMul", ["X", "q"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "W"], ["c"]),
        helper.make_node("MatMul", ["c", "V"], ["Y"]),
    ]
    integers = (random_input((8, 8)) * 20).astype(np.int8)
    constants = {"Q": integers, "scale": np.array(0.1, np.float32), "W": random_input((8, 8)), "V": random_input((8, 8))}
    onnx.save(model_of(nodes, constants, [1, 8]), tmp_path / "a.onnx")
    result = prune(tmp_path / "a.onnx", Pattern(2, 4))
    reasons = {row.name: row.reason for row in result.plan.rows}
    assert reasons["Q"] == "int8 behind DequantizeLinear: left as it is"
    assert reasons["V"] == "the output layer; --include prunes it"
    assert reasons["W"] is None
    assert result.manifest.dense["Q"] == reasons["Q"]


def test_float16_and_double_onnx_weights(tmp_path: Path) -> None:
    for element in (TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16):
        dtype = helper.tensor_dtype_to_np_dtype(element)
        weight = random_input((16, 8)).astype(dtype)
        nodes = [helper.make_node("MatMul", ["X", "W"], ["Y"])]
        onnx.save(model_of(nodes, {"W": weight}, [1, 16], element=element), tmp_path / "a.onnx")
        result = prune(tmp_path / "a.onnx", Pattern(2, 4), include=["W"])
        after = open_checkpoint(result.output).read("W")
        expected = naive_prune(torch.from_numpy(weight.astype(np.float64)), "matmul", Pattern(2, 4), "channel")
        assert torch.equal(after.double(), expected)
        assert json.loads(result.manifest.to_json())["layers"][0]["dtype"] == str(after.dtype).removeprefix("torch.")


def test_a_safetensors_file_needs_neither_torch_nor_onnx(tmp_path: Path) -> None:
    """Which take longer to import than a gigabyte to prune; convolutions are included."""
    if not kernels().usable:
        pytest.skip(f"NumPy's way needs torch for its masks; no native kernels: {kernels().reason}")
    tensors = {"fc.weight": torch.randn(64, 64), "conv.weight": torch.randn(16, 8, 3, 3).bfloat16()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    program = """
import sys
from pathlib import Path
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
prune(Path(sys.argv[1]), Pattern(2, 4), include=["*"])
print([name for name in ("torch", "onnx") if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.safetensors"], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"
