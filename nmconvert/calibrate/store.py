"""Where the activations between the pieces of a model are kept: in memory up to a limit, in temporary files beyond it.

What is in a file is an ordinary tensor or array whose pages the system reads when they are touched and drops when memory
is short. A file has no name, and its space is free again once nothing refers to it.
"""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

LIMIT = 4 << 30  # bytes


class Store:
    """Keeps copies of tensors and arrays; ``limit`` is how many bytes of them may be in memory."""

    def __init__(self, limit: int = LIMIT):
        self.limit, self.held, self.spilled = limit, 0, 0

    def keep(self, tree: Any) -> Any:
        """``tree`` with a copy of each tensor on the CPU and of each array in it; elsewhere, a plain copy."""
        return tree_map(self._leaf, tree)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return self._array(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.device.type != "cpu" or leaf.layout != torch.strided or not leaf.numel():
            return leaf.detach().clone()
        values = leaf.detach().contiguous()
        bytes_ = values.flatten().view(torch.uint8).numpy()  # NumPy knows no bfloat16
        return torch.from_numpy(self._array(bytes_)).view(values.dtype).reshape(values.shape)

    def _array(self, array: NDArray[Any]) -> NDArray[Any]:
        fits = not array.nbytes or self.held + array.nbytes <= self.limit  # an empty file cannot be mapped
        kept = np.array(array) if fits else self._mapped(array)
        if fits:
            self.held += array.nbytes
            weakref.finalize(kept, self._free, array.nbytes)
        return kept

    def _mapped(self, array: NDArray[Any]) -> NDArray[Any]:
        with tempfile.TemporaryFile() as file:
            array.tofile(file)
            self.spilled += array.nbytes
            return np.memmap(file, array.dtype, "r+", shape=array.shape)

    def _free(self, size: int) -> None:
        self.held -= size
