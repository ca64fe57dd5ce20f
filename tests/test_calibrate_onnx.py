"""Calibration of a bare ONNX graph: the layer inputs, the walk, and agreement with the torch driver."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from nmconvert.calibrate.driver import Recipe, prune_model
from nmconvert.calibrate.onnx_driver import _pads, prune_onnx
from nmconvert.errors import DataError, ModelError
from nmconvert.onnx_graph import tensor_infos
from nmconvert.pattern import Pattern
from nmconvert.plan import make_plan

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
    for recipe in (Recipe(criterion="magnitude", correct_means=False, model_steps=0), RECIPE):
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
    assert told[-1] == "not fitted as a whole: no gradients through Softsign"


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
    low, high = _pads(node, [size], [3], [3], [1])[0]
    weight = torch.from_numpy(numpy_helper.to_array(model.graph.initializer[0]).copy())
    padded = torch.nn.functional.pad(x, [low, high])
    torch.testing.assert_close(torch.conv1d(padded, weight, stride=3), run(model, x))


def test_what_is_missing_is_said():
    model = residual_net()
    with pytest.raises(DataError, match="at least 1 batch"):
        prune_onnx(model, [], rows_of(model, ["w1"]))
    with pytest.raises(DataError, match="has an input 'x', which the calibration data does not give"):
        prune_onnx(model, [{"image": images()[0]}], rows_of(model, ["w1"]))
    other = graph_of([helper.make_node("Relu", ["x"], ["y"])], {})
    with pytest.raises(ModelError, match="'w1' is not used in the main graph"):
        prune_onnx(other, images(), rows_of(model, ["w1"]))
