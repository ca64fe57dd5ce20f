"""Criteria and masks: pure functions on one matrix ``[rows, K]`` (see :mod:`nmconvert.matrix`).

A criterion gives every weight a score; :func:`nm_mask` keeps the ``n`` highest of each group of ``m``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmconvert.matrix import MatrixView, is_dense
from nmconvert.pattern import Pattern
from nmconvert.runtime.masking import Passes, passes
from nmconvert.tensor import dtype_name

_CHUNK = 1 << 17  # entries at a time on a CPU: what one pass reads and writes stays in the L2 cache


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
    mask[:, :whole] = nm_mask(scores[:, :whole], pattern)
    mask[:, whole:] = _group_mask(scores[:, whole:], pattern.n)
    return mask


def sum_of_squares(weight: Tensor) -> float:
    """Σw², in double precision."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2


def magnitude_mask(weight: Tensor, view: MatrixView, pattern: Pattern) -> Tensor:
    """`nm_mask` of the `magnitude` of ``weight`` under its ``view``: bool, with the weight's shape and layout in memory."""
    mask = torch.empty_like(weight, dtype=torch.bool)
    update_magnitude_mask(mask, weight, view, pattern)
    return mask


def update_magnitude_mask(mask: Tensor, weight: Tensor, view: MatrixView, pattern: Pattern) -> Tensor | int:
    """Make ``mask`` the `magnitude_mask` of ``weight``, in place; how many entries changed.

    No weight moves where a group's are evenly spaced, if not consecutive: the input channels of a convolution are, in
    either memory format. One native pass does it then, where the library has one.
    """
    groups = in_memory(mask, weight.detach())
    spacing = None if groups is None else view.group_spacing(weight.stride(), pattern.m)
    if spacing is not None and (native := native_passes(weight, mask)):
        count = weight.numel() // pattern.m
        return native.renew_mask(weight.data_ptr(), mask.data_ptr(), count, spacing, pattern, dtype_name(weight.dtype))
    if groups is None or spacing is None:
        new = view.from_matrix(nm_mask(magnitude(view.to_matrix(weight)), pattern))
        flips = torch.count_nonzero(new ^ mask)
        mask.copy_(new)
        return flips
    old, scores = (flat.view(-1, pattern.m, spacing) for flat in groups)
    return sum(_replace(old[part], new) for part, new in _group_masks(scores, pattern.n, magnitude_order))


def _replace(old: Tensor, new: Tensor) -> Tensor | int:
    """Copy ``new`` into ``old``; how many entries changed."""
    if old.device.type != "cpu":
        flips = torch.count_nonzero(old ^ new)
        old.copy_(new)
        return flips
    entries, others = old.numpy(), new.numpy()  # NumPy counts in a fifth of torch's time
    count = int(np.count_nonzero(entries != others))
    entries[...] = others
    return count


def native_passes(weight: Tensor, mask: Tensor, *others: Tensor) -> Passes | None:
    """The library's passes, if they can be used on a weight, its bool mask, and others of the weight's kind.

    All have to lie alike in memory, without gaps; see `nmconvert.runtime.masking` for the numbers that they know.
    """
    plain = (Tensor, torch.nn.Parameter)
    tensors = (weight, mask, *others)
    if any(type(tensor) not in plain or tensor.device.type != "cpu" for tensor in tensors) or mask.dtype != torch.bool:
        return None
    if weight.dtype not in (torch.float32, torch.float64) or any(other.dtype != weight.dtype for other in others):
        return None
    return None if torch.compiler.is_compiling() or in_memory(*tensors) is None else passes()


def in_memory(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """All entries of tensors of one shape, each [numel], in the order in which they lie in memory.

    None where they do not lie alike, or not without gaps.
    """
    first = tensors[0]
    if any(tensor.stride() != first.stride() for tensor in tensors) or not is_dense(first.shape, first.stride()):
        return None
    return tuple(tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors)


def _group_masks(scores: Tensor, n: int, order: Callable[[Tensor], Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """scores [B, m, s], B·s groups whose entries lie s apart → masks [b, m, s] of some of the B at a time, and of which.

    ``order`` turns scores into integers.
    """
    blocks, m, spacing = scores.shape
    if scores.device.type != "cpu" or n >= m:
        yield slice(None), _ranks(order(scores)) < n
        return
    step = max(1, _CHUNK // (m * spacing))
    starts = _all_beaten(m, spacing, min(step, blocks) * m * spacing)
    for first in range(0, blocks, step):
        part = slice(first, first + step)
        ranks = _flat_ranks(order(scores[part]).numpy().ravel(), starts, m, spacing)
        yield part, torch.from_numpy(ranks < n).view(-1, m, spacing)


def _group_mask(scores: Tensor, n: int) -> Tensor:
    """scores [G, m] → mask [G, m]."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for part, new in _group_masks(scores[..., None], n, _in_order):
        mask[part] = new[..., 0]
    return mask


def _ranks(scores: Tensor) -> Tensor:
    """How many entries of its group beat each: uint8 [B, m, s] of ``scores`` [B, m, s]."""
    m = scores.shape[1]
    # Every entry starts out beaten by all that follow it, and gets back those that it beats.
    rank = torch.arange(m - 1, -1, -1, dtype=torch.uint8, device=scores.device)[:, None].expand(scores.shape).clone()
    for shift in range(1, m):
        earlier_wins = (scores[:, :-shift] >= scores[:, shift:]).view(torch.uint8)  # a sum of bools would be converted
        rank[:, shift:] += earlier_wins
        rank[:, :-shift] -= earlier_wins
    return rank


def _flat_ranks(scores: NDArray[Any], starts: NDArray[np.uint8], m: int, spacing: int) -> NDArray[np.uint8]:
    """`_ranks` of flat ``scores`` [B·m·s], a twentieth of a nanosecond per comparison.

    All operations run along the whole array, which vectorises whatever m and s are: entries of neighbouring groups are
    compared as well, and the outcome multiplied away. NumPy takes half of torch's time for these, if they are of integers.
    """
    starts = starts[: len(scores)]
    rank = starts.copy()
    for shift in range(1, m):
        apart = shift * spacing
        earlier_wins = (scores[:-apart] >= scores[apart:]).view(np.uint8)
        earlier_wins &= starts[:-apart] >= shift  # so many follow within the group
        rank[apart:] += earlier_wins
        rank[:-apart] -= earlier_wins
    return rank


@lru_cache(maxsize=128)
def _all_beaten(m: int, spacing: int, size: int) -> NDArray[np.uint8]:
    """How many of its group follow each of ``size`` entries."""
    return np.tile(np.repeat(np.arange(m - 1, -1, -1, dtype=np.uint8), spacing), size // (m * spacing))


def _in_order(scores: Tensor) -> Tensor:
    """Integers in the order of ``scores``, equal where they are equal (−0 and 0 too); integers as they are."""
    if not scores.is_floating_point():
        return scores
    bits = as_integers(scores.detach() + 0.0)
    return bits ^ ((bits >> (8 * scores.dtype.itemsize - 1)) & torch.iinfo(bits.dtype).max)
