"""The choice between sparse and dense, its cache, ``nmconvert bench`` and ``nmconvert doctor``."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper
from onnx_models import conv_net, model_of, sparse_weight
from runtime_models import call, initializers, layer, model, random_weight, tensor

from nmconvert import runtime
from nmconvert.bench import bench
from nmconvert.checkpoint.onnx_file import save_model, set_metadata
from nmconvert.cli.bench import command as bench_command
from nmconvert.cli.doctor import command as doctor_command
from nmconvert.cli.export import command as export_command
from nmconvert.errors import CheckpointError, NmconvertError, UsageError, VerificationError
from nmconvert.export import export
from nmconvert.export.calls import packed_layers
from nmconvert.inputs import InputSpec
from nmconvert.manifest import METADATA_KEY, Manifest
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.runtime import choice
from nmconvert.runtime.cache import Cache
from nmconvert.verify import verify

pytestmark = pytest.mark.skipif(not runtime.kernels().usable, reason=f"no native kernels: {runtime.kernels().reason}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NMCONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speed.json"


def two_layers() -> onnx.ModelProto:
    """x [b, 64] → MatMul → MatMul, two shapes."""
    rng = np.random.default_rng(0)
    first, second = random_weight(rng, "matmul", (64, 32), "1:4"), random_weight(rng, "matmul", (32, 16), "2:4")
    nodes = [call("SparseMatMul", first, ["x"], "h", "first."), call("SparseMatMul", second, ["h"], "y", "second.")]
    return model(nodes, [*initializers(first, "first."), *initializers(second, "second.")], ["b", 64])


def file(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path


def runs_native(session: onnxruntime.InferenceSession, feed: dict[str, Any]) -> list[str]:
    """The operators of our domain's names that ran: stock onnxruntime runs MatMul as MatMul or Gemm on a folded weight."""
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    inputs = [e["args"] for e in events if e["name"].endswith("_kernel_time")]
    return [i["op_name"] for i in inputs if len(i["input_type_shape"]) >= 4 and "uint8" in i["input_type_shape"][2]]


def profiling(folder: Path) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    return options


def pretend(
    monkeypatch: pytest.MonkeyPatch, ratios: dict[str, float], whole: list[float], rounds: tuple[float, ...] = (1.0,)
) -> list[str]:
    """Measurements that come out as wished: by the layer's dense shape, times ``rounds``, and for the whole, as it is raced."""
    measured = []

    def time_layer(proto: onnx.ModelProto, met: choice.Met, *_: Any) -> choice.Times:
        shape = next(list(a.ints) for a in met.node.attribute if a.name == "shape")
        measured.append(str(shape))
        return choice.Times(tuple(ratios[str(shape)] * factor for factor in rounds), (1.0,) * len(rounds))

    monkeypatch.setattr(choice, "time_layer", time_layer)
    raced = list(whole)  # the last of them again and again
    monkeypatch.setattr(choice, "race", lambda *_, **__: choice.Times((raced.pop(0) if len(raced) > 1 else raced[0],), (1.0,)))
    return measured


@pytest.mark.parametrize(
    ("ratios", "whole", "native"),
    [
        ({"[64, 32]": 2.0, "[32, 16]": 3.0}, [1.5], 2),
        ({"[64, 32]": 2.0, "[32, 16]": 0.9}, [1.5, 1.3], 1),
        ({"[64, 32]": 0.5, "[32, 16]": 0.9}, [0.8], 0),
        ({"[64, 32]": 0.5, "[32, 16]": 0.9}, [1.2], 2),  # all layers lose, as measured in a busy hour; the whole gains
        ({"[64, 32]": 2.0, "[32, 16]": 3.0}, [0.8], 0),  # all layers win, the whole loses
        ({"[64, 32]": 2.0, "[32, 16]": 0.9}, [0.8, 0.7], 0),  # layers win, the whole loses
        ({"[64, 32]": 2.0, "[32, 16]": 0.9}, [1.2, 1.3], 2),  # what a layer loses, the whole gains
    ],
)
def test_the_faster_way_is_taken_and_remembered(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratios: dict[str, float], whole: list[float], native: int
) -> None:
    path = file(two_layers(), tmp_path)
    measured = pretend(monkeypatch, ratios, whole)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    expected = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    for _ in range(2):
        session = runtime.session(path, profiling(tmp_path))
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)
        assert len(runs_native(session, {"x": x})) == 2 * native
    assert sorted(measured) == sorted(ratios)  # once, though there were two sessions


