from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_models import conv_net, model_of, random_input, value

from nmconvert.errors import ModelError
from nmconvert.matrix import Kind
from nmconvert.onnx_graph import graphs, opset, sort_nodes, tensor_infos, used_names
from nmconvert.tensor import TensorInfo

make = helper.make_node
W = random_input((8, 16))


def info(model: ModelProto, name: str = "W") -> TensorInfo:
    return next(found for found in tensor_infos(model) if found.name == name)


@pytest.mark.parametrize(
    ("node", "shape", "kind", "groups"),
    [
        (make("Conv", ["X", "W"], ["Y"]), (8, 4, 3), "conv", 1),
        (make("Conv", ["X", "W"], ["Y"], group=2), (8, 4, 3), "conv", 2),
        (make("ConvTranspose", ["X", "W"], ["Y"], group=2), (8, 4, 3), "conv_transpose", 2),
        (make("MatMul", ["X", "W"], ["Y"]), (8, 4), "matmul", 1),
        (make("MatMul", ["W", "X"], ["Y"]), (8, 4), "linear", 1),
        (make("Gemm", ["X", "W"], ["Y"]), (8, 4), "matmul", 1),
        (make("Gemm", ["X", "W"], ["Y"], transB=1), (8, 4), "linear", 1),
        (make("Gemm", ["W", "X"], ["Y"]), (8, 4), "linear", 1),
        (make("Gemm", ["W", "X"], ["Y"], transA=1), (8, 4), "matmul", 1),
    ],
)
def test_kinds(node: NodeProto, shape: tuple[int, ...], kind: Kind, groups: int) -> None:
    found = info(model_of([node], {"W": random_input(shape)}, ["n", 4, 4]))
    assert (found.kind, found.groups, found.shape, found.reason, found.transposed) == (kind, groups, shape, None, None)


@pytest.mark.parametrize("groups", [0, 3, -2])
def test_what_is_no_weight_of_a_convolution(groups: int) -> None:
    found = info(model_of([make("Conv", ["X", "W"], ["Y"], group=groups)], {"W": random_input((8, 4, 3))}, ["n", 8, 4]))
    assert (found.kind, found.reason) == (None, f"no convolution: of shape [8, 4, 3] in {groups} groups")
    found = info(model_of([make("Conv", ["X", "W"], ["Y"])], {"W": random_input((8, 4))}, ["n", 8]))
    assert (found.kind, found.reason) == (None, "no convolution: of shape [8, 4] in 1 groups")


@pytest.mark.parametrize("groups", [2.0, "two"])
def test_an_attribute_that_is_no_number(groups: Any) -> None:
    model = model_of([make("Conv", ["X", "W"], ["Y"], group=groups)], {"W": random_input((8, 4, 3))}, ["n", 8, 4])
    with pytest.raises(ModelError, match=r"Conv 'Y': group is (2\.0|b'two'), and no whole number"):
        tensor_infos(model)


def test_nodes_are_put_behind_what_they_read() -> None:
    then = branch("then", "late", {})  # reads a value of the graph around it
    nodes = if_model(then, branch("else", "late", {}), {"W": W}).graph.node
    late = make("Identity", ["W"], ["late"])
    model = model_of([*reversed(nodes), late], {"zero": np.zeros((), np.float32), "W": W}, [4, 8])
    sort_nodes(model.graph)
    order = [node.op_type for node in model.graph.node]
    assert sorted(order) == ["Greater", "Identity", "If", "ReduceSum"]
    assert order.index("ReduceSum") < order.index("Greater") < order.index("If")
    assert order.index("Identity") < order.index("If")
    again = list(model.graph.node)
    sort_nodes(model.graph)
    assert list(model.graph.node) == again
    circle = model_of([make("Relu", ["b"], ["a"]), make("Relu", ["a"], ["b"])], {}, [4], outputs=("b",))
    sort_nodes(circle.graph)
    assert [node.input[0] for node in circle.graph.node] == ["b", "a"]


def constant(name: str, array: Any) -> NodeProto:
    return make("Constant", [], [name], value=numpy_helper.from_array(array))


BEHIND = {
    "Identity": ([make("Identity", ["W"], ["w"])], None),
    "Transpose": ([make("Transpose", ["W"], ["w"], perm=[1, 0])], (1, 0)),
    "Transpose without perm": ([make("Transpose", ["W"], ["w"])], (1, 0)),
    "two Transposes": ([make("Transpose", ["W"], ["v"]), make("Transpose", ["v"], ["w"])], (0, 1)),
    "Cast": ([make("Cast", ["W"], ["w"], to=TensorProto.FLOAT)], None),
    "all": (
        [make("Identity", ["W"], ["u"]), make("Transpose", ["u"], ["v"]), make("Cast", ["v"], ["w"], to=TensorProto.FLOAT)],
        (1, 0),
    ),
}


