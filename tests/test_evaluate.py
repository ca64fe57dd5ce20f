"""`nmconvert eval`: a checkpoint and an ONNX file, measured by the same code."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from nmconvert.cli import group
from nmconvert.errors import CheckpointError, ModelError, UsageError
from nmconvert.evaluate import evaluate
from nmconvert.onnx_model import OnnxModel
from nmconvert.tasks import build_task

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(12, 4)).astype(np.float32)


def linear(path: Path, *, batch: int | str = "n", dtype: int = TensorProto.FLOAT) -> Path:
    """images [batch, 3, 2, 2] → logits [batch, 4], with the weight above."""
    image = helper.make_tensor_value_info("images", dtype, [batch, 3, 2, 2])
    logits = helper.make_tensor_value_info("logits", dtype, [batch, 4])
    weight = helper.make_tensor("w", TensorProto.FLOAT, WEIGHT.shape, WEIGHT.flatten())
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Cast", ["y"], ["logits"], to=dtype),
    ]
    graph = helper.make_graph(nodes, "g", [image], [logits], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> str:
    images = RNG.normal(size=(23, 3, 2, 2)).astype(np.float32)
    labels = (images.reshape(23, 12) @ WEIGHT).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4  # three of them wrong
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return str(tmp_path / "data.npz")


@pytest.mark.parametrize("batch", ["n", 1, 4])
def test_an_onnx_file_of_any_batch_size(tmp_path, data, batch):
    result = evaluate(linear(tmp_path / "m.onnx", batch=batch), build_task("classification"), data, batch_size=10)
    assert result.metrics["top1"] == pytest.approx(100 * 20 / 23)
    assert result.samples == 23


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_other_types_are_converted_both_ways(tmp_path, dtype):
    model = OnnxModel(linear(tmp_path / "m.onnx", dtype=dtype))
    images = torch.randn(5, 3, 2, 2)
    assert torch.allclose(model(images), images.flatten(1) @ torch.tensor(WEIGHT), atol=0.1)
    assert model(images).dtype == torch.float32


def test_limit_takes_the_first(tmp_path, data):
    result = evaluate(linear(tmp_path / "m.onnx"), build_task("classification"), data, limit=3)
    assert (result.samples, result.metrics["top1"]) == (3, 0)


def test_the_command_prints_a_table_and_json(tmp_path, data):
    file = str(linear(tmp_path / "m.onnx"))
    done = CliRunner().invoke(group, ["eval", file, "--data", data, "--json"])
    assert json.loads(done.stdout)["metrics"]["top1"] == pytest.approx(100 * 20 / 23)
    shown = CliRunner().invoke(group, ["eval", file, "--data", data])
    assert "86.96" in shown.stdout
    assert CliRunner().invoke(group, ["eval", file, "--data", data, "--quiet"]).stdout == ""


def test_a_metric_that_is_no_number_is_null(tmp_path):
    np.savez(tmp_path / "nan.npz", images=np.full((8, 3, 2, 2), 3e38, np.float32), labels=np.zeros(8, int))
    done = CliRunner().invoke(group, ["eval", str(linear(tmp_path / "m.onnx")), "--data", str(tmp_path / "nan.npz"), "--json"])
    assert json.loads(done.stdout)["metrics"]["loss"] is None


def test_the_command_passes_settings_on(tmp_path):
    pixels = RNG.integers(0, 255, (10, 2, 2, 3), dtype=np.uint8)
    labels = ((pixels / 255).transpose(0, 3, 1, 2).reshape(10, 12) / 0.5 @ WEIGHT).argmax(1)
    np.savez(tmp_path / "d.npz", images=pixels, labels=labels)
    plain = ["eval", str(linear(tmp_path / "m.onnx")), "--data", str(tmp_path / "d.npz"), "--json"]
    done = CliRunner().invoke(group, [*plain, "--mean", "0,0,0", "--task-arg", "std=0.5,0.5,0.5"])
    assert json.loads(done.stdout)["metrics"]["top1"] == 100
    assert json.loads(CliRunner().invoke(group, plain).stdout)["metrics"]["top1"] < 100


def test_a_checkpoint_without_a_model_says_what_is_missing(tmp_path, data):
    torch.save({"w": torch.zeros(1)}, tmp_path / "m.pth")
    with pytest.raises(UsageError, match="--model"):
        evaluate(tmp_path / "m.pth", build_task("classification"), data)


def test_a_damaged_onnx_file_and_a_wrong_input_are_errors_of_ours(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x01 damaged")
    with pytest.raises(CheckpointError, match=r"bad\.onnx"):
        OnnxModel(tmp_path / "bad.onnx")
    model = OnnxModel(linear(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match=r"images \[2, 7\]"):
        model(torch.zeros(2, 7))
    with pytest.raises(ModelError, match="has the inputs images; given tokens"):
        model(tokens=torch.zeros(2, 7))


def test_several_outputs_are_a_dict(tmp_path):
    model = onnx.load(linear(tmp_path / "m.onnx"))
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["n", 12]))
    onnx.save(model, tmp_path / "two.onnx")
    found = OnnxModel(tmp_path / "two.onnx")(torch.ones(2, 3, 2, 2))
    assert found["flat"].shape == (2, 12)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    assert torch.allclose(found["logits"], torch.tensor(weight.sum(0)).expand(2, 4), atol=1e-5)


def test_outputs_without_a_row_for_each_sample_are_not_cut(tmp_path):
    """Cut to the batch, the first rows of something else would be measured."""
    value, shape = helper.make_tensor_value_info, numpy_helper.from_array(np.array([-1, 2]), "shape")
    for batch in ("n", 4):
        graph = helper.make_graph(
            [helper.make_node("Reshape", ["x", "shape"], ["rows"]), helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0)],
            "rows", [value("x", TensorProto.FLOAT, [batch, 6])],
            [value("rows", TensorProto.FLOAT, None), value("sum", TensorProto.FLOAT, [])], [shape],
        )  # fmt: skip
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
        found = OnnxModel(tmp_path / "m.onnx")(torch.ones(4, 6))
        assert found["rows"].shape == (12, 2)
        assert found["sum"] == 24
    with pytest.raises(ModelError, match=r"made for 4 samples at a time, 6 .* the output 'rows' \[12, 2\] has no row"):
        OnnxModel(tmp_path / "m.onnx")(torch.ones(6, 6))


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The same weights as the graph's, under ``state_dict``, and the module that they belong to."""
    (tmp_path / "flat.py").write_text(
        "from torch import nn\n"
        "def flat(classes=4):\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes, bias=False))\n"
    )
    torch.save({"state_dict": {"1.weight": torch.tensor(WEIGHT.T.copy())}}, tmp_path / "m.pth")
    return tmp_path / "m.pth"


