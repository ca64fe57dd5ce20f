from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, layouts, naive_mask, patterns, random_weight

from nmconvert.masks import _ranks, as_integers, magnitude, magnitude_mask, magnitude_order, nm_mask
from nmconvert.matrix import Kind, MatrixView
from nmconvert.pattern import Axis, Pattern


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
