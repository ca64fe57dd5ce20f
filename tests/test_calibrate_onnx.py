"""Calibration of a bare ONNX graph: the graph as a module, what it is judged by, and agreement with the torch module."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from nmconvert.calibrate.distance import Said
from nmconvert.calibrate.driver import Recipe, prune_model
from nmconvert.calibrate.moments import Moments
from nmconvert.calibrate.onnx_driver import check, compared, graph_inputs, prune_onnx
from nmconvert.calibrate.onnx_module import GraphModule
from nmconvert.calibrate.onnx_ops import window_pads
from nmconvert.cli import calibration, group
from nmconvert.cli.calibration import CalibrationData
from nmconvert.detect import satisfies
from nmconvert.errors import DataError, ModelError, WeightError
from nmconvert.onnx_graph import tensor_infos
from nmconvert.pattern import Pattern
from nmconvert.plan import make_plan
from nmconvert.prune import prune

NM = Pattern(2, 4)
RECIPE = Recipe(block_steps=0, model_steps=0, copies=1, held_out=0.01)


def graph_of(nodes, constants, inputs=("x",)):
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(
            (value if isinstance(value, np.ndarray) else rng.standard_normal(value) / 3).astype(np.float32), name
        )
        for name, value in constants.items()
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", values, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_sequences_go_through_onnxruntime():
    """As an EmbeddingBag's Loop has them: an empty one, what is appended to it, and all of it in one tensor."""
    node = helper.make_node
    nodes = [
        node("SequenceEmpty", [], ["none"]),
        node("MatMul", ["x", "w"], ["h"]),
        node("SequenceInsert", ["none", "h"], ["one"]),
        node("SequenceInsert", ["one", "x"], ["two"]),
        node("ConcatFromSequence", ["two"], ["c"], axis=1),
        node("MatMul", ["c", "v"], ["y"]),
    ]
    model = graph_of(nodes, {"w": (16, 16), "v": (32, 8)})
    x = torch.randn(5, 16)
    torch.testing.assert_close(GraphModule(model)(x)[0], run(model, x), rtol=1e-5, atol=1e-5)
    found = prune_onnx(model, [torch.randn(32, 16) for _ in range(3)], rows_of(model, ["w", "v"]), RECIPE)
    assert all(satisfies(found[name].T.numpy(), NM) for name in ("w", "v"))


def residual_net():
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "stem"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["r"]),
        node("Conv", ["r", "w1", "b1"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Conv", ["r", "w2", "b2"], ["d"], strides=[2, 2]),
        node("Add", ["c", "d"], ["e"]),
        node("Relu", ["e"], ["f"]),
        node("GlobalAveragePool", ["f"], ["p"]),
        node("Flatten", ["p"], ["q"]),
        node("MatMul", ["q", "w3"], ["m"]),
        node("Add", ["m", "b3"], ["n"]),
        node("Gemm", ["n", "w4", "b4"], ["y"], transB=1),
    ]
    shapes = {"stem": (8, 3, 3, 3), "w1": (12, 8, 3, 3), "b1": (12,), "w2": (12, 8, 1, 1), "b2": (12,)}
    return graph_of(nodes, {**shapes, "w3": (12, 16), "b3": (16,), "w4": (6, 16), "b4": (6,)})


def older(nodes, constants, opset, inputs=("x",)):
    model = graph_of(nodes, constants, inputs)
    model.opset_import[0].version = opset
    return model


def images(count=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 9, 9, generator=generator) for _ in range(count)]


def rows_of(model, names, axis="channel"):
    return make_plan(tensor_infos(model), NM, axis, include=names).pruned


def run(model, batch):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": batch.numpy()})[0])


def changed(model, tensors):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name].numpy(), tensor.name))
    return copy


