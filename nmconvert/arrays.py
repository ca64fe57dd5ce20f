"""Tensors of torch as NumPy arrays, bfloat16 included; and the hash that says which weight one is."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]


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
