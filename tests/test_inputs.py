from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_models import conv_net, value

from nmconvert.errors import UsageError
from nmconvert.inputs import DTYPES, INTEGER_LIMIT, InputSpec, example_array, example_feed


@given(
    st.none() | st.sampled_from(["x", "input_ids", "a.b"]), st.lists(st.integers(1, 999), min_size=1), st.sampled_from(DTYPES)
)
def test_text_round_trip(name: str | None, shape: list[int], dtype: str) -> None:
    spec = InputSpec(name, tuple(shape), dtype)
    assert InputSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1,3,224,224", InputSpec(None, (1, 3, 224, 224))),
        ("1x3x224x224", InputSpec(None, (1, 3, 224, 224))),
        (" ids = 1 , 16 : int64 ", InputSpec("ids", (1, 16), "int64")),
        ("5", InputSpec(None, (5,))),
    ],
)
def test_forms(text: str, spec: InputSpec) -> None:
    parsed = InputSpec.parse(text)
    assert (parsed.name or "").strip() == (spec.name or "")
    assert (parsed.shape, parsed.dtype) == (spec.shape, spec.dtype)


@pytest.mark.parametrize("text", ["", "a", "1,,3", "=1,3", "1,3:", "1;3", "x=", "1,-3", "1,3:float32:int8"])
def test_what_is_no_input(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not \[NAME=\]SHAPE\[:DTYPE\], for example 1,3,224,224 or input_ids=1,16:int64"):
        InputSpec.parse(text)


def test_wrong_type_and_empty_dimension() -> None:
    with pytest.raises(UsageError, match="the type 'float31' is none of float32, float16"):
        InputSpec.parse("1,3:float31")
    with pytest.raises(UsageError, match="has a dimension of size 0"):
        InputSpec.parse("1,0")


def test_example_arrays_fit_their_type() -> None:
    rng = np.random.default_rng(0)
    integers = example_array([100], np.dtype("int64"), rng)
    assert (integers.min(), integers.max()) == (0, INTEGER_LIMIT - 1)
    assert example_array([3], np.dtype("bool"), rng).tolist() == [True, False, True]
    assert example_array([2, 2], np.dtype("bool"), rng).tolist() == [[True, False]] * 2
    assert example_array([], np.dtype("bool"), rng).tolist() is True
    assert example_array([3], np.dtype("float16"), rng).dtype == np.float16


def test_feed_for_a_model() -> None:
    model = conv_net()
    assert {name: array.shape for name, array in example_feed(model).items()} == {"X": (1, 8, 6, 6)}
    assert example_feed(model, batch=3)["X"].shape == (3, 8, 6, 6)
    assert example_feed(model, [InputSpec(None, (5, 8, 6, 6))])["X"].shape == (5, 8, 6, 6)
    assert np.array_equal(example_feed(model)["X"], example_feed(model)["X"])
    with pytest.raises(UsageError, match="2 inputs were given, the model takes 1: X"):
        example_feed(model, [InputSpec(None, (1,)), InputSpec(None, (1,))])
    with pytest.raises(UsageError, match="the model has no input 'y': it takes X"):
        example_feed(model, [InputSpec("y", (1,))])


@pytest.mark.parametrize("text", ["1,8,7,6", "1,8,6", "1,8,6,6:int64"])
def test_what_does_not_fit_the_model(text: str) -> None:
    with pytest.raises(UsageError, match=r"does not fit the model, whose input 'X' is batch,8,6,6:float32"):
        example_feed(conv_net(), [InputSpec.parse(text)])


def test_floating_types_fit_each_other_and_only_the_default_fits_integers() -> None:
    model = conv_net()
    assert example_feed(model, [InputSpec.parse("1,8,6,6:float16")])["X"].dtype == np.float32
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, [None, "n"]))
    assert example_feed(model, [InputSpec.parse("ids=1,4")])["ids"].dtype == np.int64
    for dtype in ("float16", "bfloat16", "float64"):
        with pytest.raises(UsageError, match=rf"ids=1,4:{dtype} does not fit the model, whose input 'ids' is \?,n:int64"):
            example_feed(model, [InputSpec.parse(f"ids=1,4:{dtype}")])


def test_initialisers_among_the_inputs_are_no_inputs() -> None:
    model = conv_net()
    model.graph.input.append(value("head.bias", [10]))
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, [None, "n"]))
    feed = example_feed(model)
    assert list(feed) == ["X", "ids"]
    assert feed["ids"].shape == (1, 16)


def test_open_sides_of_an_image_are_larger_than_those_that_other_inputs_share() -> None:
    def sizes(**inputs: list[str | int]) -> dict[str, tuple[int, ...]]:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()]
        graph = helper.make_graph([], "g", values, [])
        return {name: array.shape for name, array in example_feed(helper.make_model(graph)).items()}

    assert sizes(images=["b", 3, "h", "w"]) == {"images": (1, 3, 64, 64)}
    assert sizes(x=["b", "s", 8], mask=["b", 1, "s", "s"]) == {"x": (1, 16, 8), "mask": (1, 1, 16, 16)}