class Same(torch.nn.Module):
    """residual_net, for torch."""

    def __init__(self, weights):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.c1 = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.c2 = torch.nn.Conv2d(8, 12, 1, stride=2)
        self.l3, self.l4 = torch.nn.Linear(12, 16), torch.nn.Linear(16, 6)
        names = ["stem", "w1", "b1", "w2", "b2", "w3", "b3", "w4", "b4"]
        with torch.no_grad():
            for parameter, name in zip(self.parameters(), names, strict=True):
                value = torch.from_numpy(weights[name].copy())
                parameter.copy_(value.T if name == "w3" else value)

    def forward(self, x):
        r = self.stem(x).relu()
        return self.l4(self.l3((self.c1(r) + self.c2(r)).relu().mean((2, 3))))


@pytest.mark.parametrize("axis", ["channel", "kernel"])
def test_a_graph_is_pruned_as_the_module_that_it_came_from(axis):
    model, batches = residual_net(), images()
    held = torch.zeros(1, 3, 9, 9)  # the last batch is held out
    found = prune_onnx(model, [*batches, held], rows_of(model, ["w1", "w2", "w3", "w4"], axis), RECIPE)
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    module = Same(weights).eval()
    names = {"c1.weight": "w1", "c2.weight": "w2", "l3.weight": "w3", "l4.weight": "w4"}
    prune_model(module, [*batches, held], dict.fromkeys(names, (NM, axis)), RECIPE)
    assert set(found) == {"w1", "b1", "w2", "b2", "w3", "b3", "w4", "b4"}
    for name, own in names.items():
        weight = module.get_parameter(name).detach()
        torch.testing.assert_close(weight.T if own == "w3" else weight, found[own], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(run(changed(model, found), batches[0]), module(batches[0]), rtol=2e-3, atol=2e-3)


def test_the_solved_graph_is_closer_to_the_dense_one_than_magnitude_is():
    model, batches = residual_net(), images()
    rows = rows_of(model, ["w1", "w2", "w3", "w4"])
    target = run(model, images(6)[5])
    errors = []
    for recipe in (Recipe(criterion="magnitude", correct_means=False, block_steps=0, model_steps=0), RECIPE):
        output = run(changed(model, prune_onnx(model, batches, rows, recipe)), images(6)[5])
        errors.append(float((output - target).square().mean()))
    assert errors[1] < 0.3 * errors[0]


def test_the_whole_graph_is_fitted_where_torch_computes_it_too():
    model, batches, told = residual_net(), images(40), []
    names = ["w1", "w2", "w3", "w4"]
    rows = rows_of(model, names)
    plain = prune_onnx(model, batches, rows, RECIPE)
    fitted = prune_onnx(model, batches, rows, Recipe(model_steps=250, model_rate=3e-3), told.append)
    assert "reconstruction" in told[-1]
    target = run(model, images(41)[40])
    errors = [float((run(changed(model, t), images(41)[40]) - target).square().mean()) for t in (plain, fitted)]
    assert errors[1] < 0.95 * errors[0]
    for row in rows:
        assert ((row.view.to_matrix(fitted[row.name]).reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_a_graph_that_torch_does_not_know_is_pruned_without():
    node = helper.make_node
    model = graph_of([node("Conv", ["x", "w"], ["a"]), node("Softsign", ["a"], ["b"]), node("Conv", ["b", "v"], ["y"])],
                     {"w": (8, 4, 1), "v": (8, 8, 1)})  # fmt: skip
    told: list[str] = []
    batches = [torch.randn(4, 4, 9) for _ in range(3)]
    found = prune_onnx(model, batches, rows_of(model, ["v"]), progress=told.append)
    assert set(found) == {"v"}
    assert told[0] == "nothing is fitted: no gradients through Softsign"


def test_transposed_convolutions_and_weights_on_the_left():
    node = helper.make_node
    nodes = [
        node("ConvTranspose", ["x", "w"], ["t"], strides=[2, 2], pads=[1, 0, 0, 1], output_padding=[1, 1], group=2),
        node("Reshape", ["t", "shape"], ["s"]),
        node("MatMul", ["left", "s"], ["y"]),
    ]
    model = graph_of(nodes, {"w": (8, 3, 3, 3), "left": (5, 6)})
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 6, -1], dtype=np.int64), "shape"))
    batches = [torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    found = prune_onnx(model, batches, rows_of(model, ["w", "left"]), Recipe(damping=1e-6, model_steps=0))
    for row in rows_of(model, ["w", "left"]):
        matrix = row.view.to_matrix(found[row.name])
        assert (matrix != 0).sum(1).max() <= NM.kept(matrix.shape[1])
    everything_kept = make_plan(tensor_infos(model), Pattern(4, 4), include=["w", "left"]).pruned
    same = prune_onnx(model, batches, everything_kept, Recipe(damping=1e-9, model_steps=0))
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    for name, tensor in same.items():  # nothing pruned: the dense weight is the optimum, whatever the inputs
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("mode", "size"), [("SAME_UPPER", 7), ("SAME_LOWER", 8), ("VALID", 8)])
def test_auto_pad_is_what_onnxruntime_does(mode, size):
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[3])
    model = graph_of([node], {"w": (2, 2, 3)})
    x = torch.randn(1, 2, size)
    low, high = window_pads(node, [size], [3], [3], [1])[0]
    weight = torch.from_numpy(numpy_helper.to_array(model.graph.initializer[0]).copy())
    padded = torch.nn.functional.pad(x, [low, high])
    torch.testing.assert_close(torch.conv1d(padded, weight, stride=3), run(model, x))


