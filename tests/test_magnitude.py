"""Pruning in place by magnitude: the native pass and NumPy's, against masks and sums in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, patterns, random_weight
from torch import Tensor

from nmconvert.arrays import as_array
from nmconvert.magnitude import as_integers, has_negative_zero, keep_largest
from nmconvert.masks import magnitude, nm_mask
from nmconvert.pattern import Pattern


def bits(weight: Tensor) -> Tensor:
    return torch.from_numpy(as_integers(as_array(weight)))


def keep(weight: Tensor, pattern: Pattern) -> tuple[float, float]:
    """keep_largest on the memory of ``weight``."""
    return keep_largest(as_array(weight), pattern)


@given(st.integers(0, 2**32), patterns(), st.integers(1, 300), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans())
def test_in_place_it_keeps_the_largest(
    way: str, seed: int, pattern: Pattern, rows: int, columns: int, dtype: torch.dtype, ties: bool
) -> None:
    weight = random_weight((rows, columns), seed, dtype, ties=ties)
    pruned = weight.clone()
    before, after = keep(pruned, pattern)
    expected = torch.where(nm_mask(magnitude(weight), pattern), weight, 0)
    assert torch.equal(bits(pruned), bits(expected))  # kept zeros have their signs
    assert before == pytest.approx(float(weight.double().square().sum()), rel=1e-9)
    assert after == pytest.approx(float(expected.double().square().sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_and_largest_numbers(way: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    subnormal, tiny, huge = info.smallest_normal * 2.0**-5, info.smallest_normal, info.max
    weight = torch.tensor([[subnormal, -tiny, -0.0, 0.0, huge, -huge, tiny, subnormal]], dtype=dtype)
    before, after = keep(weight, Pattern(1, 4))
    expected = torch.tensor([[0, -tiny, 0, 0, huge, 0, 0, 0]], dtype=dtype)
    assert torch.equal(bits(weight), bits(expected))
    if dtype != torch.float64:  # whose squares overflow
        assert (before, after) == pytest.approx((2 * huge**2, huge**2), rel=1e-9)
    small = torch.tensor([[subnormal, -2 * subnormal]], dtype=dtype)
    assert keep(small, Pattern(1, 2)) == pytest.approx((5 * subnormal**2, 4 * subnormal**2), rel=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (99, 8), (50, 4)])
def test_what_is_not_finite_is_noticed(way: str, bad: float, dtype: torch.dtype, place: tuple[int, int]) -> None:
    weight = random_weight((100, 9), 0, dtype)
    assert all(map(math.isfinite, keep(weight.clone(), Pattern(2, 4))))
    weight[place] = bad
    assert all(map(math.isnan, keep(weight, Pattern(2, 4))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zeros_are_noticed(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, -1.0, 2.0, torch.finfo(dtype).min]], dtype=dtype)
    assert not has_negative_zero(as_array(weight))
    weight[0, 0] = -0.0
    assert has_negative_zero(as_array(weight))
    assert not has_negative_zero(as_array(weight[:0]))