@pytest.mark.parametrize("way", BEHIND)
@pytest.mark.parametrize("as_node", [False, True])
def test_constants_behind_other_nodes(way: str, as_node: bool) -> None:
    nodes, transposed = BEHIND[way]
    own = [constant("W", W)] if as_node else []
    found = info(model_of([*own, *nodes, make("MatMul", ["X", "w"], ["Y"])], {} if as_node else {"W": W}, ["n", "k"]))
    assert (found.kind, found.transposed, found.reason) == ("matmul", transposed, None)
    view = found.view("channel")
    assert (view.rows, view.columns) == ((8, 16) if transposed == (1, 0) else (16, 8))


@pytest.mark.parametrize("op_type", ["Reshape", "Unsqueeze"])
def test_what_cannot_be_followed_is_left_with_its_reason(op_type: str) -> None:
    shape = np.array([16, 8] if op_type == "Reshape" else [0], np.int64)
    nodes = [make(op_type, ["W", "shape"], ["w"]), make("MatMul", ["X", "w"], ["Y"])]
    assert info(model_of(nodes, {"W": W, "shape": shape}, ["n", "k"])).reason == f"float behind {op_type}: left as it is"


def test_what_is_transposed_after_a_reshape_has_other_dimensions() -> None:
    """As the tables of relative positions in Swin: two dimensions in the file, three by the time they are transposed."""
    nodes = [
        make("Reshape", ["W", "shape"], ["cube"]),
        make("Transpose", ["cube"], ["w"], perm=[2, 0, 1]),
        make("MatMul", ["X", "w"], ["Y"]),
    ]
    shape = np.array([4, 4, 8], np.int64)
    assert info(model_of(nodes, {"W": W, "shape": shape}, ["n", "k"])).reason == "float behind Reshape: left as it is"


def test_a_transpose_of_dimensions_that_are_not_there_is_left() -> None:
    nodes = [make("Transpose", ["W"], ["w"], perm=[1, 7]), make("MatMul", ["X", "w"], ["Y"])]
    assert info(model_of(nodes, {"W": W}, ["n", "k"])).reason == "float behind Transpose: left as it is"


def test_two_casts_are_not_followed() -> None:
    """The first one may have rounded, so the constant is not the weight."""
    nodes = [
        make("Cast", ["W"], ["h"], to=TensorProto.FLOAT16),
        make("Cast", ["h"], ["w"], to=TensorProto.FLOAT),
        make("MatMul", ["X", "w"], ["Y"]),
    ]
    assert info(model_of(nodes, {"W": W}, ["n", "k"])).reason == "float behind Cast: left as it is"


def test_int8_behind_dequantize_linear() -> None:
    nodes = [make("DequantizeLinear", ["W", "scale"], ["w"]), make("MatMul", ["X", "w"], ["Y"])]
    found = info(model_of(nodes, {"W": W.astype(np.int8), "scale": np.float32([0.1]).reshape(())}, ["n", "k"]))
    assert found.dtype == "int8"
    assert found.reason == "int8 behind DequantizeLinear: left as it is"


def test_shared_by_operators_of_one_layout_is_one_weight() -> None:
    nodes = [make("MatMul", ["X", "W"], ["a"]), make("Relu", ["X"], ["b"]), make("MatMul", ["b", "W"], ["Y"])]
    assert info(model_of(nodes, {"W": W}, ["n", 8])).reason is None


def test_shared_by_operators_of_other_layouts() -> None:
    nodes = [make("MatMul", ["X", "W"], ["a"]), make("Gemm", ["a", "W"], ["Y"], transB=1)]
    assert info(model_of(nodes, {"W": W}, ["n", 8])).reason == "shared by operators that would group it differently"


def test_tied_to_a_gather() -> None:
    nodes = [
        make("Gather", ["W", "ids"], ["a"]),
        make("Add", ["a", "X"], ["b"]),
        make("Transpose", ["W"], ["w"]),
        make("MatMul", ["b", "w"], ["Y"]),
    ]
    found = info(model_of(nodes, {"W": W, "ids": np.array([1, 2], np.int64)}, ["n", 16]))
    assert found.reason == "tied: also used by Gather"


def test_other_constants_say_who_uses_them() -> None:
    nodes = [make("Add", ["X", "W"], ["Y"])]
    found = {i.name: i.reason for i in tensor_infos(model_of(nodes, {"W": W, "unused": W, "b": W[0]}, ["n", 16]))}
    assert found == {"W": "used by Add: not a weight", "unused": "not used by any operator", "b": None}