def test_what_is_missing_is_said():
    model = residual_net()
    with pytest.raises(DataError, match="at least 2 batches"):
        prune_onnx(model, [], rows_of(model, ["w1"]))
    with pytest.raises(DataError, match="has an input 'x', which the calibration data does not give"):
        prune_onnx(model, [{"image": images()[0]}], rows_of(model, ["w1"]))
    other = graph_of([helper.make_node("Relu", ["x"], ["y"])], {})
    with pytest.raises(ModelError, match=r"'w1' is not the weight of one .* in the main graph.*--exclude 'w1'"):
        prune_onnx(other, images(), rows_of(model, ["w1"]))


def test_what_onnxruntime_does_not_run_is_said():
    node = helper.make_node
    for nodes, why in (
        ([node("MatMul", ["x", "w1"], ["a"]), node("Add", ["a", "nowhere"], ["y"])], "'nowhere' is not a graph input"),
        ([node("MatMul", ["x", "w1"], ["a"]), node("Add", ["a", "y"], ["b"]), node("Relu", ["b"], ["y"])], "not acyclic"),
        ([node("MatMul", ["x", "w1"], ["a"]), node("NoSuch", ["a"], ["y"])], "No Op registered for NoSuch"),
        ([node("MatMul", ["x", "w1"], ["a"]), node("MatMul", ["a", "w1"], ["y"])], "dimension mismatch"),
    ):
        model = graph_of(nodes, {"w1": (16, 8)})
        with pytest.raises(ModelError, match=rf"onnxruntime cannot run the graph on x \[4, 16\]: .*{why}"):
            prune_onnx(model, list(torch.randn(8, 16).split(4)), rows_of(model, ["w1"]))


