"""Where the activations between the pieces of a model are kept: in memory up to a limit, in temporary files beyond it.

What is in a file is an ordinary tensor or array whose pages the system reads when they are touched and drops when memory
is short. Many lie in one file: a process may have no more than so many open (often 1,024). A file has no name, and its space is
free again once nothing refers to any of it.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

LIMIT = 4 << 30  # bytes
_FILE = 256 << 20  # bytes of a file; more where one array has more
_ALIGNED = 64


class Store:
    """Keeps copies of tensors and arrays; ``limit`` is how many bytes of them may be in memory."""

    def __init__(self, limit: int = LIMIT):
        self.limit, self.held, self.spilled = limit, 0, 0
        self._file, self._end = np.empty(0, np.uint8), 0  # what is in the newest file, and up to where it is taken

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
        start = -(-self._end // _ALIGNED) * _ALIGNED
        if start + array.nbytes > len(self._file):
            self._file, start = _new_file(max(_FILE, array.nbytes)), 0
        self._end = start + array.nbytes
        self.spilled += array.nbytes
        place: NDArray[Any] = self._file[start : self._end].view(array.dtype).reshape(array.shape)
        place[...] = array
        return place

    def _free(self, size: int) -> None:
        self.held -= size


def _new_file(size: int) -> NDArray[np.uint8]:
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a signal when the pages are written
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, np.uint8, "r+")
