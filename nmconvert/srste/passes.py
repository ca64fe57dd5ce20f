"""What a step does to a weight and its mask: by the native library where it can, else by torch, alike to the bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmconvert.masks import native_passes
from nmconvert.tensor import dtype_name


class Spare:
    """Memory for products of one weight, lent to a tensor and taken back when nothing holds that tensor any longer.

    Fresh memory costs more than the product that is written to it: the system has to find its pages first.
    """

    LEAST = 1 << 17  # bytes from which on the allocator asks the system

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def empty_like(self, weight: Tensor) -> Tensor:
        """As `torch.empty_like`; ``weight`` has no gaps in its memory."""
        if weight.nbytes < self.LEAST:
            return torch.empty_like(weight)
        memory = self._free.pop() if self._free else torch.empty(0, dtype=torch.uint8)
        if memory.numel() != weight.nbytes:  # the weight was converted meanwhile
            memory = torch.empty(weight.nbytes, dtype=torch.uint8)
        lent = memory.numpy()  # a new array on the same memory, which the tensor below keeps alive
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(weight.dtype).as_strided(weight.shape, weight.stride())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return Spare, ()  # copies begin with none


def masked(weight: Tensor, mask: Tensor, spare: Spare) -> Tensor:
    """mask ⊙ weight, without a gradient."""
    native = native_passes(weight, mask)
    if native is None:
        return weight * mask
    product = spare.empty_like(weight)
    native.masked(weight.data_ptr(), mask.data_ptr(), weight.numel(), product.data_ptr(), dtype_name(weight.dtype))
    return product


def add_pruned(total: Tensor, weight: Tensor, mask: Tensor, factor: float | Tensor) -> None:
    """total += factor · (1 − mask) ⊙ weight, in place; ``total`` may be the weight."""
    if isinstance(factor, Tensor):
        total.addcmul_(weight * factor, ~mask)
        return
    if (native := native_passes(weight, mask, total)) is None:
        total.addcmul_(weight, ~mask, value=factor)
        return
    dtype = dtype_name(weight.dtype)
    native.add_pruned(weight.data_ptr(), mask.data_ptr(), weight.numel(), factor, total.data_ptr(), dtype)
    torch.autograd.graph.increment_version(total)
