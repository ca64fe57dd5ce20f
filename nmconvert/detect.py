"""What pattern a weight satisfies, found from its zeros alone; and the hash that says which weight it is."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nmconvert.pattern import MAX_M, Pattern

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]


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


def as_array(tensor: Tensor) -> Array:
    """A torch tensor as a NumPy array, bfloat16 included."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def as_tensor(array: Array) -> Tensor:
    """A NumPy array as a torch tensor, bfloat16 included; shares its memory."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def digest(weight: Array) -> str:
    """SHA-256 of ``weight`` in row-major order, little-endian, with negative zeros made positive."""
    return hashlib.sha256(canonical_bytes(weight).data).hexdigest()


def canonical_bytes(weight: Array) -> Array:
    """The bytes that :func:`digest` hashes, uint8 [n]."""
    contiguous = np.ascontiguousarray(weight)
    if contiguous.dtype.byteorder == ">":
        contiguous = contiguous.astype(contiguous.dtype.newbyteorder("<"))
    bits = contiguous.view(f"u{contiguous.dtype.itemsize}")
    negative_zero = bits == (1 << (8 * contiguous.dtype.itemsize - 1))
    if negative_zero.any():
        bits = np.where(negative_zero, np.zeros((), bits.dtype), bits)
    return bits.reshape(-1).view(np.uint8)