def test_a_checkpoint_and_its_graph_are_measured_alike(tmp_path, data, checkpoint):
    task = build_task("classification")
    graph = evaluate(linear(tmp_path / "m.onnx"), task, data)
    module = evaluate(checkpoint, task, data, model=f"{tmp_path / 'flat.py'}:flat")
    assert module.metrics == pytest.approx(graph.metrics, rel=1e-5)


@pytest.mark.filterwarnings("ignore:no native kernels")
def test_the_kernels_are_measured_alike(tmp_path, data, checkpoint):
    command = ["prune", str(checkpoint), "--nm", "2:4", "--model", f"{tmp_path / 'flat.py'}:flat", "--include", "*", "--quiet"]
    pruned, graph = tmp_path / "p.pth", tmp_path / "p.onnx"
    for line in ([*command, "-o", str(pruned)], ["export", str(pruned), "--input", "2,3,2,2", "-o", str(graph), "--quiet"]):
        done = CliRunner().invoke(group, line)
        assert done.exit_code == 0, done.output
    task = build_task("classification")
    stock, ours = (evaluate(graph, task, data, kernels=kernels).metrics for kernels in (False, True))
    assert ours == pytest.approx(stock, rel=1e-5)


def test_model_arguments_and_misfits_are_said(tmp_path, data, checkpoint):
    with pytest.raises(ModelError, match=r"1\.weight"):
        evaluate(checkpoint, build_task("classification"), data, model=f"{tmp_path / 'flat.py'}:flat",
                 model_arguments={"classes": "7"})  # fmt: skip


def test_what_was_said_once_is_in_the_manifest(tmp_path, data, checkpoint):
    prune = ["prune", str(checkpoint), "--nm", "1:4", "--model", f"{tmp_path / 'flat.py'}:flat", "--include", "*", "--quiet"]
    pruned = tmp_path / "p.pth"
    done = CliRunner().invoke(group, [*prune, "--output", str(pruned)])
    assert done.exit_code == 0, done.output
    result = json.loads(CliRunner().invoke(group, ["eval", str(pruned), "--data", data, "--json"]).stdout)
    assert result["metrics"]["top1"] < 80
    nothing = CliRunner().invoke(group, ["eval", str(pruned)])
    assert isinstance(nothing.exception, UsageError)
    assert "--data" in str(nothing.exception)


def test_published_resnet20_has_its_published_accuracy(tmp_path, data_dir, sample_models):
    """91.73 % on all 10,000 images; here on the first 1,250, within three standard errors."""
    image = pytest.importorskip("PIL.Image")
    tiles = [np.asarray(image.open(f).convert("RGB")) for f in sorted((data_dir / "cifar10" / "test").glob("*.webp"))[:2]]
    images = np.concatenate([t.reshape(25, 32, 25, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3) for t in tiles])
    labels = np.load(data_dir / "cifar10" / "labels_test.npy")[: len(images)]
    np.savez(tmp_path / "cifar.npz", images=images, labels=labels)
    result = evaluate(
        data_dir / "checkpoints" / "resnet20-12fca82f.th", build_task("classification"), str(tmp_path / "cifar.npz"),
        model=f"{sample_models / 'resnet.py'}:resnet20",
    )  # fmt: skip
    assert result.metrics["top1"] == pytest.approx(91.73, abs=2.4)
