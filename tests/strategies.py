"""Random patterns, weights and layouts for hypothesis, and the naive reference that they are held against."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor

from nmconvert.matrix import Kind
from nmconvert.pattern import MAX_M, Pattern

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ARRAY_TYPES: tuple[Any, ...] = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)


@st.composite
def patterns(draw: st.DrawFn, *, dense: bool = True) -> Pattern:
    """Any 1 ≤ n ≤ m ≤ 32; n < m unless ``dense``."""
    m = draw(st.integers(1 if dense else 2, MAX_M))
    return Pattern(draw(st.integers(1, m if dense else m - 1)), m)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Kind, tuple[int, ...], int]:
    """A kind of layer, the shape of its weight, and its groups."""
    kind: Kind = draw(st.sampled_from(["conv", "conv_transpose", "linear", "matmul"]))
    if kind.startswith("conv"):
        groups = draw(st.sampled_from([1, 1, 2, 3]))
        kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        first, second = draw(st.integers(1, 6)), draw(st.integers(1, 9))
        return kind, (groups * first, second, *kernel), groups
    return kind, tuple(draw(st.lists(st.integers(1, 12), min_size=2, max_size=3))), 1


def random_weight(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, *, ties: bool = False) -> Tensor:
    """Normal values; with ``ties``, few distinct ones, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((weight * 2).round() / 2 if ties else weight).to(dtype)


def naive_mask(scores: npt.NDArray[Any], pattern: Pattern) -> npt.NDArray[np.bool_]:
    """The mask of ``scores`` [rows, K] in plain Python: sort each group by score, lower index first among equals."""
    mask = np.zeros(scores.shape, np.bool_)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], pattern.m):
            group = range(start, min(start + pattern.m, scores.shape[1]))
            for column in sorted(group, key=lambda k: (-scores[row, k], k))[: pattern.n]:
                mask[row, column] = True
    return mask


def sparse_matrix(rows: int, columns: int, pattern: Pattern, seed: int, dtype: Any = np.float32) -> npt.NDArray[Any]:
    """A matrix that satisfies ``pattern``; some kept weights are zero as well."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns))
    matrix[rng.random(matrix.shape) < 0.1] = 0
    result: npt.NDArray[Any] = np.where(naive_mask(np.abs(matrix), pattern), matrix, 0).astype(dtype)
    return result
