from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, layouts, naive_mask, patterns, random_weight

from nmconvert.masks import _ranks, as_integers, keep_largest, magnitude, magnitude_mask, magnitude_order, nm_mask
from nmconvert.matrix import Kind, MatrixView
from nmconvert.pattern import Axis, Pattern
from nmconvert.runtime import kernels
from nmconvert.runtime.locate import LIBRARY_VARIABLE
from nmconvert.runtime.magnitude import keep_largest as native_keep_largest


@given(patterns(), st.integers(1, 9), st.integers(1, 100), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**32))
def test_equals_the_naive_reference(
    pattern: Pattern, rows: int, columns: int, dtype: torch.dtype, ties: bool, seed: int
) -> None:
    scores = magnitude(random_weight((rows, columns), seed, dtype, ties=ties))
    mask = nm_mask(scores, pattern)
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), naive_mask(scores.double().numpy(), pattern))


@given(patterns(), st.integers(1, 9), st.integers(1, 100), st.integers(0, 2**32))
def test_keeps_exactly_n_and_the_largest(pattern: Pattern, rows: int, columns: int, seed: int) -> None:
    scores = magnitude(random_weight((rows, columns), seed))
    mask = nm_mask(scores, pattern)
    for start in range(0, columns, pattern.m):
        kept, group = mask[:, start : start + pattern.m], scores[:, start : start + pattern.m]
        assert (kept.sum(1) == min(pattern.n, group.shape[1])).all()
        least_kept = group.masked_fill(~kept, torch.inf).amin(1)
        most_dropped = group.masked_fill(kept, -1).amax(1)
        assert (least_kept >= most_dropped).all()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (1, 16), (2, 16), (32, 32)])
def test_is_the_reference_formula_along_the_flattened_filter(n: int, m: int) -> None:
    """NM-sparsity's: argsort of |w| over reshape(-1, M), the first M - N of each group become zero."""
    weight = random_weight((8, 32, 3, 3), seed=m)
    group = weight.abs().reshape(-1, m)
    expected = torch.ones(group.shape).scatter_(1, group.argsort(1)[:, : m - n], 0).reshape(weight.shape)
    assert torch.equal(nm_mask(weight.abs().reshape(8, -1), Pattern(n, m)).reshape(weight.shape).float(), expected)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (1, 16), (2, 16), (32, 32)])
def test_is_the_reference_formula_along_the_input_channels(n: int, m: int) -> None:
    """NM-sparsity's for convolutions: the same over permute(0, 2, 3, 1).reshape(-1, M)."""
    weight = random_weight((8, 32, 3, 3), seed=m)
    group = weight.abs().permute(0, 2, 3, 1).reshape(-1, m)
    expected = torch.ones(group.shape).scatter_(1, group.argsort(1)[:, : m - n], 0).reshape(8, 3, 3, 32).permute(0, 3, 1, 2)
    mask = nm_mask(weight.abs().permute(0, 2, 3, 1).reshape(8, -1), Pattern(n, m)).reshape(8, 3, 3, 32).permute(0, 3, 1, 2)
    assert torch.equal(mask.float(), expected)


def test_ties_go_to_the_lower_index() -> None:
    assert nm_mask(torch.tensor([[1.0, 1, 1, 1, 0, 1, 1, 2]]), Pattern(2, 4)).int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 1]]
    assert nm_mask(torch.zeros(1, 6), Pattern(1, 4)).int().tolist() == [[1, 0, 0, 0, 1, 0]]


def test_large_matrices_are_done_in_chunks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = magnitude(random_weight((50, 96), seed=1, ties=True))
    whole = nm_mask(scores, Pattern(3, 8))
    monkeypatch.setattr("nmconvert.masks._CHUNK", 100)
    assert torch.equal(nm_mask(scores, Pattern(3, 8)), whole)


@given(layouts(), st.sampled_from(["channel", "kernel"]), patterns(), st.sampled_from(DTYPES), st.integers(0, 2**32), st.data())
def test_a_mask_in_any_memory_layout(
    layout: tuple[Kind, tuple[int, ...], int], axis: Axis, pattern: Pattern, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    """In place where groups are evenly spaced, moved where not, the mask is that of the matrix, and lies as the weight does."""
    kind, shape, groups = layout
    view = MatrixView.of(kind, shape, axis, groups)
    order = data.draw(st.permutations(range(len(shape))))
    weight = random_weight(shape, seed, dtype, ties=True)
    weight = weight.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
    if data.draw(st.booleans()):
        weight = torch.cat([weight, weight], -1)[..., : shape[-1]]  # with gaps in memory
    mask = magnitude_mask(weight, view, pattern)
    assert torch.equal(mask, view.from_matrix(nm_mask(magnitude(view.to_matrix(weight)), pattern)))
    assert mask.stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (1, 16)])
