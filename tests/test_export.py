"""ONNX files made sparse ONNX files; the graphs that torch makes are in test_export_torch.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from containers import sha256
from numpy.testing import assert_allclose
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_models import conv_net, model_of, op_types, random_input, run, session, sparse_weight, value
from onnxruntime import quantization
from test_onnx_graph import branch, if_model

from nmconvert.arrays import digest
from nmconvert.checkpoint import onnx_file, open_checkpoint
from nmconvert.errors import ExportError, UsageError
from nmconvert.export import ExportResult, default_output, export
from nmconvert.export.calls import inlined_layers, packed_layers
from nmconvert.export.check import compare
from nmconvert.inputs import InputSpec
from nmconvert.inspect import inspect
from nmconvert.manifest import Manifest
from nmconvert.onnx_graph import DOMAIN
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.runtime import kernels
from nmconvert.runtime import session as session_on_kernels
from nmconvert.verify import verify

make = helper.make_node


def exported(model: ModelProto, folder: Path, flavour: str = "compressed", **options: Any) -> ExportResult:
    onnx.save(model, folder / "source.onnx")
    return export(folder / "source.onnx", output=folder / "out.onnx", flavour=flavour, **options)


def manifest_of(path: Path) -> Manifest:
    text = open_checkpoint(path).manifest_text()
    assert text is not None
    return Manifest.from_json(text, str(path))


@pytest.mark.parametrize("flavour", ["compressed", "dense", "inlined"])
def test_flavours(tmp_path: Path, flavour: str) -> None:
    model = conv_net()
    result = exported(model, tmp_path, flavour)
    x = random_input((3, 8, 6, 6))
    assert np.array_equal(run(result.output, x), run(model, x))
    written = onnx.load(result.output)
    assert bool(written.functions) == (flavour == "compressed")
    assert any(node.domain == DOMAIN for node in written.graph.node) == (flavour == "compressed")
    names = {tensor.name for tensor in written.graph.initializer}
    assert ("first.weight" in names) == (flavour == "dense")
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    layers = manifest_of(result.output).layers
    assert {layer.name: layer.digest for layer in layers} == {
        name: digest(array) for name, array in weights.items() if name.endswith("weight")
    }
    assert {str(layer.pattern) for layer in layers} == {"2:4"}
    session(result.output, optimized=tmp_path / "optimized.onnx")
    assert "CumSum" not in op_types(tmp_path / "optimized.onnx")
    assert result.nbytes == result.output.stat().st_size
    if flavour != "dense":
        assert result.compressed.packed_bytes <= 0.532 * result.compressed.dense_bytes


def test_from_prune_to_packed_with_patterns_by_layer(tmp_path: Path) -> None:
    onnx.save(conv_net(None), tmp_path / "a.onnx")
    layers = [("second.weight", Pattern(1, 4)), ("head.weight", Pattern(4, 8))]
    pruned = prune(tmp_path / "a.onnx", Pattern(2, 4), "kernel", layers=layers)
    result = export(pruned.output, output=tmp_path / "b.onnx")
    assert {layer.name: (str(layer.pattern), layer.axis) for layer in result.compressed.layers} == {
        "first.weight": ("2:4", "kernel"),
        "second.weight": ("1:4", "kernel"),
        "head.weight": ("4:8", "kernel"),
    }
    manifest = manifest_of(result.output)
    assert [stage["stage"] for stage in manifest.history] == ["prune", "export"]
    assert {layer.name: layer.digest for layer in manifest.layers} == {
        layer.name: layer.digest for layer in pruned.manifest.layers
    }


@pytest.mark.parametrize(("values", "element_type"), [("float16", TensorProto.FLOAT16), ("bfloat16", TensorProto.BFLOAT16)])
def test_kept_weights_rounded_to_half_the_bytes(tmp_path: Path, values: str, element_type: int) -> None:
    model = conv_net()
    result = exported(model, tmp_path, values=values)
    written = onnx.load(result.output)
    stored = {t.name: t.data_type for t in written.graph.initializer if t.name.endswith(".values")}
    assert set(stored.values()) == {element_type}
    for layer in packed_layers(written):
        source = next(t for t in model.graph.initializer if t.name == layer.name)
        rounded = numpy_helper.to_array(source).astype(layer.values.dtype)
        assert np.array_equal(layer.view.from_matrix(layer.matrix()).reshape(rounded.shape), rounded)
    x = random_input((3, 8, 6, 6))
    difference = compare(run(result.output, x), run(model, x), values)
    assert 0 < difference.relative <= difference.tolerance
    assert values in result.notes[-1]
    checked = verify(result.output, tmp_path / "source.onnx")
    assert not checked.failed
    assert sum(check.seen == f"the same weight, rounded to {values}" for check in checked.checks) == len(stored)
    if kernels().usable:
        assert_allclose(session_on_kernels(result.output).run(None, {"X": x})[0], run(result.output, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_weights_in_constant_nodes_are_rounded_too(tmp_path: Path, values: str) -> None:
    """Where PaddlePaddle's exporter keeps all of them."""
    model = conv_net()
    for tensor in list(model.graph.initializer):
        model.graph.node.insert(0, make("Constant", [], [tensor.name], value=tensor))
        model.graph.initializer.remove(tensor)
    result = exported(model, tmp_path, values=values)
    assert "3 weights rounded" in result.notes[-1]
    assert result.output.stat().st_size < exported(model, tmp_path).output.stat().st_size


