from __future__ import annotations

from itertools import permutations
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts, random_weight
from torch.nn import functional as F

from nmconvert.errors import WeightError
from nmconvert.matrix import Kind, MatrixView
from nmconvert.pattern import Axis

Layout = tuple[Kind, tuple[int, ...], int]
axes = st.sampled_from(["channel", "kernel"])


@given(layouts(), axes)
def test_round_trip_in_torch_and_numpy(layout: Layout, axis: Axis) -> None:
    kind, shape, groups = layout
    view = MatrixView.of(kind, shape, axis, groups)
    weight = torch.arange(prod(shape)).reshape(shape)
    matrix = view.to_matrix(weight)
    assert matrix.shape == (view.rows, view.columns)
    assert torch.equal(view.from_matrix(matrix), weight)
    assert np.array_equal(view.to_matrix(weight.numpy()), matrix.numpy())
    assert np.array_equal(view.from_matrix(matrix.numpy()), weight.numpy())


@given(layouts(), axes, st.data())
def test_a_view_of_the_tensor_before_its_transpose(layout: Layout, axis: Axis, data: st.DataObject) -> None:
    kind, shape, groups = layout
    perm = data.draw(st.sampled_from(list(permutations(range(len(shape))))))
    view = MatrixView.of(kind, shape, axis, groups)
    weight = torch.arange(prod(shape)).reshape(shape)
    base = weight.permute([perm.index(d) for d in range(len(shape))]).contiguous()
    assert torch.equal(base.permute(perm), weight)
    before = view.before_transpose(perm)
    assert before.shape == tuple(base.shape)
    assert torch.equal(before.to_matrix(base), view.to_matrix(weight))
    assert torch.equal(before.from_matrix(view.to_matrix(weight)), base)


def test_each_row_holds_what_one_output_sees() -> None:
    """Zeroing row r of the matrix must silence output r, and nothing else: the layout is the operator's own."""
    x = random_weight((1, 6, 5), seed=0)
    cases = [
        ("conv", (4, 3, 3), 2, lambda w: F.conv1d(x, w, groups=2)),
        ("conv_transpose", (6, 2, 3), 2, lambda w: F.conv_transpose1d(x, w, groups=2)),
        ("linear", (4, 5), 1, lambda w: F.linear(x, w).transpose(1, 2)),
        ("matmul", (5, 4), 1, lambda w: (x @ w).transpose(1, 2)),
    ]
    for kind, shape, groups, apply in cases:
        for axis in ("channel", "kernel"):
            view = MatrixView.of(kind, shape, axis, groups)
            for row in range(view.rows):
                matrix = torch.ones(view.rows, view.columns)
                matrix[row] = 0
                output = apply(view.from_matrix(matrix))
                silent = [bool((output[:, channel] == 0).all()) for channel in range(output.shape[1])]
                assert silent == [channel == row for channel in range(view.rows)], (kind, axis, row)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [("channel", [[0, 2, 4, 6, 1, 3, 5, 7]]), ("kernel", [[0, 1, 2, 3, 4, 5, 6, 7]])],
)
def test_the_order_of_a_convolutions_columns(axis: Axis, expected: list[list[int]]) -> None:
    weight = torch.arange(8).reshape(1, 4, 2)  # four input channels at two positions
    assert MatrixView.of("conv", (1, 4, 2), axis).to_matrix(weight).tolist() == expected


@pytest.mark.parametrize(
    ("kind", "shape", "groups"), [("conv", (4, 4), 1), ("linear", (4,), 1), ("conv_transpose", (5, 2, 3), 2)]
)
def test_a_shape_that_does_not_fit_its_kind(kind: Kind, shape: tuple[int, ...], groups: int) -> None:
    with pytest.raises(WeightError, match=kind):
        MatrixView.of(kind, shape, "channel", groups)
