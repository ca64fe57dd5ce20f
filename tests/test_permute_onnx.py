"""Permuting bare ONNX graphs: the same functions, in onnxruntime, and what cannot be proved left alone."""

import json
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from permutable import MODELS, Encoder, Flattened, Pyramid, SharedHeads, Shuffled, built, example
from test_calibrate_onnx import graph_of, residual_net, rows_of

from nmconvert.calibrate.axes_onnx import find_channels
from nmconvert.calibrate.onnx_driver import computed
from nmconvert.calibrate.onnx_permute import permute_onnx, with_tensors
from nmconvert.calibrate.permute import orders_of
from nmconvert.cli import group
from nmconvert.errors import ModelError
from nmconvert.export.trace import trace
from nmconvert.inputs import InputSpec
from nmconvert.onnx_graph import named_tensors, tensor_infos
from nmconvert.pattern import Pattern
from nmconvert.plan import make_plan

NM = Pattern(2, 4)


@cache
def exported(kind):
    """A model's graph, in float32, and its inputs."""
    x = example(kind, torch.float32)
    spec = InputSpec(None, tuple(x.shape), str(x.dtype).removeprefix("torch."))
    model = trace(built(kind, dtype=torch.float32), [spec], {}).model
    return model, {model.graph.input[0].name: x}


def outputs(model, feeds):
    return computed(model, feeds, [value.name for value in model.graph.output])


def assert_same(model, other, feeds):
    for ours, theirs in zip(outputs(other, feeds), outputs(model, feeds), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def shuffled(model, proof, seed):
    """The graph with every class that may be permuted in some other order."""
    generator = torch.Generator().manual_seed(seed)
    orders = orders_of(proof, {n: torch.randperm(c.size, generator=generator) for n, c in enumerate(proof.channels)})
    tensors = {name: torch.from_numpy(numpy_helper.to_array(t).copy()) for name, t in named_tensors(model)}
    for (name, dim), order in orders.items():
        tensors[name] = tensors[name].index_select(dim, order)
    return with_tensors(model, {name: tensors[name] for name, _ in orders})


@pytest.mark.parametrize("kind", MODELS)
def test_every_class_that_is_not_frozen_may_be_permuted_at_will(kind):
    model, feeds = exported(kind)
    proof = find_channels(model, feeds)
    assert proof.channels
    for seed in range(2):
        assert_same(model, shuffled(model, proof, seed), feeds)


@pytest.mark.parametrize("kind", [Shuffled, Pyramid, SharedHeads, Encoder, Flattened])
def test_the_search_keeps_more_and_the_graph_is_the_same(kind):
    model, feeds = exported(kind)
    rows = make_plan(tensor_infos(model), NM).pruned
    tensors, done = permute_onnx(model, rows, feeds)
    assert {name for one in done for name in one.names} == {row.name for row in rows}
    assert sum(one.after for one in done) > sum(one.before for one in done)
    assert_same(model, with_tensors(model, tensors), feeds)
    assert all(one.reason for one in done if one.after == one.before)


node = helper.make_node


def integers(**constants):
    return [numpy_helper.from_array(np.array(values, dtype=np.int64), name) for name, values in constants.items()]


def shuffle_net(picked=None):
    """A shuffle as PyTorch's exporter of 2021 wrote it: two halves by Gather, and a Slice of one."""
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Reshape", ["a", "pairs"], ["b"]),
        node("Transpose", ["b"], ["c"], perm=[1, 0, 2]),
        node("Reshape", ["c", "halves"], ["d"]),
        node("Gather", ["d", "zero"], ["left"], axis=0),
        node("Gather", ["d", picked or "one"], ["right"], axis=0),
        node("Conv", ["right", "w1", "b1"], ["e"]),
        node("Relu", ["e"], ["f"]),
        node("Slice", ["f", "four", "twelve", "one_axis"], ["g"]),
        node("Concat", ["left", "g"], ["h"], axis=1),
        node("Conv", ["h", "w2"], ["y"]),
    ]
    model = graph_of(nodes, {"w0": (32, 3, 1, 1), "w1": (16, 16, 1, 1), "b1": (16,), "w2": (4, 24, 1, 1)})
    numbers = {"pairs": [16, 2, 25], "halves": [2, 1, 16, 5, 5], "four": [4], "twelve": [12], "one_axis": [1]}
    model.graph.initializer.extend([*integers(**numbers), *integers(zero=0, one=1)])
    return model, {"x": torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))}