def test_what_cannot_be_calibrated_stays_dense_with_its_reason(tmp_path):
    node = helper.make_node
    body = helper.make_graph(
        [node("MatMul", ["m", "inner"], ["inside"])],
        "body",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)],
    )
    nodes = [
        node("MatMul", ["x", "w1"], ["m"]),
        node("ReduceSum", ["m"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["positive"]),
        node("If", ["positive"], ["i"], then_branch=body, else_branch=body),
        node("Unsqueeze", ["i", "axis"], ["u"]),
        node("MatMul", ["u", "stack"], ["s"]),
        node("ReduceMean", ["s"], ["y"], keepdims=0),
    ]
    constants = {"w1": (16, 8), "inner": (8, 8), "stack": (1, 8, 8), "zero": ()}
    model = graph_of(nodes, constants)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axis"))
    onnx.save(model, tmp_path / "a.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32))
    plan = prune(tmp_path / "a.onnx", NM, include=["*"]).plan
    assert {row.name for row in plan.pruned} == {"w1", "inner", "stack"}  # by magnitude all can be
    asked = ["prune", tmp_path / "a.onnx", "--nm", "2:4", "--include", "*", "--calib", tmp_path / "x.npz", "--json"]
    result = CliRunner().invoke(group, [str(word) for word in asked], standalone_mode=False)
    assert result.exception is None, result.exception
    told = {tensor["name"]: tensor for tensor in json.loads(result.stdout)["tensors"]}
    assert told["w1"]["pattern"] == "2:4"
    for name in ("inner", "stack"):
        assert told[name]["pattern"] is None
        assert "not calibrated; pruned without --calib" in told[name]["reason"]


# ── the graph as a module ─────────────────────────────────────────────────────────────────────────────────────────────


def state_of(module):
    """Every constant that the module has, as the graph has it."""
    state = module.state_dict()
    return {name: place.back(state[place.name]) for name, place in module.places.items()}


def assert_same(model, batch):
    """The module computes what onnxruntime does, and its constants are the graph's."""
    module = GraphModule(model)
    check(module, model, batch)
    torch.testing.assert_close(module(batch)[0], run(model, batch), rtol=1e-4, atol=1e-5)
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    for name, tensor in state_of(module).items():
        assert torch.equal(tensor, weights[name]), name
    return module


def test_a_product_takes_its_bias_from_the_add_after_it_and_scales_stay():
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Add", ["bias", "a"], ["b"]),
        node("Gemm", ["b", "v", "c"], ["d"], alpha=0.5, beta=2.0, transB=1),
        node("Gemm", ["u", "d", "e"], ["f"], transB=1),
        node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
        node("MatMul", ["turned", "f"], ["y"]),
    ]
    shapes = {"w": (4, 8), "bias": (8,), "v": (8, 8), "c": (8,), "u": (6, 8), "e": (6, 1), "wide": (6, 5)}
    module = assert_same(graph_of(nodes, shapes), torch.randn(3, 4))
    layers = [layer for part in module.parts for layer in part.layers.values()]
    assert [type(layer).__name__ for layer in layers] == ["Linear"] * 4
    assert [layer.bias is not None for layer in layers] == [True, False, False, False]
    assert set(module.places) == {"w", "bias", "v", "u", "wide"}


def test_norms_of_a_graph_are_norms_and_half_precision_is_computed_in_single():
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[0, 1]),
        node("BatchNormalization", ["a", "s", "b", "m", "v"], ["n"], epsilon=1e-3),
        node("Conv", ["n", "u", "c"], ["y"], auto_pad="SAME_UPPER", strides=[2]),
    ]
    shapes = {"w": (8, 4, 2), "s": (8,), "b": (8,), "m": (8,), "u": (4, 8, 3), "c": (4,)}
    model = graph_of(nodes, {**shapes, "v": np.full(8, 0.7)})
    batch = torch.randn(2, 4, 9)
    module = assert_same(model, batch)
    assert any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in module.modules())
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    batches = [torch.randn(8, 4, 9, generator=torch.Generator().manual_seed(s)) for s in range(6)]
    found = prune_onnx(model, batches, rows_of(model, ["w", "u"]), RECIPE)
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert {"w", "u", "c"} <= set(found)