def test_another_build_of_the_kernels_is_measured_anew(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, measured = file(two_layers(), tmp_path), pretend(monkeypatch, {"[64, 32]": 2.0, "[32, 16]": 3.0}, [1.5, 1.5])
    runtime.session(path)
    assert len(measured) == 2
    rebuilt = tmp_path / runtime.library().name
    rebuilt.write_bytes(runtime.library().read_bytes() + b"of the same version")
    monkeypatch.setenv("NMCONVERT_KERNELS", str(rebuilt))
    runtime.session(path)
    assert len(measured) == 4


@pytest.mark.parametrize(
    ("ratios", "whole", "native"),
    [
        ({"[64, 32]": 2.0, "[32, 16]": 0.9}, 1.5, 1),
        ({"[64, 32]": 0.5, "[32, 16]": 0.9}, 0.8, 0),
        ({"[64, 32]": 2.0, "[32, 16]": 2.0}, 1.5, 2),
    ],
)
def test_a_tuned_file_needs_the_library_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratios: dict[str, float], whole: float, native: int
) -> None:
    path, target = file(two_layers(), tmp_path), tmp_path / "tuned.onnx"
    pretend(monkeypatch, ratios, [whole])
    arguments = [str(path), "--tuned", str(target), "--seconds", "0.02", "--rounds", "3", "--no-layers"]
    printed = CliRunner().invoke(bench_command, arguments, catch_exceptions=False).output
    assert f"{native} layers on the kernels" in " ".join(printed.split())
    onnx.checker.check_model(str(target), full_check=True)
    options = profiling(tmp_path)
    options.register_custom_ops_library(str(runtime.library()))
    session = onnxruntime.InferenceSession(target, options)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    expected = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)
    assert len(runs_native(session, {"x": x})) == 2 * native
    assert len(list(packed_layers(onnx.load(target)))) == native


@pytest.mark.parametrize("values", [None, "int8", "float16", "bfloat16"])
def test_a_tuned_file_keeps_its_manifest(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str | None
) -> None:
    onnx.save(conv_net(None), tmp_path / "a.onnx")
    pruned = prune(tmp_path / "a.onnx", Pattern(2, 4), include=["*.weight"])
    exported = export(pruned.output, output=tmp_path / "b.onnx", values=values).output
    pretend(monkeypatch, defaultdict(lambda: 0.5), [0.8])
    tuned = tmp_path / "tuned.onnx"
    save_model(runtime.tuned(exported), tuned)
    assert not list(packed_layers(onnx.load(tuned)))
    checked = verify(tuned)
    assert not checked.failed
    assert len(checked.checks) == 2 + len(pruned.plan.pruned)


def test_a_tuned_file_does_not_replace_the_model_and_has_a_folder(cache: Path, tmp_path: Path) -> None:
    path = file(two_layers(), tmp_path)
    with pytest.raises(UsageError, match="is read by this run; give another name with --tuned"):
        bench(path, tuned=path)
    with pytest.raises(UsageError, match="missing: there is no such folder for --tuned; make it first"):
        bench(path, tuned=tmp_path / "missing" / "tuned.onnx")