def test_a_shuffle_by_reshapes_and_gathers_is_followed():
    model, feeds = shuffle_net()
    assert_same(model, shuffled(model, find_channels(model, feeds), 0), feeds)
    tensors, done = permute_onnx(model, rows_of(model, ["w1", "w2"]), feeds)
    assert {one.names[0]: one.reason for one in done} == {"w1": None, "w2": None}
    assert {"w0", "w1", "b1", "w2"} <= set(tensors)


def test_a_choice_by_the_input_keeps_what_it_chooses_from():
    model, feeds = shuffle_net(picked="which")
    model.graph.input.append(helper.make_tensor_value_info("which", TensorProto.INT64, []))
    feeds["which"] = torch.tensor(1)
    proof = find_channels(model, feeds)
    assert_same(model, shuffled(model, proof, 0), {**feeds, "which": torch.tensor(0)})


def test_shared_constants_and_nested_graphs_move_together_or_not_at_all():
    nodes = [
        node("Conv", ["x", "w0", "b"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("Conv", ["r", "w", "b"], ["c"]),
        node("Add", ["c", "r"], ["d"]),
        node("Conv", ["d", "w", "b"], ["e"]),
        node("Conv", ["e", "w1"], ["y"]),
    ]
    model = graph_of(nodes, {"w0": (8, 3, 1), "w": (8, 8, 1), "w1": (4, 8, 1), "b": (8,)})
    feeds = {"x": torch.randn(2, 3, 7)}
    proof = find_channels(model, feeds)
    assert [c.size for c in proof.channels] == [8]
    assert {(m.name, m.dim) for m in proof.channels[0].members} == {("w0", 0), ("b", 0), ("w", 0), ("w", 1), ("w1", 1)}
    assert_same(model, shuffled(model, proof, 0), feeds)
    body = helper.make_graph([node("Identity", ["b"], ["seen"])], "body", [], [helper.make_tensor_value_info("seen", 1, None)])
    model.graph.node.insert(0, node("If", ["yes"], ["out"], then_branch=body, else_branch=body))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    assert not find_channels(model, feeds).channels


@pytest.mark.parametrize(
    ("operator", "reason"),
    [(node("CumSum", ["a", "axis"], ["b"]), "CumSum"), (node("Einsum", ["a"], ["b"], equation="nct->nct"), "Einsum")],
)
def test_an_operator_without_a_rule_keeps_the_order(operator, reason):
    model = graph_of([node("Conv", ["x", "w0"], ["a"]), operator, node("Conv", ["b", "w1"], ["y"])],
                     {"w0": (8, 3, 1), "w1": (8, 8, 1)})  # fmt: skip
    model.graph.initializer.extend(integers(axis=2))
    tensors, done = permute_onnx(model, rows_of(model, ["w1"]), {"x": torch.randn(2, 3, 5)})
    assert not tensors
    assert [one.reason for one in done] == [f"its channels have to keep their order: {reason}"]


def test_quantised_constants_keep_their_order():
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("DequantizeLinear", ["q", "scale"], ["w"]),
        node("Conv", ["a", "w"], ["b"]),
        node("Conv", ["b", "w1"], ["y"]),
    ]
    model = graph_of(nodes, {"w0": (8, 3, 1), "w1": (4, 8, 1), "scale": np.array(0.01)})
    codes = np.random.default_rng(0).integers(-9, 9, (8, 8, 1)).astype(np.int8)
    model.graph.initializer.append(numpy_helper.from_array(codes, "q"))
    tensors, done = permute_onnx(model, rows_of(model, ["w1"]), {"x": torch.randn(2, 3, 5)})
    assert not tensors
    assert [one.reason for one in done] == ["its channels have to keep their order: DequantizeLinear"]


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = residual_net()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 9, 9]))
    onnx.save(model, "net.onnx")
    images = np.random.default_rng(0).integers(0, 256, (48, 9, 9, 3), dtype=np.uint8)
    np.savez("data.npz", train_images=images, train_labels=np.zeros(48, dtype=np.int64))
    return tmp_path