def test_operators_that_torch_computes_otherwise_are_left_to_onnxruntime():
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Resize", ["a", "", "scales"], ["b"], mode="nearest", nearest_mode="ceil"),
        node("Shape", ["b"], ["shape"]),
        node("Constant", [], ["one"], value_ints=[1]),
        node("Gather", ["shape", "first"], ["length"]),
        node("Div", ["length", "two"], ["half"]),
        node("Concat", ["half", "rest"], ["wanted"], axis=0),
        node("Reshape", ["b", "wanted"], ["c"]),
        node("MatMul", ["c", "v"], ["y"]),
    ]
    model = graph_of(nodes, {"w": (8, 4, 1, 1), "v": (4, 8), "scales": np.array([1, 1, 1.5, 1.5])})
    for name, values in (("first", [0]), ("two", [2]), ("rest", [-1, 4])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
    module = assert_same(model, torch.randn(4, 4, 6, 6))
    assert module.opaque() == ["Resize"]


def test_parts_are_blocks_and_what_skips_many_layers_goes_past_them():
    node = helper.make_node
    nodes, constants = [node("Conv", ["x", "stem"], ["v0"])], {"stem": (8, 3, 1)}
    for block in range(6):
        one, two = f"w{block}a", f"w{block}b"
        constants |= {one: (8, 8, 1), two: (8, 8, 1)}
        nodes += [
            node("Conv", [f"v{block}", one], [f"a{block}"]),
            node("Relu", [f"a{block}"], [f"r{block}"]),
            node("Conv", [f"r{block}", two], [f"b{block}"]),
            node("Add", [f"b{block}", f"v{block}"], [f"s{block}"]),
            node("Relu", [f"s{block}"], [f"v{block + 1}"]),
        ]
    nodes.append(node("Add", ["v6", "v0"], ["y"]))
    module = assert_same(graph_of(nodes, constants), torch.randn(2, 3, 5))
    sizes = [[key.partition("/")[2] for key in part.layers] for part in module.parts]
    assert sizes == [["stem", "w0a", "w0b"], *([f"w{b}a", f"w{b}b"] for b in range(1, 6))]
    assert [part.outputs for part in module.parts][1:] == [["v2"], ["v3"], ["v4"], ["v5"], ["y"]]


def test_no_part_ends_between_layers_that_share_a_weight():
    node = helper.make_node
    names = [f"v{i}" for i in range(7)]
    nodes = [node("MatMul", [a, w], [b]) for a, b, w in zip(["x", *names], [*names, "y"], "abcdefba", strict=True)]
    model = graph_of(nodes, dict.fromkeys("abcdef", (8, 8)))
    module = assert_same(model, torch.randn(4, 8))
    assert len(module.parts) == 1
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(s)) for s in range(6)]
    rows = rows_of(model, list("abcdef"))
    found = prune_onnx(model, batches, rows)
    for row in rows:
        assert ((row.view.to_matrix(found[row.name]).reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_a_graph_is_judged_before_its_last_concat_and_by_its_last_layers():
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["a", "u"], ["b"]),
        node("Conv", ["a", "v"], ["c"]),
        node("Sigmoid", ["b"], ["p"]),
        node("Concat", ["p", "c"], ["y"], axis=1),
    ]
    shapes = {"w": (8, 4, 1), "u": (2, 8, 1), "v": (4, 8, 1)}
    assert compared(graph_of(nodes, shapes)) == [Said("c"), Said("b", "chance")]
    skipping = [*nodes[:2], node("Add", ["b", "x"], ["y"])]
    assert compared(graph_of(skipping, {"w": (8, 4, 1), "u": (4, 8, 1)})) == [Said("b"), Said("y")]
    chosen = [*nodes[:-1], node("TopK", ["p", "k"], ["y", "places"], axis=2)]
    assert compared(graph_of(chosen, {**shapes, "k": (1,)})) == [Said("b")]


def test_a_softmax_between_transposes_is_judged_by_what_it_is_given():
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        node("Softmax", ["b"], ["c"], axis=2),
        node("Transpose", ["c"], ["p"], perm=[0, 2, 1]),
        node("Conv", ["x", "u"], ["d"]),
        node("Transpose", ["d"], ["e"], perm=[2, 0, 1]),
        node("Sigmoid", ["e"], ["f"]),
        node("Transpose", ["f"], ["q"], perm=[1, 2, 0]),
        node("Concat", ["p", "q"], ["y"], axis=1),
    ]
    found = compared(graph_of(nodes, {"w": (8, 4, 1), "u": (2, 4, 1)}))
    assert found == [Said("b", "choice", 2), Said("e", "chance", 2)]