@pytest.mark.parametrize("flavour", ["compressed", "inlined"])
def test_kept_weights_rounded_to_int8_with_a_scale_for_each_row(tmp_path: Path, flavour: str) -> None:
    model = conv_net()
    result = exported(model, tmp_path, values="int8", flavour=flavour)
    written = onnx.load(result.output)
    stored = {t.name: t.data_type for t in written.graph.initializer if t.name.endswith((".values", ".scale"))}
    assert stored == {
        f"{name}.weight.{part}": kind
        for name in ("first", "second", "head")
        for part, kind in (("values", TensorProto.INT8), ("scale", TensorProto.FLOAT))
    }
    manifest = manifest_of(result.output)
    layers = list(packed_layers(written)) or list(inlined_layers(written, manifest.layers))
    assert len(layers) == 3
    for layer in layers:
        source = next(t for t in model.graph.initializer if t.name == layer.name)
        matrix = layer.view.to_matrix(numpy_helper.to_array(source))
        assert np.abs(layer.matrix() - matrix).max() <= np.abs(matrix).max() / 254 * 1.001
        assert manifest.layer(layer.name).digest == digest(layer.view.from_matrix(layer.matrix()))
    x = random_input((3, 8, 6, 6))
    difference = compare(run(result.output, x), run(model, x), "int8")
    assert 1e-5 < difference.relative <= difference.tolerance
    assert "3 weights rounded to int8" in result.notes[-1]
    against = verify(result.output, tmp_path / "source.onnx")
    assert not against.failed
    assert sum(check.seen == "the same weight, rounded to int8" for check in against.checks) == 3
    assert {found.dtype for found in inspect(result.output).tensors} == {"int8"}
    if kernels().usable and flavour == "compressed":
        assert_allclose(session_on_kernels(result.output).run(None, {"X": x})[0], run(result.output, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["values", "scale"])
def test_a_changed_integer_or_scale_does_not_verify(tmp_path: Path, part: str) -> None:
    result = exported(conv_net(), tmp_path, values="int8")
    written = onnx.load(result.output)
    tensor = next(t for t in written.graph.initializer if t.name == f"second.weight.{part}")
    array = numpy_helper.to_array(tensor).copy()
    array[np.flatnonzero(array)[0]] *= 2 if part == "scale" else -1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(written, result.output)
    assert [check.what for check in verify(result.output).failed] == ["second.weight"]


def test_int8_is_compared_with_the_rounding_of_another_files_weights(tmp_path: Path) -> None:
    model = conv_net()
    result = exported(model, tmp_path, values="int8")
    weight = next(t for t in model.graph.initializer if t.name == "second.weight")
    array = numpy_helper.to_array(weight).copy()
    array.flat[np.flatnonzero(array)[1]] *= 1.5
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    failed = [check for check in verify(result.output, tmp_path / "other.onnx").failed if not check.what.startswith("output")]
    assert [(check.what, check.seen) for check in failed] == [("second.weight", f"not the weight of {tmp_path / 'other.onnx'}")]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"flavour": "Dense"}, "flavour 'Dense' is none of compressed, dense, inlined"),
        ({"values": "fp16"}, "values 'fp16' is none of float16, bfloat16, int8"),
    ],
)
def test_a_word_that_is_no_choice_is_named(option: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        export(tmp_path / "a.onnx", **option)


def test_int8_needs_packed_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--values int8 packs weights .* use --flavour compressed or inlined"):
        exported(conv_net(), tmp_path, values="int8", flavour="dense")
    assert not (tmp_path / "out.onnx").exists()


def test_a_weight_too_large_for_its_storage_is_named(tmp_path: Path) -> None:
    model = conv_net()
    weight = next(t for t in model.graph.initializer if t.name == "second.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e6), weight.name))
    with pytest.raises(ExportError, match=r"second.weight: its largest value .* does not fit into float16"):
        exported(model, tmp_path, values="float16")
    assert not (tmp_path / "out.onnx").exists()


def test_the_file_is_the_same_each_time(tmp_path: Path) -> None:
    files = {sha256(exported(conv_net(), tmp_path, flavour="compressed").output) for _ in range(2)}
    assert len(files) == 1


def test_batch_stays_dynamic(tmp_path: Path) -> None:
    result = exported(conv_net(), tmp_path, inputs=[InputSpec(None, (2, 8, 6, 6))])
    for batch in (1, 5):
        assert run(result.output, random_input((batch, 8, 6, 6))).shape == (batch, 10)


@pytest.mark.parametrize("opset", range(7, 23))
def test_every_opset_that_onnxruntime_loads(tmp_path: Path, opset: int) -> None:
    model = conv_net(opset=opset)
    result = exported(model, tmp_path)
    assert len(result.compressed.layers) == 3
    x = random_input((2, 8, 6, 6))
    assert np.array_equal(run(result.output, x), run(model, x))


@pytest.mark.parametrize("opset", [9, 18])
def test_initialisers_among_the_inputs(tmp_path: Path, opset: int) -> None:
    """As files of IR version 3 have to, and many later ones do: a packed weight must not stay behind as an input."""
    model = conv_net(opset=opset)
    model.graph.input.extend(value(tensor.name, tensor.dims) for tensor in model.graph.initializer)
    if opset < 10:
        model.ir_version = 3
    result = exported(model, tmp_path)
    assert len(result.compressed.layers) == 3
    assert [found.name for found in session(result.output).get_inputs()] == ["X"]
    x = random_input((2, 8, 6, 6))  # the source's weights are no constants, so onnxruntime runs it in another order
    np.testing.assert_allclose(run(result.output, x), run(model, x), rtol=1e-5, atol=1e-5)


def test_a_weight_that_several_operators_share_is_packed_once(tmp_path: Path) -> None:
    nodes = [make("MatMul", ["X", "W"], ["a"]), make("Tanh", ["a"], ["b"]), make("MatMul", ["b", "W"], ["Y"])]
    model = model_of(nodes, {"W": sparse_weight("matmul", (64, 64), "2:4")}, ["n", 64])
    result = exported(model, tmp_path)
    assert sum(node.domain == DOMAIN for node in onnx.load(result.output).graph.node) == 2
    assert len(result.compressed.layers) == len(list(packed_layers(onnx.load(result.output)))) == 1
    x = random_input((3, 64))
    assert np.array_equal(run(result.output, x), run(model, x))


def test_a_weight_with_another_use_stays_dense(tmp_path: Path) -> None:
    """Packed it would be there twice."""
    table = sparse_weight("linear", (64, 64), "2:4")
    nodes = [
        make("Gather", ["T", "ids"], ["rows"]),
        make("MatMul", ["X", "W"], ["a"]),
        make("Add", ["a", "rows"], ["b"]),
        make("Gemm", ["b", "T"], ["Y"], transB=1),
    ]
    constants = {"T": table, "ids": np.array([3], np.int64), "W": sparse_weight("matmul", (64, 64), "2:4")}
    model = model_of(nodes, constants, [1, 64])
    result = exported(model, tmp_path)
    assert [layer.name for layer in result.compressed.layers] == ["W"]
    assert result.compressed.dense == {"T": "tied: also used by Gather"}
    x = random_input((1, 64))
    assert np.array_equal(run(result.output, x), run(model, x))


@pytest.mark.parametrize("cast", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_weights_behind_nodes_lose_the_nodes(tmp_path: Path, cast: int) -> None:
    stored = np.ascontiguousarray(sparse_weight("matmul", (64, 32), "2:4").T).astype(np.float16)
    nodes = [
        make("Constant", [], ["W"], value=numpy_helper.from_array(stored)),
        make("Identity", ["W"], ["u"]),
        make("Transpose", ["u"], ["v"], perm=[1, 0]),
        make("Cast", ["v"], ["w"], to=cast),
        make("MatMul", ["X", "w"], ["Y"]),
    ]
    model = model_of(nodes, {}, ["n", 64], element=cast)
    result = exported(model, tmp_path)
    assert [node.op_type for node in onnx.load(result.output).graph.node] == ["SparseMatMul"]
    x = random_input((3, 64), helper.tensor_dtype_to_np_dtype(cast))
    assert np.array_equal(run(result.output, x), run(model, x))


class Samples(quantization.CalibrationDataReader):
    """Three batches of random inputs."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.left = [{name: random_input(shape, seed=seed)} for seed in range(3)]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


def test_quantisers_and_compose_take_a_compressed_file_and_leave_its_sparse_layers_alone(tmp_path: Path) -> None:
    """They look at the types of nodes, not at their domains."""
    weights = {
        "W": sparse_weight("matmul", (64, 32), "2:4"),
        "V": random_input((32, 16)),
        "T": sparse_weight("linear", (8, 16), "2:4"),
    }
    nodes = [make("MatMul", ["X", "W"], ["a"]), make("MatMul", ["a", "V"], ["b"]), make("Gemm", ["b", "T"], ["Y"], transB=1)]
    sparse = exported(model_of(nodes, weights, ["n", 64]), tmp_path).output
    x = random_input((5, 64), seed=3)
    expected, out = run(sparse, x), tmp_path / "quantised.onnx"
    ours = [node.op_type for node in onnx.load(sparse).graph.node if node.domain == DOMAIN]
    assert ours == ["SparseMatMul", "SparseGemm"]
    quantization.quantize_dynamic(sparse, out)
    assert [node.op_type for node in onnx.load(out).graph.node if node.domain == DOMAIN] == ours
    assert "MatMulInteger" in op_types(out)
    assert_allclose(run(out, x), expected, atol=0.03 * np.abs(expected).max())
    for form in quantization.QuantFormat:
        quantization.quantize_static(sparse, out, Samples("X", (5, 64)), quant_format=form)
        assert [node.op_type for node in onnx.load(out).graph.node if node.domain == DOMAIN] == ours
        assert_allclose(run(out, x), expected, atol=0.05 * np.abs(expected).max())
        with_kernels = session_on_kernels(str(out), providers=["CPUExecutionProvider"]).run(None, {"X": x})[0]
        assert_allclose(with_kernels, expected, atol=0.05 * np.abs(expected).max())
    renamed = onnx.compose.add_prefix(onnx.load(sparse), "own.")
    assert np.array_equal(run(renamed, x), expected)


def test_functions_of_the_model_itself_stay(tmp_path: Path) -> None:
    body = [make("Relu", ["a"], ["b"]), make("Neg", ["b"], ["c"])]
    opsets = [helper.make_opsetid("", 18)]
    weight = sparse_weight("matmul", (16, 8), "2:4")
    nodes = [make("MatMul", ["X", "W"], ["h"]), make("Own", ["h"], ["Y"], domain="own")]
    model = model_of(nodes, {"W": weight}, ["n", 16], rank=2)
    model.functions.append(helper.make_function("own", "Own", ["a"], ["c"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    x = random_input((3, 16))
    result = exported(model, tmp_path)
    assert len(result.compressed.layers) == 1
    assert_allclose(run(result.output, x), -np.maximum(x @ weight, 0), rtol=1e-4, atol=1e-5)


def test_an_addend_that_widens_a_product_is_no_bias(tmp_path: Path) -> None:
    """One column and sixteen constants make sixteen columns."""
    first, weight = sparse_weight("matmul", (16, 8), "2:4"), sparse_weight("matmul", (8, 1), "2:4")
    nodes = [
        make("MatMul", ["X", "V"], ["g"]),
        make("MatMul", ["g", "W"], ["h"]),
        make("Add", ["h", "B"], ["Y"]),
    ]
    addend = random_input((16,), seed=2)
    x = random_input((3, 16))
    compressed = exported(model_of(nodes, {"V": first, "W": weight, "B": addend}, ["n", 16], rank=2), tmp_path).output
    for opened in (session(compressed), session_on_kernels(compressed, layers="sparse")):
        assert_allclose(opened.run(None, {"X": x})[0], x @ first @ weight + addend, rtol=1e-4, atol=1e-5)


def test_dimensions_that_all_have_one_placeholder_are_not_equal(tmp_path: Path) -> None:
    """``?`` is what some exporters call every open dimension: such a sum may widen what is added to."""
    weight = sparse_weight("matmul", (16, 8), "2:4")
    nodes = [
        make("MatMul", ["X", "W"], ["h"]),
        make("ReduceSum", ["X"], ["s"], keepdims=1),
        make("Expand", ["s", "to"], ["r"]),
        make("Add", ["h", "r"], ["Y"]),
    ]
    model = model_of(nodes, {"W": weight, "to": np.array([5, 1, 8])}, ["n", 3, 16], rank=3)
    model.graph.value_info.extend(value(name, ["?", "?", 8]) for name in ("h", "r"))
    x = random_input((1, 3, 16))
    compressed = exported(model, tmp_path, inputs=[InputSpec("X", (1, 3, 16))]).output
    expected = x @ weight + np.broadcast_to(x.sum(), (5, 1, 8))
    for opened in (session(compressed), session_on_kernels(compressed, layers="sparse")):
        assert_allclose(opened.run(None, {"X": x})[0], expected, rtol=1e-4, atol=1e-4)


def test_a_weight_without_entries(tmp_path: Path) -> None:
    weight, none = sparse_weight("matmul", (16, 8), "2:4"), np.zeros((8, 0), np.float32)
    nodes = [make("MatMul", ["X", "W"], ["h"]), make("MatMul", ["h", "E"], ["e"])]
    nodes.append(make("Concat", ["h", "e"], ["Y"], axis=1))
    result = exported(model_of(nodes, {"W": weight, "E": none}, ["n", 16], rank=2), tmp_path)
    assert [layer.name for layer in result.compressed.layers] == ["W"]
    x = random_input((2, 16))
    assert_allclose(run(result.output, x), x @ weight, rtol=1e-4, atol=1e-5)


def test_a_square_weight_behind_a_transpose_is_the_other_files(tmp_path: Path) -> None:
    weight = sparse_weight("linear", (16, 16), "2:4")
    nodes = [make("Transpose", ["W"], ["t"], perm=[1, 0]), make("MatMul", ["X", "t"], ["Y"])]
    model = model_of(nodes, {"W": weight}, ["n", 16], rank=2)
    output = exported(model, tmp_path).output
    assert not verify(output, tmp_path / "source.onnx").failed
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight.T), "W"))
    onnx.save(model, tmp_path / "turned.onnx")
    told = {check.what: check.holds for check in verify(output, tmp_path / "turned.onnx").checks}
    assert told["W"] is False


def test_inlined_nodes_list_no_inputs_that_are_left_out(tmp_path: Path) -> None:
    """OpenVINO and quantisers take the name of an input that is none, at the end of the list, for one."""
    model = model_of([make("Gemm", ["X", "W"], ["Y"])], {"W": sparse_weight("matmul", (16, 16), "2:4")}, ["n", 16])
    result = exported(model, tmp_path, "inlined")
    assert result.compressed.layers
    written = onnx.load(result.output)
    assert all(node.input[-1] for node in written.graph.node if node.input)


def test_an_output_may_have_no_shape(tmp_path: Path) -> None:
    """onnxruntime infers it, the checker of what is written asks for it."""
    model = model_of([make("MatMul", ["X", "W"], ["Y"])], {"W": sparse_weight("matmul", (8, 64), "2:4")}, ["n", 8])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    x = random_input((4, 8))
    assert np.array_equal(run(exported(model, tmp_path).output, x), run(model, x))


def test_a_packed_name_that_is_taken(tmp_path: Path) -> None:
    weights = {name: sparse_weight("matmul", (64, 64), "2:4", seed=seed) for seed, name in enumerate(["W", "W.values"])}
    model = model_of([make("MatMul", ["X", "W"], ["a"]), make("MatMul", ["a", "W.values"], ["Y"])], weights, ["n", 64])
    result = exported(model, tmp_path)
    assert [layer.name for layer in result.compressed.layers] == ["W.values"]
    assert result.compressed.dense == {"W": "W.values, its packed name, is another value's"}


def test_nodes_in_any_order(tmp_path: Path) -> None:
    weights = {name: sparse_weight("matmul", (64, 64), "2:4", seed=seed) for seed, name in enumerate("VW")}
    model = model_of([make("MatMul", ["a", "W"], ["Y"]), make("MatMul", ["X", "V"], ["a"])], weights, ["n", 64])
    result = exported(model, tmp_path)
    assert {layer.name for layer in result.compressed.layers} == {"V", "W"}


def test_bodies_of_if(tmp_path: Path) -> None:
    weights = [sparse_weight("matmul", (8, 64), "2:4", seed=seed) for seed in range(2)]
    model = if_model(branch("then", "W", {}), branch("else", "own", {"own": weights[1]}), {"W": weights[0]})
    result = exported(model, tmp_path)
    assert {layer.name for layer in result.compressed.layers} == {"W", "own"}
    for x in (random_input((4, 8)), -random_input((4, 8))):
        assert np.array_equal(run(result.output, x), run(model, x))


def test_two_branches_with_weights_of_one_name(tmp_path: Path) -> None:
    weights = [sparse_weight("matmul", (8, 64), "2:4", seed=seed) for seed in range(3)]
    model = if_model(branch("then", "w", {"w": weights[0]}), branch("else", "w", {"w": weights[1]}), {"V": weights[2]})
    extra = make("MatMul", ["X", "V"], ["Z"])
    model.graph.node.append(extra)
    model.graph.output.append(value("Z", [None, None]))
    result = exported(model, tmp_path)
    assert [layer.name for layer in result.compressed.layers] == ["V"]
    for x in (random_input((4, 8)), -random_input((4, 8))):
        assert np.array_equal(run(result.output, x), run(model, x))


def test_int8_weights_stay_as_they_are(tmp_path: Path) -> None:
    integers = (sparse_weight("matmul", (64, 64), "2:4") * 20).astype(np.int8)
    nodes = [make("DequantizeLinear", ["Q", "s"], ["q"]), make("MatMul", ["X", "q"], ["a"]), make("MatMul", ["a", "W"], ["Y"])]
    constants = {"Q": integers, "s": np.array(0.1, np.float32), "W": sparse_weight("matmul", (64, 64), "2:4", seed=1)}
    result = exported(model_of(nodes, constants, ["n", 64]), tmp_path)
    assert [layer.name for layer in result.compressed.layers] == ["W"]
    assert result.compressed.dense["Q"] == "int8 behind DequantizeLinear: left as it is"


def test_what_would_be_no_smaller_stays_dense(tmp_path: Path) -> None:
    weight = random_input((32, 64), np.float16)
    onnx.save(
        model_of([make("MatMul", ["X", "W"], ["Y"])], {"W": weight}, ["n", 32], element=TensorProto.FLOAT16),
        tmp_path / "a.onnx",
    )
    pruned = prune(tmp_path / "a.onnx", Pattern(30, 32), include=["W"]).output
    result = export(pruned, output=tmp_path / "b.onnx")
    assert result.compressed.dense == {"W": "packed at 30:32 it would be no smaller"}
    assert not result.compressed.layers


@pytest.mark.parametrize("flavour", ["compressed", "inlined"])
def test_nothing_sparse(tmp_path: Path, flavour: str) -> None:
    with pytest.raises(
        UsageError, match="nothing in it is N:M sparse; run nmconvert prune first, or export with --flavour dense"
    ):
        exported(conv_net(None), tmp_path, flavour)
    assert not (tmp_path / "out.onnx").exists()


def test_a_compressed_file_is_not_compressed_again(tmp_path: Path) -> None:
    first = exported(conv_net(), tmp_path).output
    with pytest.raises(UsageError, match="is compressed already"):
        export(first, output=tmp_path / "again.onnx")


@pytest.mark.parametrize("said", [{"dynamic": {}}, {"dynamic": {0: "batch"}}, {"dtype": torch.float16}])
def test_what_is_traced_already_keeps_its_dimensions(tmp_path: Path, said: dict[str, Any]) -> None:
    dense = exported(conv_net(), tmp_path, "dense").output
    with pytest.raises(UsageError, match="is traced already, so that dimensions and types stay as they are"):
        export(dense, output=tmp_path / "again.onnx", **said)
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.parametrize("flavour", ["compressed", "dense", "inlined"])
def test_large_models_use_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str) -> None:
    monkeypatch.setattr(onnx_file, "EXTERNAL_ABOVE", 1000)
    model = conv_net()
    x = random_input((3, 8, 6, 6))
    for _ in range(2):  # the second replaces the first
        result = exported(model, tmp_path, flavour)
        files = {path.name for path in tmp_path.glob("out.onnx*")}
        assert len(files) == 2
        assert result.nbytes == sum((tmp_path / name).stat().st_size for name in files)
        assert np.array_equal(run(result.output, x), run(model, x))
        onnx.checker.check_model(str(result.output), full_check=True)
        assert {layer.name for layer in manifest_of(result.output).layers} == {"first.weight", "second.weight", "head.weight"}


def test_external_data_in(tmp_path: Path) -> None:
    onnx.save(conv_net(), tmp_path / "a.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    result = export(tmp_path / "a.onnx", output=tmp_path / "b.onnx")
    assert not list(tmp_path.glob("b.onnx?*"))
    x = random_input((3, 8, 6, 6))
    assert np.array_equal(run(result.output, x), run(tmp_path / "a.onnx", x))


@pytest.mark.parametrize("limit", [0, 10**10])
def test_a_failing_check_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(onnx_file, "EXTERNAL_ABOVE", limit)
    exported(conv_net(seed=1), tmp_path)
    before = {path: sha256(path) for path in tmp_path.iterdir() if path.name != "source.onnx"}

    def wrong(*args: Any) -> list[Any]:
        return [np.full((1, 10), 7, np.float32)]

    monkeypatch.setattr("nmconvert.export.check.run", wrong)
    with pytest.raises(ExportError, match=r"out\.onnx: its output differs from the model's by") as caught:
        exported(conv_net(seed=2), tmp_path)
    assert "nmconvert-part" not in str(caught.value)
    assert {path: sha256(path) for path in tmp_path.iterdir() if path.name != "source.onnx"} == before


def test_a_body_that_is_not_folded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    from nmconvert.export import check

    def unoptimised(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(optimized or tmp_path / "x.onnx")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    onnx.save(conv_net(), tmp_path / "a.onnx")
    monkeypatch.setattr(check, "stock_session", unoptimised)
    with pytest.raises(ExportError, match="onnxruntime did not fold CumSum"):
        export(tmp_path / "a.onnx", output=tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("flavour", ["compressed", "inlined"])
def test_without_memory_to_fold_it_is_checked_unfolded_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    """As for a model of some gigabytes: the outputs are compared all the same, and verify can look at the file."""
    from nmconvert import verify
    from nmconvert.export import check

    monkeypatch.setattr("nmconvert.export.free_memory", lambda: 0.0)
    monkeypatch.setattr(verify, "free_memory", lambda: 0.0)
    monkeypatch.setattr(check, "check_folded", lambda *_: pytest.fail("the folded graph was asked for"))
    result = exported(conv_net(), tmp_path, flavour)
    assert not result.folded
    assert result.difference.accepted
    assert result.notes == ("the folded graph was not looked at: 0 GB were free",)
    assert not verify.verify(result.output, tmp_path / "source.onnx").failed


def test_dense_files_need_no_memory_to_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmconvert.export.free_memory", lambda: 0.0)
    result = exported(conv_net(), tmp_path, "dense")
    assert result.folded
    assert result.notes == ()


def test_a_model_that_onnxruntime_cannot_run(tmp_path: Path) -> None:
    model = model_of([make("MatMul", ["X", "W"], ["Y"])], {"W": sparse_weight("matmul", (64, 64), "2:4")}, ["n", 32])
    with pytest.raises(ExportError, match=r"source\.onnx: onnxruntime"):
        exported(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source.onnx"]


def test_convolutions_in_float64_have_a_way_out(tmp_path: Path) -> None:
    weight = sparse_weight("conv", (8, 8, 3, 3), "2:4", dtype=np.float64)
    model = model_of([make("Conv", ["X", "W"], ["Y"])], {"W": weight}, ["n", 8, 8, 8], element=TensorProto.DOUBLE)
    with pytest.raises(ExportError, match="; what is float64 may load after --dtype float32"):
        exported(model, tmp_path)


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    onnx.save(conv_net(), tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="is read by this run; give another name with --output"):
        export(tmp_path / "a.onnx", output=tmp_path / "a.onnx")


def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    onnx.save(conv_net(), tmp_path / "a.onnx")
    for output, why in ((tmp_path, "is a folder; give the name of a file"), (tmp_path / "no" / "b.onnx", "no such folder")):
        with pytest.raises(UsageError, match=why):
            export(tmp_path / "a.onnx", output=output)


def test_default_outputs() -> None:
    assert default_output(Path("a.nm2-4.pt"), "compressed") == Path("a.nm2-4.onnx")
    assert default_output(Path("a.nm2-4.pt"), "dense") == Path("a.nm2-4.dense.onnx")
    assert default_output(Path("a.nm2-4.onnx"), "compressed") == Path("a.nm2-4.compressed.onnx")
    assert default_output(Path(), "compressed") == Path.cwd().with_name(f"{Path.cwd().name}.onnx")


def test_outputs_are_compared_with_care() -> None:
    one = np.ones((2, 2), np.float32)
    assert compare(one, one).accepted
    assert compare(one * 1.0005, one).accepted
    assert not compare(one * 1.01, one).accepted
    assert not compare(np.full_like(one, np.nan), one).accepted
    assert not compare(one, np.full_like(one, np.nan)).accepted
    assert compare(np.full_like(one, np.inf), np.full_like(one, np.inf)).accepted
    assert not compare(np.full_like(one, -np.inf), np.full_like(one, np.inf)).accepted
    assert compare(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)).accepted
    assert compare((one * 1.01).astype(np.float16), one.astype(np.float16)).accepted
    assert not compare(np.array([1, 2]), np.array([1, 3])).accepted
    with pytest.raises(ExportError, match=r"an output has shape \[2, 2\], expected \[2\]"):
        compare(one, one[0])


def test_double_and_half(tmp_path: Path) -> None:
    for element in (TensorProto.DOUBLE, TensorProto.FLOAT16):
        dtype: Any = helper.tensor_dtype_to_np_dtype(element)
        weight = sparse_weight("matmul", (64, 64), "2:4", dtype=dtype)
        model = model_of([make("MatMul", ["X", "W"], ["Y"])], {"W": weight}, ["n", 64], element=element)
        result = exported(model, tmp_path)
        share = result.compressed.packed_bytes / result.compressed.dense_bytes
        assert share <= (0.563 if element == TensorProto.FLOAT16 else 0.516)
        x = random_input((3, 64), dtype)
        assert np.array_equal(run(result.output, x), run(model, x))


def test_the_shape_that_export_of_a_graph_was_told_is_known_afterwards(tmp_path: Path) -> None:
    weights = {"W": sparse_weight("conv", (16, 16, 3, 3), "2:4"), "rows": np.array([6], np.int64)}
    nodes = [
        make("Conv", ["X", "W"], ["a"], pads=[1, 1, 1, 1]),
        make("Gather", ["a", "rows"], ["Y"], axis=0),  # the seventh sample
    ]
    model = model_of(nodes, weights, ["n", 16, "h", "w"])
    with pytest.raises(ExportError, match=r"onnxruntime fails on X \[1, 16, 64, 64\] \(--input gives other shapes\): "):
        exported(model, tmp_path)
    result = exported(model, tmp_path, inputs=[InputSpec.parse("7,16,6,8")])
    assert manifest_of(result.output).settings["input"] == ["7,16,6,8:float32"]
    assert not verify(result.output).failed
    feed = {"X": random_input((7, 16, 6, 8))}
    with warnings.catch_warnings(action="error"):
        fast = session_on_kernels(str(result.output), providers=["CPUExecutionProvider"])
    assert_allclose(fast.run(None, feed)[0], run(result.output, feed["X"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", ["float16", "bfloat16", "int8"])
def test_rounded_weights_are_found_in_bodies(tmp_path: Path, values: str) -> None:
    other = {"V": random_input((8, 64), seed=9)}
    model = if_model(branch("then", "W", {}), branch("else", "V", other), {"W": sparse_weight("matmul", (8, 64), "2:4")})
    model.graph.node.append(make("MatMul", ["X", "W"], ["Z"]))
    model.graph.output.append(value("Z", [None, None]))
    result = exported(model, tmp_path, values=values)
    for x in (np.abs(random_input((4, 8))), -np.abs(random_input((4, 8)))):
        assert_allclose(run(result.output, x), run(model, x), atol=0.02 * np.abs(run(model, x)).max())
