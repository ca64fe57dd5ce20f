"""Examples of a fit computed at once: the same fit as one after another, in parts that hold no more than a limit."""

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from test_calibrate_onnx import graph_of, rows_of
from torch import nn

from nmconvert.calibrate import onnx_driver
from nmconvert.calibrate.correct import output_error, reconstruct
from nmconvert.calibrate.driver import Recipe
from nmconvert.calibrate.onnx_driver import prune_onnx
from nmconvert.calibrate.onnx_module import GraphModule
from nmconvert.calibrate.together import Together

PLENTY = 1 << 30


class Shuffled(nn.Module):
    """For one image alone: what it makes of the first dimension would mix several that are put together along it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 3, groups=2)

    def forward(self, x):
        y = self.norm(self.first(x)).relu_().reshape(4, 2, -1)
        return self.last(y.transpose(0, 1).reshape(1, 8, *x.shape[2:]))


def double_net(seed=0):
    torch.manual_seed(seed)
    return Shuffled().double().eval()


def examples(count=6, size=9):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(1, 3, size, size, generator=generator, dtype=torch.float64),) for _ in range(count)]


def loss_of(model, dense):
    def loss(example):
        with torch.no_grad():
            target = dense(*example)
        return output_error(model(*example), target)

    return loss


@pytest.fixture
def parts(monkeypatch):
    """How many examples were computed at once, trials included."""
    sizes: list[int] = []
    at_once = Together._at_once

    def counted(self, examples):
        sizes.append(len(examples))
        return at_once(self, examples)

    monkeypatch.setattr(Together, "_at_once", counted)
    return sizes


def test_a_fit_of_several_at_once_is_the_fit_of_one_after_another(parts):
    dense, given = double_net(), examples()
    fitted = []
    for limit in (0, PLENTY):
        model = double_net(seed=1)
        mask = torch.rand(model.first.weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        settings = {"steps": 40, "rate": 1e-2, "together": 4, "at_once": limit}
        reconstruct(model, loss_of(model, dense), lambda n: given[n % 6], {"first.weight": mask}, **settings)
        fitted.append(model.state_dict())
        assert not model.first.weight[~mask].any()
    assert parts == [2, *[4] * 40]
    start = double_net(seed=1)
    assert not torch.allclose(fitted[0]["last.weight"], start.last.weight, rtol=0.05)
    for name, tensor in fitted[0].items():
        torch.testing.assert_close(fitted[1][name], tensor, rtol=1e-9, atol=1e-11)


def test_parts_hold_no_more_than_the_limit_and_add_up(parts):
    model, dense, given = double_net(seed=1), double_net(), examples(7)
    loss = loss_of(model, dense)
    wanted = sum(float(loss(example).detach()) for example in given)
    held = 9 * 9 * 8 * 8  # bytes of one map, of which a backward pass needs more than one, and fewer than ten
    for limit in (held, 20 * held, PLENTY):
        sums = [float(part.detach()) for part in Together(loss, limit)(given)]
        assert sum(sums) == pytest.approx(wanted, rel=1e-12)
    assert parts == [2, 6, 2, 7]  # each but the first limit tries two; the seventh is alone at the second


def test_examples_of_other_shapes_are_not_put_together(parts):
    model, dense = double_net(seed=1), double_net()
    given = [*examples(3), *examples(2, size=7), *examples(1, size=8)]
    loss = loss_of(model, dense)
    sums = [float(part.detach()) for part in Together(loss, PLENTY)(given)]
    assert parts == [2, 3, 2, 2]
    assert sums == pytest.approx([sum(float(loss(e).detach()) for e in group) for group in (given[:3], given[3:5], given[5:])])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum() if x.sum() > 0 else x.square().sum(),  # a value decides
        lambda x: torch.from_numpy(np.sin(x.detach().numpy())).sum() * x.sum(),  # outside torch
        lambda x: x.sum() * torch.rand(()),  # something else each time
    ],
)
def test_what_cannot_be_computed_for_several_is_computed_for_one_after_another(function):
    torch.manual_seed(0)
    given = [(torch.randn(3, requires_grad=True) * 1.0,) for _ in range(4)]
    seen = []

    def loss(example):
        seen.append(example[0].shape)
        return function(*example)

    assert len(list(Together(loss, PLENTY)(given))) == 4


def shuffling_detector():
    """A detector for single images whose channels are shuffled by fixed shapes, as exporters write it."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "stem"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["a"], ["b"]),
        node("MaxPool", ["b"], ["m"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Reshape", ["m", "pairs"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[1, 0, 2]),
        node("Reshape", ["t", "halves"], ["s"]),
        node("Gather", ["s", "zero"], ["left"], axis=0),
        node("Gather", ["s", "one"], ["right"], axis=0),
        node("Conv", ["right", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["d"]),
        node("Concat", ["left", "d"], ["e"], axis=1),
        node("Conv", ["e", "w2", "b2"], ["f"], pads=[0, 0, 1, 1]),
        node("Relu", ["f"], ["g"]),
        node("Conv", ["g", "u"], ["h"]),
        node("Sigmoid", ["h"], ["p"]),
        node("Conv", ["g", "v"], ["k"]),
        node("Concat", ["p", "k"], ["y"], axis=1),
    ]
    shapes = {"stem": (16, 3, 3, 3), "w1": (8, 8, 3, 3), "b1": (8,), "w2": (16, 16, 2, 2), "b2": (16,)}
    model = graph_of(nodes, {**shapes, "u": (1, 16, 1, 1), "v": (4, 16, 1, 1)})
    for name, values in (("pairs", [8, 2, 16]), ("halves", [2, -1, 8, 4, 4]), ("zero", 0), ("one", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 3, 16, 16), strict=False):
        dim.dim_value = size
    return model


def test_a_graph_for_one_image_is_fitted_to_several_at_once(parts, monkeypatch):
    model, rows = shuffling_detector(), rows_of(shuffling_detector(), ["w1", "w2"])
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1, 3, 16, 16, generator=generator) for _ in range(12)]
    recipe = Recipe(model_steps=4, block_steps=4)
    together = prune_onnx(model, batches, rows, recipe)
    assert max(parts) == 16  # of a block; of the whole half as many
    assert parts.count(8) == 8
    again = prune_onnx(model, batches, rows, recipe)
    assert all(torch.equal(again[name], tensor) for name, tensor in together.items())
    monkeypatch.setattr(onnx_driver, "_AT_ONCE", 0)
    for name, tensor in prune_onnx(model, batches, rows, recipe).items():
        assert (together[name] - tensor).norm() < 1e-2 * tensor.norm(), name  # Adam makes steps of rounding, where that is all


def test_the_operators_of_such_a_graph_are_torchs_own():
    module = GraphModule(shuffling_detector())
    module(torch.randn(1, 3, 16, 16))
    operators = [step.operator for part in module.parts for step in part.steps if step.operator]
    assert {operator.node.op_type for operator in operators} > {"MaxPool", "Gather", "Reshape"}
    assert all(operator.native for operator in operators)