def detector():
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "stem"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["d"]),
        node("Conv", ["d", "w2", "b2"], ["e"], pads=[1, 1, 1, 1]),
        node("Relu", ["e"], ["f"]),
        node("Conv", ["f", "u"], ["g"]),
        node("Sigmoid", ["g"], ["p"]),
        node("Conv", ["f", "v"], ["h"]),
        node("Conv", ["f", "k"], ["i"]),
        node("Softmax", ["i"], ["q"], axis=1),
        node("Concat", ["p", "h", "q"], ["y"], axis=1),
    ]
    shapes = {"stem": (8, 3, 3, 3), "w1": (16, 8, 3, 3), "b1": (16,), "w2": (16, 16, 3, 3), "b2": (16,)}
    return graph_of(nodes, {**shapes, "u": (1, 16, 1, 1), "v": (4, 16, 1, 1), "k": (6, 16, 1, 1)})


def test_a_graph_that_answers_by_place_is_fitted_to_what_its_maps_mean():
    model, told = detector(), []
    rows = rows_of(model, ["w1", "w2", "u", "v", "k"])
    batches, other = images(20), images(21)[20]
    fitted = prune_onnx(model, batches, rows, Recipe(model_steps=60, model_rate=2e-3), told.append)
    what, _, errors = told[-1].partition("  ")
    assert what == "model: reconstruction"
    before, after = (float(error) for error in errors.split(" -> "))
    assert after < 0.9 * before
    plain = prune_onnx(model, batches, rows, Recipe(model_steps=0))
    target, *others = (run(changed(model, tensors), other) for tensors in ({}, plain, fitted))
    lost = [float((target[:, 5:] * (target[:, 5:] / output[:, 5:]).log()).sum()) for output in others]
    assert lost[1] < 0.9 * lost[0]


def test_maps_are_fitted_in_more_and_gentler_steps_of_the_same_images(monkeypatch):
    fits = []

    def fit(module, loss, examples, masks, *, steps, rate, together, **others):
        fits.append((steps, rate, together))

    monkeypatch.setattr("nmconvert.calibrate.driver.reconstruct", fit)
    recipe = Recipe(criterion="magnitude", block_steps=0, model_steps=10, model_rate=1e-3)
    prune_onnx(detector(), images(8), rows_of(detector(), ["w1", "w2"]), recipe)
    prune_onnx(residual_net(), images(8), rows_of(residual_net(), ["w1", "w2"]), recipe)
    (steps, rate, together), (plain_steps, _, plain_together) = fits
    assert steps * together == plain_steps * plain_together == 20
    assert steps > plain_steps == 10
    assert 0 < rate < recipe.model_rate


def test_maps_are_fitted_for_longer_to_many_images_which_are_not_copied(monkeypatch):
    monkeypatch.setattr("nmconvert.calibrate.driver._FEW", 14)
    fits, seen = [], []

    def fit(module, loss, examples, masks, *, steps, **others):
        fits.append(steps)

    class Counted(Moments):
        def add(self, x, x_dense):
            seen[-1] += 1
            super().add(x, x_dense)

    monkeypatch.setattr("nmconvert.calibrate.driver.reconstruct", fit)
    monkeypatch.setattr("nmconvert.calibrate.driver.Moments", Counted)
    recipe = Recipe(criterion="magnitude", block_steps=0, model_steps=10)
    for count in (2, 8, 64):  # batches of eight images, of which the last eighth is held out
        seen.append(0)
        prune_onnx(detector(), images(count), rows_of(detector(), ["w1"]), recipe)
    assert fits == [20, 80, 200]
    assert seen == [4, 7, 56]


