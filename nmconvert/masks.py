"""Criteria and masks: pure functions on one matrix ``[rows, K]`` (see :mod:`nmconvert.matrix`).

A criterion gives every weight a score; :func:`nm_mask` keeps the ``n`` highest of each group of ``m``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmconvert.matrix import Array
from nmconvert.pattern import Pattern
from nmconvert.runtime import magnitude as magnitude_native

_CHUNK = 1 << 19  # entries at a time on a CPU: what one pass reads and writes stays in the L2 cache


def magnitude(weight: Tensor) -> Tensor:
    """|w|, the criterion of Zhou et al. 2021 (section 3.1): score [rows, K] of ``weight`` [rows, K]."""
    return weight.detach().abs()


def wanda(weight: Tensor, hessian: Tensor) -> Tensor:
    """|w|·‖x‖ (Sun et al. 2024, equation 1): score [rows, K] of ``weight`` [rows, K].

    ``hessian`` [K, K] is the mean of x xᵀ over the layer's inputs; only its diagonal, ‖x‖² per input, is read.
    """
    return magnitude(weight) * hessian.diagonal().clamp_min(0).sqrt()


def ria(weight: Tensor, hessian: Tensor) -> Tensor:
    """Relative importance and activations (Zhang et al. 2024, equation 4): score [rows, K] of ``weight`` [rows, K].

    (|w| / its column's sum + |w| / its row's sum) · ‖x‖^½, with ``hessian`` [K, K] as for :func:`wanda`.
    """
    size = magnitude(weight)
    tiny = torch.finfo(size.dtype).tiny
    share = size / size.sum(0, keepdim=True).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return share * hessian.diagonal().clamp_min(0).pow(0.25)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(weight: Tensor) -> Tensor:
    """The bits of floating ``weight``, sharing its memory; zero is positive zero."""
    return weight.view(_INTEGERS[weight.dtype.itemsize])


def magnitude_order(weight: Tensor) -> Tensor:
    """Integers in the order of |w|, faster to compare: the bits without the sign. What is not finite comes last."""
    bits = as_integers(weight.detach())
    return bits & torch.iinfo(bits.dtype).max


CALIBRATED_CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"wanda": wanda, "ria": ria}


def nm_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The N:M mask of ``scores`` [rows, K]: bool [rows, K], True where a weight is kept.

    The ``n`` highest of every ``m`` consecutive entries of a row are kept; the last group of a row, if shorter, keeps
    min(n, its length). Equal scores are decided for the lower index, so that the mask is the same on every machine.
    No sort: an entry's rank is the number of entries of its group that beat it, counted with m - 1 shifted comparisons.
    Scores must not be NaN.
    """
    rows, columns = scores.shape
    tail = columns % pattern.m
    if not tail:
        return _group_mask(scores.reshape(-1, pattern.m), pattern.n).reshape(rows, columns)
    whole = columns - tail
    mask = torch.empty(rows, columns, dtype=torch.bool, device=scores.device)
    mask[:, :whole] = _group_mask(scores[:, :whole].reshape(-1, pattern.m), pattern.n).reshape(rows, whole)
    mask[:, whole:] = _group_mask(scores[:, whole:], pattern.n)
    return mask


def keep_largest(matrix: Tensor, pattern: Pattern) -> tuple[float, float]:
    """Prune contiguous floating ``matrix`` [rows, K] on the CPU, in place, to the mask of its magnitudes.

    Returns the sums of squares before and after, in double precision; NaN where a weight is NaN or infinite, and what is in
    the matrix is then of no use. The native library does it in one pass where it is there, with the same result.
    """
    native = magnitude_native.keep_largest()
    if native is not None:
        dtype = str(matrix.dtype).removeprefix("torch.")
        return native(matrix.data_ptr(), matrix.shape[0], matrix.shape[1], pattern, dtype) or (math.nan, math.nan)
    order = magnitude_order(matrix)
    if order.numel() and order.max() >= as_integers(torch.tensor(math.inf, dtype=matrix.dtype)):
        return math.nan, math.nan
    before = sum_of_squares(matrix)
    as_integers(matrix).mul_(nm_mask(order, pattern))
    return before, sum_of_squares(matrix)


def sum_of_squares(weight: Tensor) -> float:
    """Σw², in double precision."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2


def _group_mask(scores: Tensor, n: int) -> Tensor:
    """scores [G, m] → mask [G, m]."""
    groups, m = scores.shape
    if n >= m:
        return torch.ones(groups, m, dtype=torch.bool, device=scores.device)
    step = max(1, _CHUNK // m) if scores.device.type == "cpu" else max(1, groups)
    if groups <= step:
        return _ranks_below(scores, n)
    mask = torch.empty(groups, m, dtype=torch.bool)
    for start in range(0, groups, step):
        mask[start : start + step] = _ranks_below(scores[start : start + step], n)
    return mask


def _ranks_below(scores: Tensor, n: int) -> Tensor:
    groups, m = scores.shape
    # Transposed, so that each comparison runs along the groups, which vectorises. Every entry starts out beaten by all that
    # follow it, and gets back those that it beats.
    if scores.device.type != "cpu":
        rank = torch.arange(m - 1, -1, -1, dtype=torch.uint8, device=scores.device)[:, None].repeat(1, groups)
        return (_ranks(scores.T.contiguous(), rank, torch.uint8) < n).T
    # NumPy takes half of torch's time for these comparisons, if they are of integers, and for transposing a few columns.
    numbers = _ordered_integers(scores.detach()) if scores.is_floating_point() else scores
    starts = np.repeat(np.arange(m - 1, -1, -1, dtype=np.uint8)[:, None], groups, axis=1)
    ranks = _ranks(np.ascontiguousarray(numbers.numpy().T), starts, np.uint8)
    return torch.from_numpy(np.ascontiguousarray((ranks < n).T))


def _ordered_integers(scores: Tensor) -> Tensor:
    """Integers in the order of floating ``scores``, equal where they are equal (−0 and 0 too)."""
    bits = as_integers(scores + 0.0)
    return bits ^ ((bits >> (8 * scores.dtype.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def _ranks(scores: Array, rank: Array, byte: Any) -> Array:
    """How many entries of its group beat each: ``scores`` and ``rank`` [m, G], torch's or NumPy's."""
    for shift in range(1, len(scores)):
        earlier_wins = (scores[:-shift] >= scores[shift:]).view(byte)  # a sum of bools would be converted one by one
        rank[shift:] += earlier_wins
        rank[:-shift] -= earlier_wins
    return rank
