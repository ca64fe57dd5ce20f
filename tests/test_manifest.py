from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts, patterns

from nmconvert.errors import CheckpointError
from nmconvert.manifest import FORMAT, Layer, Manifest
from nmconvert.pattern import AXES, Pattern
from nmconvert.tensor import PRUNABLE_DTYPES, TensorInfo

names = st.text(min_size=1, max_size=20)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    layers = []
    for name in draw(st.lists(names, max_size=4, unique=True)):
        kind, shape, groups = draw(layouts())
        transposed = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
        if transposed is not None:  # the shape is that of the stored tensor
            shape = tuple(shape[transposed.index(d)] for d in range(len(shape)))
        info = TensorInfo(name, shape, draw(st.sampled_from(PRUNABLE_DTYPES)), kind=kind, groups=groups, transposed=transposed)
        energy = draw(st.none() | st.floats(0, 1))
        layers.append(Layer(info, draw(patterns()), draw(st.sampled_from(AXES)), "0" * 64, draw(st.booleans()), energy))
    texts = st.dictionaries(names, st.text(max_size=20), max_size=3)
    return Manifest(tuple(layers), draw(texts), draw(texts), tuple(draw(st.lists(texts, max_size=2))))


@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert text.isascii()
    assert "\n" not in text
    assert Manifest.from_json(text, "a.pt") == manifest


EXAMPLE = Manifest(
    layers=(
        Layer(
            TensorInfo("conv.weight", (8, 4, 3, 3), "float32", kind="conv", transposed=(0, 1, 2, 3)),
            Pattern(2, 4),
            "channel",
            "ab" * 32,
            energy=0.9,
        ),
    ),
    dense={"fc.weight": "the output layer"},
    settings={"model": "m:f"},
    history=({"stage": "prune"},),
)


def test_a_newer_format_says_what_to_do() -> None:
    text = EXAMPLE.to_json().replace(f'"format":{FORMAT}', '"format":99')
    with pytest.raises(CheckpointError, match=r"a\.pt: its manifest has format 99, newer than 1: update nmconvert"):
        Manifest.from_json(text, "a.pt")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "{}", '{"format":"1"}', '{"format":1}', "[" * 100_000, '{"format":null}', "\x00"],
)
def test_damaged_json(text: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"a\.pt: its nmconvert manifest is damaged .*: start from the file that it was made from"
    ) as caught:
        Manifest.from_json(text, "a.pt")
    assert "\n" not in str(caught.value)


DAMAGE: dict[str, Callable[[dict[str, Any]], None]] = {
    "no layers": lambda m: m.pop("layers"),
    "layers null": lambda m: m.update(layers=None),
    "layers of numbers": lambda m: m.update(layers=[1]),
    "dense a list": lambda m: m.update(dense=["a"]),
    "settings a list": lambda m: m.update(settings=[1]),
    "settings a text": lambda m: m.update(settings="no"),
    "history a number": lambda m: m.update(history=3),
    "history of texts": lambda m: m.update(history=["ab"]),
    "kind": lambda m: m["layers"][0].update(kind="lstm"),
    "kind a list": lambda m: m["layers"][0].update(kind=["conv"]),
    "axis": lambda m: m["layers"][0].update(axis="depth"),
    "pattern": lambda m: m["layers"][0].update(pattern="4:2"),
    "pattern a number": lambda m: m["layers"][0].update(pattern=24),
    "shape empty": lambda m: m["layers"][0].update(shape=[], transposed=None),
    "shape negative": lambda m: m["layers"][0].update(shape=[8, -4, 3, 3]),
    "shape of texts": lambda m: m["layers"][0].update(shape=["a", "b"]),
    "shape null": lambda m: m["layers"][0].update(shape=None),
    "shape for its kind": lambda m: m["layers"][0].update(shape=[8, 4], transposed=None),
    "transpose": lambda m: m["layers"][0].update(transposed=[0, 0, 1, 2]),
    "transpose short": lambda m: m["layers"][0].update(transposed=[0]),
    "transpose empty": lambda m: m["layers"][0].update(transposed=[]),
    "groups": lambda m: m["layers"][0].update(kind="conv_transpose", groups=3, transposed=None),
    "no groups": lambda m: m["layers"][0].update(kind="conv_transpose", groups=0, transposed=None),
    "negative groups": lambda m: m["layers"][0].update(kind="conv_transpose", groups=-2, transposed=None),
    "infinite groups": lambda m: m["layers"][0].update(groups=float("inf")),
    "dtype": lambda m: m["layers"][0].update(dtype="int8"),
    "dtype a list": lambda m: m["layers"][0].update(dtype=[]),
    "energy": lambda m: m["layers"][0].update(energy="much"),
    "no digest": lambda m: m["layers"][0].pop("sha256"),
    "not 64 digits": lambda m: m["layers"][0].update(sha256="no"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_fields(what: str) -> None:
    content = json.loads(EXAMPLE.to_json())
    DAMAGE[what](content)
    with pytest.raises(CheckpointError, match=r"a\.pt: its nmconvert manifest is damaged") as caught:
        Manifest.from_json(json.dumps(content), "a.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        (None, None, ("m:f", {"width": "8"})),
        ("m:f", {}, ("m:f", {"width": "8"})),
        (None, {"depth": "2"}, ("m:f", {"depth": "2"})),
        ("m:g", {}, ("m:g", {})),
        ("m:g", {"depth": "2"}, ("m:g", {"depth": "2"})),
    ],
)
def test_arguments_of_before_are_those_of_the_model_of_before(
    model: str | None, arguments: dict[str, str] | None, expected: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    said = EXAMPLE.with_settings(model_arguments={"width": "8"})
    assert said.said_model(tmp_path, model, arguments) == expected


def test_a_folder_is_its_own_model_where_it_says_which(tmp_path: Path) -> None:
    assert Manifest().said_model(tmp_path, None, None) == (None, {})
    (tmp_path / "config.json").write_text("{}")
    assert Manifest().said_model(tmp_path, None, None) == (str(tmp_path), {})


def test_settings_of_before_are_those_of_the_task_of_before() -> None:
    said = EXAMPLE.with_settings(task="detection", task_settings={"size": "64", "flip": "true"})
    assert said.said_task(None, {"flip": "false"}) == ("detection", {"size": "64", "flip": "false"})
    assert said.said_task("segmentation", {}) == ("segmentation", {})
    assert EXAMPLE.said_task(None, None) == ("classification", {})


def test_one_stage_after_another() -> None:
    after = EXAMPLE.after("export", flavour="dense").with_settings(model=None, input=["1,3"])
    assert [stage["stage"] for stage in after.history] == ["prune", "export"]
    assert after.settings == {"model": "m:f", "input": ["1,3"]}
    layer = EXAMPLE.layer("conv.weight")
    assert layer is not None
    assert (layer.row.pattern, layer.row.axis, layer.view.columns) == (Pattern(2, 4), "channel", 36)
    assert EXAMPLE.layer("other") is None
