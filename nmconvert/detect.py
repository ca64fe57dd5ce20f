"""What pattern a weight satisfies, found from its zeros alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nmconvert.arrays import Array
from nmconvert.pattern import MAX_M, Pattern


def most_in_a_group(nonzero: npt.NDArray[np.bool_], m: int) -> int:
    """The largest number of nonzeros in any group of ``m`` of ``nonzero`` [rows, K], the short last groups included."""
    columns = nonzero.shape[1]
    whole = columns - columns % m
    most = 0
    for part in (nonzero[:, :whole].reshape(-1, m) if whole else None, nonzero[:, whole:] if whole < columns else None):
        if part is not None and part.size:
            most = max(most, int(part.sum(axis=1, dtype=np.uint8).max()))
    return most


def satisfies(matrix: Array, pattern: Pattern) -> bool:
    """Whether no group of ``matrix`` [rows, K] has more than n nonzeros."""
    return most_in_a_group(matrix != 0, pattern.m) <= pattern.n


def tightest(matrix: Array) -> Pattern | None:
    """The sparsest N:M that ``matrix`` [rows, K] satisfies, the smallest m of equals; None where it is dense for every m."""
    nonzero = np.ascontiguousarray(matrix != 0)
    if nonzero.size == 0 or nonzero.mean() > (MAX_M - 1) / MAX_M:
        return None
    best: Pattern | None = None
    for m in range(2, min(MAX_M, matrix.shape[1]) + 1):
        found = Pattern(max(1, most_in_a_group(nonzero, m)), m)
        if not found.is_dense and (best is None or found.density < best.density):
            best = found
    return best