def test_an_interrupted_graph_goes_on_and_ends_with_the_same_bytes(tmp_path):
    model, batches, file = residual_net(), images(), tmp_path / "state"
    rows = rows_of(model, ["w1", "w2", "w3", "w4"])
    whole = prune_onnx(model, batches, rows)

    def stop(line):
        if line.startswith("w3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_onnx(model, batches, rows, progress=stop, resume=file)
    assert file.exists()
    told: list[str] = []
    again = prune_onnx(model, batches, rows, progress=told.append, resume=file)
    assert not any(line.startswith("w1 ") for line in told)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_weight_whose_inputs_are_not_finite_is_named_as_the_file_does():
    batches = images()
    batches[0][1, 0, 0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"^w1: its inputs .* as sample 2 of calibration batch 1 does"):
        prune_onnx(residual_net(), batches, rows_of(residual_net(), ["w1", "w2"]), RECIPE)


# ── graphs as others write them ───────────────────────────────────────────────────────────────────────────────────────


def solved(model, batches, names=("w1",)):
    """The tensors that calibration changes, and the error that they leave, relative to that of magnitude."""
    rows = rows_of(model, list(names))
    tensors = prune_onnx(model, batches, rows, Recipe(block_steps=4, model_steps=4, copies=1))
    plain = prune_onnx(model, batches, rows, Recipe(criterion="magnitude", block_steps=0, model_steps=0, correct_means=False))
    errors = [sum(float((run(changed(model, t), b) - run(model, b)).square().sum()) for b in batches) for t in (tensors, plain)]
    return tensors, errors[0] / errors[1]


def tokens(count=6, size=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 16, generator=generator) for _ in range(count)]