def test_convolutions_are_masked_in_place_as_the_reference_masks_them(
    n: int, m: int, memory_format: torch.memory_format
) -> None:
    """NM-sparsity's argsort over the input channels, on enough weights for several chunks; no weight moves."""
    weight = random_weight((160, 96, 3, 3), seed=m).contiguous(memory_format=memory_format)
    view = MatrixView.of("conv", weight.shape, "channel")
    assert view.group_spacing(weight.stride(), m) == (9 if memory_format == torch.contiguous_format else 1)
    group = weight.abs().permute(0, 2, 3, 1).reshape(-1, m)
    expected = torch.ones(group.shape).scatter_(1, group.argsort(1)[:, : m - n], 0).reshape(160, 3, 3, 96).permute(0, 3, 1, 2)
    assert torch.equal(magnitude_mask(weight, view, Pattern(n, m)).float(), expected)


@given(patterns(dense=False), st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**32))
def test_accelerators_rank_alike(pattern: Pattern, blocks: int, spacing: int, seed: int) -> None:
    """What runs on a GPU, run here."""
    scores = magnitude_order(random_weight((blocks, pattern.m, spacing), seed, ties=True))
    matrix = scores.movedim(1, -1).reshape(-1, pattern.m)
    expected = nm_mask(matrix, pattern).view(blocks, spacing, pattern.m).movedim(-1, 1)
    assert torch.equal(_ranks(scores) < pattern.n, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_scores_and_both_zeros(dtype: torch.dtype) -> None:
    scores = torch.tensor([[-1.0, -0.0, 0.0, -2.0], [-3.0, -1.0, 2.0, -0.0], [0.0, -0.0, 0.0, -0.0]], dtype=dtype)
    assert nm_mask(scores, Pattern(2, 4)).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]


@given(st.integers(0, 2**32), st.sampled_from(DTYPES))
def test_the_order_of_magnitudes_as_integers(seed: int, dtype: torch.dtype) -> None:
    weight = random_weight((8, 32), seed, dtype, ties=True)
    order = magnitude_order(weight)
    assert torch.equal(nm_mask(order, Pattern(2, 4)), nm_mask(magnitude(weight), Pattern(2, 4)))
    assert torch.equal(order.flatten().argsort(stable=True), weight.abs().double().flatten().argsort(stable=True))
    limit = as_integers(torch.tensor(torch.inf, dtype=dtype))
    assert (order < limit).all()
    assert (magnitude_order(torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)) >= limit).all()


@pytest.fixture(scope="module", params=["native", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The two ways of keep_largest, of which the first is there where a compiler was."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv(LIBRARY_VARIABLE, "off")
        elif native_keep_largest() is None:
            pytest.skip(f"no native kernels: {kernels().reason}")
        yield request.param


@given(st.integers(0, 2**32), patterns(), st.integers(1, 300), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans())
def test_in_place_it_keeps_the_largest(
    way: str, seed: int, pattern: Pattern, rows: int, columns: int, dtype: torch.dtype, ties: bool
) -> None:
    weight = random_weight((rows, columns), seed, dtype, ties=ties)
    pruned = weight.clone()
    before, after = keep_largest(pruned, pattern)
    expected = torch.where(nm_mask(magnitude(weight), pattern), weight, 0)
    assert torch.equal(as_integers(pruned), as_integers(expected))  # kept zeros have their signs
    assert before == pytest.approx(float(weight.double().square().sum()), rel=1e-9)
    assert after == pytest.approx(float(expected.double().square().sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_and_largest_numbers(way: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    subnormal, tiny, huge = info.smallest_normal * 2.0**-5, info.smallest_normal, info.max
    weight = torch.tensor([[subnormal, -tiny, -0.0, 0.0, huge, -huge, tiny, subnormal]], dtype=dtype)
    before, after = keep_largest(weight, Pattern(1, 4))
    expected = torch.tensor([[0, -tiny, 0, 0, huge, 0, 0, 0]], dtype=dtype)
    assert torch.equal(as_integers(weight), as_integers(expected))
    if dtype != torch.float64:  # whose squares overflow
        assert (before, after) == pytest.approx((2 * huge**2, huge**2), rel=1e-9)
    small = torch.tensor([[subnormal, -2 * subnormal]], dtype=dtype)
    assert keep_largest(small, Pattern(1, 2)) == pytest.approx((5 * subnormal**2, 4 * subnormal**2), rel=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (99, 8), (50, 4)])
def test_what_is_not_finite_is_noticed(way: str, bad: float, dtype: torch.dtype, place: tuple[int, int]) -> None:
    weight = random_weight((100, 9), 0, dtype)
    assert all(map(math.isfinite, keep_largest(weight.clone(), Pattern(2, 4))))
    weight[place] = bad
    assert all(map(math.isnan, keep_largest(weight, Pattern(2, 4))))