CALIB = ["--calib", "data.npz", "--samples", "48", "--batch-size", "8"]


def invoke(*arguments):
    result = CliRunner().invoke(group, list(arguments), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def kept(dense, file):
    """How much of the graph's outputs a pruned file keeps, on random inputs: 1 − the relative squared error."""
    feeds = {"x": torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(1))}
    ours, theirs = outputs(onnx.load(file), feeds)[0], outputs(dense, feeds)[0]
    return 1 - float((ours - theirs).square().sum() / theirs.square().sum())


def test_a_file_is_permuted_and_pruned_without_data(folder):
    arguments = ["prune", "net.onnx", "--nm", "2:4", "--json"]
    plain = json.loads(invoke(*arguments, "-o", "plain.onnx"))
    told = json.loads(invoke(*arguments, "--permute", "-o", "permuted.onnx"))
    moved = {name for done in told["permutations"] if done["after"] > done["before"] for name in done["names"]}
    assert {"w1", "w2"} <= moved
    assert not plain["permutations"]
    assert_permuted(onnx.load("net.onnx"), onnx.load("permuted.onnx"))


def assert_permuted(dense, pruned):
    """What the pruned file keeps of each weight is the dense one's, its columns in one order for all that read them."""
    one, two = ({name: numpy_helper.to_array(t) for name, t in named_tensors(model)} for model in (dense, pruned))
    order = np.array([np.argmin(np.abs(one["stem"] - row).sum((1, 2, 3))) for row in two["stem"]])
    assert sorted(order) == list(range(8))
    for name in ("w1", "w2"):
        rows = np.array([np.argmin(np.abs(one["b1"] - value)) for value in two["b1"]])
        expected = one[name][rows][:, order]
        assert np.array_equal(two[name], np.where(two[name] == 0, 0, expected))


def test_a_file_is_permuted_and_solved_with_its_constants_outside(folder):
    model = onnx.load("net.onnx")
    onnx.save(model, "apart.onnx", save_as_external_data=True, location="apart.bin", size_threshold=0)
    model = onnx.load("net.onnx")  # the other was emptied
    invoke("prune", "apart.onnx", "--nm", "2:4", "--permute", *CALIB, "-o", "solved.onnx")
    invoke("prune", "net.onnx", "--nm", "2:4", "--permute", *CALIB, "-o", "inside.onnx")
    assert kept(model, "solved.onnx") > 0.5
    inside = {name: numpy_helper.to_array(t) for name, t in named_tensors(onnx.load("inside.onnx"))}
    for name, tensor in named_tensors(onnx.load("solved.onnx")):
        np.testing.assert_allclose(numpy_helper.to_array(tensor), inside[name], rtol=1e-4, atol=1e-5)


def test_a_graph_that_onnxruntime_does_not_know_says_so_in_one_line(folder):
    model = onnx.load("net.onnx")
    model.graph.node[1].op_type = "Unheard"
    onnx.save(model, "odd.onnx")
    with pytest.raises(ModelError, match=r"^onnxruntime cannot compute 'r' \(Unheard\): [^\n]*$"):
        invoke("prune", "odd.onnx", "--nm", "2:4", "--permute", "-o", "never.onnx")
    assert not (folder / "never.onnx").exists()