def test_limits_of_a_clip_that_are_attributes():
    """As up to opset 10: a ReLU6, which torch computes, so that what is before it can be fitted."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Clip", ["a"], ["c"], min=0.0, max=6.0),
        node("MatMul", ["c", "w2"], ["y"]),
    ]
    model = older(nodes, {"w1": (16, 16), "w2": (16, 8)}, 9)
    inputs = tokens()
    module = GraphModule(model, ["y"])
    with torch.no_grad():
        torch.testing.assert_close(module(inputs[0])[0], run(model, inputs[0]), rtol=1e-4, atol=1e-5)
    assert "Clip" not in module.opaque()
    assert solved(model, inputs)[1] < 0.9


def test_a_form_of_an_operator_that_torch_stumbles_over_is_left_to_onnxruntime():
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Unsqueeze", ["a", "axes"], ["b"]),
        node("Resize", ["b", "", "scales"], ["c"], axes=[1, 2], mode="nearest"),
        node("ReduceMean", ["c", "axes"], ["y"], keepdims=0),
    ]
    model = graph_of(nodes, {"w1": (16, 16), "scales": np.array([2.0, 1.0])})
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))
    inputs = tokens()
    with torch.no_grad():
        torch.testing.assert_close(GraphModule(model, ["y"])(inputs[0])[0], run(model, inputs[0]), rtol=1e-4, atol=1e-5)


def test_half_precision_between_inputs_and_outputs_of_single():
    node = helper.make_node
    half = TensorProto.FLOAT16
    nodes = [
        node("Cast", ["x"], ["h"], to=half),
        node("MatMul", ["h", "w1"], ["a"]),
        node("Add", ["a", "b1"], ["c"]),
        node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    model = graph_of(nodes, {"w1": (16, 16), "b1": (16,)})
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    tensors, error = solved(model, tokens())
    assert error < 0.9
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_a_weight_of_two_layouts_stays_dense_and_the_rest_is_solved():
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "shared"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "w1"], ["c"]),
        node("Gemm", ["c", "shared"], ["y"], transB=1),
    ]
    model = graph_of(nodes, {"shared": (16, 8), "w1": (8, 8)})
    tensors, error = solved(model, tokens())
    assert error < 1
    assert "w1" in tensors
    assert "shared" not in tensors


def test_a_fixed_batch_takes_what_the_batches_of_the_data_leave():
    model = graph_of([helper.make_node("MatMul", ["x", "w1"], ["y"])], {"w1": (16, 8)})
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 16]))
    data = torch.randn(11, 16)
    cut = graph_inputs(model.graph, list(data.split(3)))
    assert [len(batch) for batch in cut] == [4, 4]
    assert torch.equal(torch.cat(cut), data[:8])
    with pytest.raises(DataError, match="the graph takes 4 samples at once, the data has 3: give more"):
        graph_inputs(model.graph, [data[:3]])


def test_arrays_by_the_names_of_the_inputs(tmp_path):
    """Of any number and type: a bare graph needs no task to be calibrated."""
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("Mul", ["e", "mask"], ["m"]),
        node("MatMul", ["m", "w1"], ["y"]),
    ]
    model = graph_of(nodes, {"table": (20, 16), "w1": (16, 8)}, inputs=("mask",))
    model.graph.input.insert(0, helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 5]))
    onnx.save(model, tmp_path / "a.onnx")
    rng = np.random.default_rng(0)
    arrays = {"ids": rng.integers(0, 20, (24, 5)), "mask": rng.integers(0, 2, (24, 5, 1)).astype(np.float32)}
    np.savez(tmp_path / "inputs.npz", **arrays, unused=np.zeros(3))
    given = CalibrationData(str(tmp_path / "inputs.npz"), "classification", {}, 20, 8, seed=0)
    batches = given.batches(tmp_path / "a.onnx", None, lambda: None)
    assert [{name: list(value.shape) for name, value in batch.items()} for batch in batches] == [
        {"ids": [n, 5], "mask": [n, 5, 1]} for n in (8, 8, 4)
    ]
    rows = {tuple(row) for row in arrays["ids"]}
    assert all(tuple(row) in rows for batch in batches for row in batch["ids"].tolist())
    asked = ["prune", tmp_path / "a.onnx", "--nm", "2:4", "--include", "w1", "--calib", tmp_path / "inputs.npz", "--quiet"]
    result = CliRunner().invoke(group, [str(word) for word in asked], standalone_mode=False)
    assert result.exception is None, result.exception
    pruned = numpy_helper.to_array(onnx.load(tmp_path / "a.nm2-4.onnx").graph.initializer[1])
    assert satisfies(pruned.T, NM)
    np.savez(tmp_path / "inputs.npz", ids=arrays["ids"], mask=arrays["mask"][:7])
    with pytest.raises(DataError, match=r"its arrays hold 2 numbers of samples: ids \[24, 5\], mask \[7, 5, 1\]"):
        given.batches(tmp_path / "a.onnx", None, lambda: None)


def test_a_log_gets_a_line_of_progress_in_half_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(calibration, "monotonic", lambda: now[0])
    tell, silent = calibration.teller(False), calibration.teller(True)
    for number in range(7):
        now[0] += 10
        tell(f"layer {number}")
        silent("nothing")
    assert capsys.readouterr().err == "layer 2\nlayer 5\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    tell = calibration.teller(False)
    for number in range(2):
        tell(f"layer {number}")
    assert capsys.readouterr().err == "layer 0\nlayer 1\n"


def test_bytes_of_images_are_not_taken_for_the_graphs_input_of_that_name(tmp_path):
    """A graph's input may be called ``images``, too: what it is given is what the task makes of them."""
    model = graph_of([helper.make_node("Conv", ["images", "w1"], ["y"])], {"w1": (8, 3, 3, 3)}, inputs=("images",))
    onnx.save(model, tmp_path / "a.onnx")
    np.savez(tmp_path / "data.npz", images=np.full((16, 8, 8, 3), 255, np.uint8), labels=np.zeros(16, np.int64))
    given = CalibrationData(str(tmp_path / "data.npz"), "classification", {"size": "8"}, 8, 4, seed=0)
    batch = given.batches(tmp_path / "a.onnx", None, lambda: None)[0]
    assert list(batch.shape) == [4, 3, 8, 8]
    assert float(batch.max()) < 3  # normalised