def test_what_other_programs_disturbed_serves_and_is_not_remembered(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(two_layers(), tmp_path)
    feed = {"x": np.ones((3, 64), np.float32)}
    ratios = {"[64, 32]": 2.0, "[32, 16]": 0.5}
    for rounds, times in (((0.6, 1.0, 1.5), 4), ((1.0, 1.0, 1.0), 2), ((1.0, 1.0, 1.0), 0)):  # noisy: twice each, in vain
        measured = pretend(monkeypatch, ratios, [1.5, 1.3], rounds)
        assert len(runs_native(runtime.session(path, profiling(tmp_path)), feed)) == 1
        assert len(measured) == times


def test_nothing_is_measured_when_told_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = pretend(monkeypatch, {}, [])
    path = file(two_layers(), tmp_path)
    feed = {"x": np.ones((1, 64), np.float32)}
    assert len(runs_native(runtime.session(path, profiling(tmp_path), layers="sparse"), feed)) == 2
    monkeypatch.setenv("NMCONVERT_MEASURE", "off")
    assert len(runs_native(runtime.session(path, profiling(tmp_path)), feed)) == 2
    assert not measured
    assert not cache.exists()


def test_real_measurements_are_kept_by_shape(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "NOISY", float("inf"))  # whatever else runs on this machine
    path = file(two_layers(), tmp_path)
    runtime.session(path, inputs=[InputSpec("x", (5, 64))])
    ((_, known),) = json.loads(cache.read_text("utf-8")).items()
    assert sum(key.startswith('["SparseMatMul", [[5, ') for key in known) == 2
    assert all(value > 0 for key, value in known.items() if key.startswith("["))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_cache_is_an_empty_one(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    kept = Cache({"a": 1})
    assert kept.get("key") is None
    kept.put("key", 2.0)
    kept.save()
    assert Cache({"a": 1}).get("key") == 2.0
    assert Cache({"a": 2}).get("key") is None


def test_without_a_home_nothing_is_kept(homeless: None) -> None:
    kept = Cache({"a": 1})
    kept.put("key", 2.0)
    kept.save()
    assert kept.get("key") == 2.0
    assert Cache({"a": 1}).get("key") is None


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.parent.write_text("a file, where the folder should be")
    kept = Cache({"a": 1})
    kept.put("key", 2.0)
    kept.save()
    assert Cache({"a": 1}).get("key") is None


def test_a_call_in_a_branch_is_left_as_it_is(cache: Path, tmp_path: Path) -> None:
    """A branch that is not taken meets no shapes; its calls run on the kernels all the same."""
    rng = np.random.default_rng(0)
    weight = random_weight(rng, "matmul", (32, 32), "2:4")
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, ["t", 32])
    then = helper.make_graph([call("SparseMatMul", weight, ["x"], "r")], "then", [], [value])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["r"])], "else", [], [value])
    node = helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)
    proto = model([node], [*initializers(weight), tensor("flag", np.array(False))], ["t", 32])
    reference = layer("SparseMatMul", weight, ["t", 32])
    proto.functions.extend(reference.functions)
    session = runtime.session(file(proto, tmp_path))
    x = np.ones((2, 32), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x)


@pytest.mark.parametrize("bias", [False, True])
def test_a_residual_is_measured_with_a_bias_and_without(cache: Path, tmp_path: Path, bias: bool) -> None:
    """What is left out among the inputs is left out of a profile as well."""
    weight = random_weight(np.random.default_rng(0), "matmul", (32, 32), "2:4")
    proto = layer("SparseGemmAdd", weight, ["t", 32], {"B": np.ones(32, np.float32)} if bias else None)
    proto.graph.node[0].input.append("residual")
    proto.graph.node.insert(0, helper.make_node("Relu", ["x"], ["residual"]))
    session = runtime.session(file(proto, tmp_path), inputs=[InputSpec("x", (4, 32))])
    x = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    expected = x @ weight.dense + bias + np.maximum(x, 0)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)
    ((_, known),) = json.loads(cache.read_text("utf-8")).items()
    met = [json.loads(key) for key in known if key.startswith("[")]
    assert [shapes for name, shapes, _ in met if name == "SparseGemmAdd"] in ([[[4, 32], [32] if bias else [], [4, 32]]], [])