def test_products_of_activations_or_of_constants_only() -> None:
    nodes = [make("MatMul", ["W", "V"], ["a"]), make("MatMul", ["X", "a"], ["Y"])]
    found = {i.name: i.kind for i in tensor_infos(model_of(nodes, {"W": W, "V": W.T.copy()}, ["n", "k"]))}
    assert found == {"W": None, "V": None}


def branch(name: str, weight: str, constants: dict[str, Any]) -> GraphProto:
    nodes = [make("MatMul", ["X", weight], [f"{name}.out"])]
    initializers = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    return helper.make_graph(nodes, name, [], [value(f"{name}.out", [None, None])], initializers)


def if_model(then: GraphProto, other: GraphProto, constants: dict[str, Any]) -> ModelProto:
    nodes = [
        make("ReduceSum", ["X"], ["sum"], keepdims=0),
        make("Greater", ["sum", "zero"], ["positive"]),
        make("If", ["positive"], ["Y"], then_branch=then, else_branch=other),
    ]
    return model_of(nodes, {"zero": np.zeros((), np.float32), **constants}, [4, 8])


def test_bodies_see_their_own_constants_and_those_around_them() -> None:
    model = if_model(branch("then", "W", {}), branch("else", "own", {"own": W}), {"W": W})
    found = {i.name: (i.kind, i.reason) for i in tensor_infos(model) if len(i.shape) > 1}
    assert found == {"W": ("matmul", None), "own": ("matmul", None)}


def test_one_name_for_two_constants() -> None:
    """Branches of an If may use the same name for different tensors; which one is meant cannot be said by name."""
    model = if_model(branch("then", "w", {"w": W}), branch("else", "w", {"w": W * 2}), {})
    assert info(model, "w").reason == "its name is not unique in the model"


def test_what_a_body_names_hides_what_is_around_it() -> None:
    """Its inputs and values are not the constants that have the same names outside."""
    for hiding in ("input", "value"):
        inner = make("MatMul", ["s", "W"], ["r"])
        first = [] if hiding == "input" else [make("Relu", ["s"], ["W"])]
        inputs = [value("W" if hiding == "input" else "s", [8, 8])]
        body = helper.make_graph([*first, inner], "body", inputs, [value("r", [8, 8])])
        node = make("Scan", ["X"], ["Y"], body=body, num_scan_inputs=1)
        model = model_of([node], {"W": np.ones((8, 8), np.float32)}, [4, 8, 8])
        (_, outer), (_, scope) = graphs(model)
        assert "W" in outer.tensors
        assert "W" not in scope.tensors
        assert scope.trace("W") is None


def test_loop_body() -> None:
    body = helper.make_graph(
        [make("MatMul", ["state", "inner"], ["next"]), make("Identity", ["go"], ["go_on"])],
        "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("state", [None, None])],
        [value("go_on", [], TensorProto.BOOL), value("next", [None, None])],
        [numpy_helper.from_array(random_input((8, 8)), "inner")],
    )
    nodes = [make("Loop", ["trips", "", "X"], ["Y"], body=body)]
    assert info(model_of(nodes, {"trips": np.array(3, np.int64)}, [4, 8]), "inner").kind == "matmul"


def test_the_output_layer() -> None:
    found = {i.name: i.output for i in tensor_infos(conv_net()) if i.kind}
    assert found == {"first.weight": False, "second.weight": False, "head.weight": True}
    two_heads = [make("MatMul", ["X", "W"], ["Y"]), make("MatMul", ["X", "V"], ["Z"])]
    assert not any(i.output for i in tensor_infos(model_of(two_heads, {"W": W, "V": W}, ["n", 8], outputs=["Y", "Z"])))


def test_types_that_are_left_as_they_are() -> None:
    model = model_of([make("MatMul", ["X", "W"], ["Y"])], {"W": W}, ["n", 8])
    strings = helper.make_tensor("s", TensorProto.STRING, [1, 2], [b"a", b"b"])
    model.graph.initializer.append(strings)
    assert info(model, "s").reason == "string: left as it is"


def test_counts_and_versions() -> None:
    model = conv_net(opset=17)
    assert opset(model) == 17
    assert used_names(model)["e"] == 1
    assert used_names(model)["Y"] == 1  # as the output


def test_an_element_type_of_a_newer_onnx() -> None:
    model = model_of([make("MatMul", ["X", "W"], ["Y"])], {"W": W}, ["n", 8])
    model.graph.initializer[0].data_type = 99
    assert info(model).reason == "element type 99: left as it is"
