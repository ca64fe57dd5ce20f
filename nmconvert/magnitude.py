"""Pruning one matrix by magnitude, in place: the plainest way there is, which needs no torch."""

from __future__ import annotations

import math

import numpy as np

from nmconvert.arrays import Array
from nmconvert.pattern import Pattern
from nmconvert.runtime import magnitude as native_magnitude


def keep_largest(matrix: Array, pattern: Pattern) -> tuple[float, float]:
    """Prune contiguous floating ``matrix`` [rows, K], in place, to the mask of its magnitudes.

    Returns the sums of squares before and after, in double precision; NaN where a weight is NaN or infinite, and what is in
    the matrix is then of no use. The native library does it in one pass where it is there, with the same result.
    """
    native = native_magnitude.keep_largest()
    if native is not None:
        rows, columns = matrix.shape
        return native(matrix.ctypes.data, rows, columns, pattern, matrix.dtype.name) or (math.nan, math.nan)
    order = _order(matrix)
    if order.size and order.max() >= as_integers(np.array(math.inf, matrix.dtype)):
        return math.nan, math.nan
    before = _sum_of_squares(matrix)
    as_integers(matrix)[...] *= _mask(order, pattern)
    return before, _sum_of_squares(matrix)


def as_integers(weight: Array) -> Array:
    """The bits of floating ``weight``, sharing its memory; zero is positive zero."""
    return weight.view(f"i{weight.dtype.itemsize}")


def has_negative_zero(weight: Array) -> bool:
    """Whether an entry is −0, whose bits are the lowest of all integers."""
    bits = as_integers(weight)
    return bits.size > 0 and bool(bits.min() == np.iinfo(bits.dtype).min)


def _order(weight: Array) -> Array:
    """:func:`nmconvert.masks.magnitude_order` of a NumPy array."""
    bits = as_integers(weight)
    order: Array = bits & np.iinfo(bits.dtype).max
    return order


def _mask(order: Array, pattern: Pattern) -> Array:
    import torch

    from nmconvert.masks import nm_mask

    return nm_mask(torch.from_numpy(order), pattern).numpy()


def _sum_of_squares(weight: Array) -> float:
    with np.errstate(over="ignore"):  # infinite where it is too large, as in the native library
        return float(np.square(weight.astype(np.float64)).sum())