def test_bench_measures_models_and_layers(cache: Path, tmp_path: Path) -> None:
    path = file(two_layers(), tmp_path)
    arguments = [str(path), "--threads", "1,2", "--batch", "1,3", "--seconds", "0.02", "--rounds", "3", "--json"]
    run = CliRunner().invoke(bench_command, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    result = json.loads(run.output)
    assert [(row["threads"], row["batch"]) for row in result["models"]] == [(1, 1), (2, 1), (1, 3), (2, 3)]
    assert all(len(row["dense"]) == len(row["sparse"]) == 3 and row["ratio"] > 0 for row in result["models"])
    assert [(row["weight"], row["input"], row["pattern"]) for row in result["layers"]] == [
        ([64, 32], [1, 64], "1:4"),
        ([32, 16], [1, 32], "2:4"),
    ]
    plain = CliRunner().invoke(bench_command, [str(path), "--seconds", "0.02", "--rounds", "3", "--no-layers"])
    assert "dense ÷ sparse" in plain.output
    assert "Distinct" not in plain.output


def test_bench_against_a_checkpoint_exports_it(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(np.random.default_rng(3), "linear", (48, 64), "2:4")
    torch.save({"0.weight": torch.from_numpy(weight.dense)}, tmp_path / "pruned.pt")
    (tmp_path / "net.py").write_text(
        "import torch\ndef net(): return torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))\n"
    )
    monkeypatch.chdir(tmp_path)
    module = ["--model", "net.py:net"]
    made = CliRunner().invoke(export_command, ["pruned.pt", "--input", "1,64", "-o", "a.onnx", *module], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    arguments = ["a.onnx", "--against", "pruned.pt", "--seconds", "0.02", "--rounds", "3", "--json", *module]
    run = CliRunner().invoke(bench_command, arguments, catch_exceptions=False)
    assert json.loads(run.output)["against"] == "pruned.pt"
    refused = CliRunner().invoke(bench_command, [*arguments, "--require", "1000"])
    assert isinstance(refused.exception, VerificationError)
    assert "1000.00 is required" in str(refused.exception)


def test_bench_against_another_model_is_refused(cache: Path, tmp_path: Path) -> None:
    other = two_layers()
    other.graph.input[0].name = other.graph.node[0].input[0] = "image"
    onnx.save(other, tmp_path / "other.onnx")
    run = CliRunner().invoke(bench_command, [str(file(two_layers(), tmp_path)), "--against", str(tmp_path / "other.onnx")])
    assert "the dense model takes image, model.onnx x" in str(run.exception)


@pytest.mark.parametrize(
    ("function", "shape", "pattern", "x_shape", "extra", "attributes"),
    [
        ("SparseMatMul", (64, 32), "2:4", [5, 64], {}, {}),
        ("SparseLinearGelu", (64, 32), "2:32", [5, 64], {"B": (32,)}, {}),
        ("SparseGemm", (32, 64), "1:4", [5, 64], {}, {"alpha": 0.5, "beta": 1.0, "transA": 0, "transB": 1}),
        ("SparseConvAddRelu", (16, 20, 3, 3), "1:16", [1, 20, 8, 8], {"B": (16,), "Z": (1, 16, 6, 6)}, {}),
        ("SparseConvClip", (16, 20, 3, 3), "3:5", [1, 20, 8, 8], {"B": (16,)}, {"low": -0.5, "high": 0.5, "pads": [1] * 4}),
    ],
)
@pytest.mark.parametrize("stored", [np.float32, np.float16, np.int8])
def test_a_call_left_dense_computes_what_its_body_does(
    function: str, shape: Any, pattern: str, x_shape: Any, extra: Any, attributes: Any, stored: Any
) -> None:
    rng = np.random.default_rng(4)
    kind = "conv" if len(shape) == 4 else "linear" if attributes.get("transB") else "matmul"
    weight = random_weight(rng, kind, shape, pattern, dtype=stored)
    arrays = {name: rng.standard_normal(size).astype(np.float32) for name, size in extra.items()}
    proto = layer(function, weight, x_shape, arrays, **attributes)
    x = rng.standard_normal(x_shape).astype(np.float32)
    dense = onnx.load_model_from_string(choice.with_dense(proto, None))
    onnx.checker.check_model(dense, full_check=True)
    assert {tensor.name for tensor in dense.graph.initializer} == {"valuesDense", *extra}
    outputs = [choice.open_session(m.SerializeToString(), 1).run(None, {"x": x})[0] for m in (dense, proto)]
    np.testing.assert_array_equal(*outputs)


def test_bench_of_a_dense_model_says_what_to_do(tmp_path: Path) -> None:
    graph = two_layers().graph
    graph.ClearField("node")
    graph.node.append(helper.make_node("Identity", ["x"], ["y"]))
    path = file(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path)
    run = CliRunner().invoke(bench_command, [str(path)])
    assert "no compressed layer" in str(run.exception)


def test_bench_of_layers_without_kernels_says_so(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["W", "X"], ["Y"])
    onnx.save(model_of([node], {"W": sparse_weight("linear", (64, 32), "2:4")}, [32, 8]), tmp_path / "a.onnx")
    export(tmp_path / "a.onnx", output=tmp_path / "b.onnx")
    with pytest.raises(UsageError, match=r"b\.onnx: its compressed layers \(SparseMatMulLeft\) have no kernels"):
        bench(tmp_path / "b.onnx")


def fixed_batch() -> onnx.ModelProto:
    proto = two_layers()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    return proto


def test_a_batch_that_the_model_cannot_take(cache: Path, tmp_path: Path) -> None:
    path = file(fixed_batch(), tmp_path)
    quick: dict[str, Any] = {"seconds": 0.02, "rounds": 3, "per_layer": False}
    assert [row.batch for row in bench(path, **quick).models] == [4]
    with pytest.raises(UsageError, match="takes a batch of 4, not of 64: leave out --batch"):
        bench(path, batches=[4, 64], **quick)
    with pytest.raises(UsageError, match="takes a batch of 2, not of 64"):
        bench(file(two_layers(), tmp_path), batches=[64], inputs=[InputSpec("x", (2, 64))], **quick)


def test_inputs_that_a_layer_cannot_take(cache: Path, tmp_path: Path) -> None:
    proto = two_layers()
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    with pytest.raises(UsageError, match=r"model\.onnx: cannot be run with --input x=1,63:float32: "):
        bench(file(proto, tmp_path), inputs=[InputSpec("x", (1, 63))])


@pytest.mark.parametrize(("name", "content"), [("cut.onnx", b"\x08\x08\x12"), ("empty.onnx", b""), ("text.onnx", b"text")])
def test_files_that_are_no_models(cache: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NmconvertError, match=name):
        bench(tmp_path / name)
    with pytest.raises(CheckpointError, match=name):
        bench(file(two_layers(), tmp_path), against=tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--seconds nan", "--seconds nan is not a finite number"),
        ("--seconds inf", "--seconds inf is not a finite number"),
        ("--require nan", "--require nan is not a finite number"),
        ("--threads 1,99999999", "--threads 99999999 are too many: at most 1024"),
    ],
)
def test_numbers_that_measure_nothing(tmp_path: Path, arguments: str, text: str) -> None:
    run = CliRunner().invoke(bench_command, [str(file(two_layers(), tmp_path)), *arguments.split()])
    assert str(run.exception) == text


def test_doctor_tells_a_version_that_was_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.14.1+cu130" if name == "torch" else real(name))
    told = json.loads(CliRunner().invoke(doctor_command, ["--json"]).output)
    torch_fact, onnx_fact = (next(fact for fact in told["facts"] if fact["name"] == name) for name in ("torch", "onnx"))
    assert torch_fact["found"] == "2.14.1+cu130, not tried"
    assert torch_fact["remedy"] == "pip install 'torch<2.14,>=2.9'"
    assert onnx_fact["fine"]
    assert not told["fine"]


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = json.loads(CliRunner().invoke(doctor_command, ["--json"]).output)
    facts = {fact["name"]: fact for fact in fine["facts"]}
    assert facts["native kernels"]["fine"]
    assert facts["torch"]["found"].startswith("2.")
    monkeypatch.setenv("NMCONVERT_KERNELS", "/nowhere.so")
    amiss = json.loads(CliRunner().invoke(doctor_command, ["--json"]).output)
    assert not amiss["fine"]
    assert next(f for f in amiss["facts"] if f["name"] == "native kernels")["remedy"] == "unset NMCONVERT_KERNELS"


def gathering() -> onnx.ModelProto:
    """A layer on rows of ``x`` that a second input picks: an index of 1 or more needs as many rows."""
    proto = layer("SparseMatMul", random_weight(np.random.default_rng(6), "matmul", (32, 16), "2:4"), ["t", 32])
    proto.graph.node[0].input[0] = "picked"
    proto.graph.node.insert(0, helper.make_node("Gather", ["x", "rows"], ["picked"]))
    proto.graph.input.append(helper.make_tensor_value_info("rows", TensorProto.INT64, ["n"]))
    return proto


def test_a_model_that_cannot_be_run_on_example_inputs_is_not_measured_and_runs(cache: Path) -> None:
    proto = gathering()  # one row, of which random ones up to 7 would be picked
    feed = {"x": np.ones((8, 32), np.float32), "rows": np.arange(4)}
    with pytest.warns(RuntimeWarning, match=r"no layer was measured, all run on the kernels: .*Gather.*; give inputs="):
        fast = runtime.session(proto.SerializeToString())
    stock = onnxruntime.InferenceSession(proto.SerializeToString())
    np.testing.assert_allclose(fast.run(None, feed)[0], stock.run(None, feed)[0], rtol=1e-5, atol=1e-5)
    told = [InputSpec("x", (8, 32)), InputSpec("rows", (4,), "int64")]
    with warnings.catch_warnings(action="error"):
        runtime.session(proto.SerializeToString(), inputs=told)
        set_metadata(proto, METADATA_KEY, Manifest(settings={"input": [str(spec) for spec in told]}).to_json())
        runtime.session(proto.SerializeToString())
