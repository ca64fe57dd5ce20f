"""What is known of one tensor without reading its values, and what is planned for it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 and the types of 8 bits by it)
import numpy as np

from nmconvert.matrix import Kind, MatrixView
from nmconvert.pattern import Axis, Pattern

if TYPE_CHECKING:
    import torch

PRUNABLE_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. ``dtype`` is its name in torch: what reads names and shapes alone does not wait for torch.

    ``shared_with`` names the first tensor that this one shares memory with (tied weights): what is done to that one is
    done to this one too. ``secondary`` marks a second state dict beside the model's own (``ema/conv1.weight``).

    ``kind`` and ``groups`` are known only where the container knows its graph, or a model was given. ``transposed`` is the
    transpose that leads from the tensor to the weight as its operator takes it, ``reason`` why the container itself knows
    that the tensor cannot be pruned, and ``output`` marks the network's last layer (all three from ONNX). ``unread`` marks what
    is no dense tensor, for that ``reason``: it is copied as it is, and cannot be read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    shared_with: str | None = None
    kind: Kind | None = None
    groups: int = 1
    secondary: bool = False
    transposed: tuple[int, ...] | None = None
    reason: str | None = None
    output: bool = False
    unread: bool = False

    @property
    def own_name(self) -> str:
        """The name within its state dict: a second one (``ema/conv1.weight``) has the names of the first."""
        return self.name.rpartition("/")[2] if self.secondary else self.name

    @property
    def numel(self) -> int:
        """How many entries it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes its entries take."""
        return self.numel * self.itemsize

    @property
    def itemsize(self) -> int:
        """How many bytes an entry takes."""
        try:
            return np.dtype(self.dtype).itemsize
        except TypeError:  # one that only torch has
            return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def view(self, axis: Axis) -> MatrixView:
        """The matrix view of this tensor, whose kind must be known, as it lies in its container."""
        assert self.kind is not None
        if self.transposed is None:
            return MatrixView.of(self.kind, self.shape, axis, self.groups)
        operator_shape = [self.shape[p] for p in self.transposed]
        return MatrixView.of(self.kind, operator_shape, axis, self.groups).before_transpose(self.transposed)

    @property
    def input_channels(self) -> int:
        """Input channels that one output of this weight sees: I/g of a convolution, I of a linear layer."""
        columns = self.view("kernel").columns
        return columns if self.kind in ("linear", "matmul") else columns // prod(self.shape[2:])


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Row:
    """One tensor of the plan: pruned to ``pattern`` along ``axis``, or dense for ``reason``.

    ``assumed`` marks a kind (and so an axis) that was guessed from name and shape.
    """

    info: TensorInfo
    pattern: Pattern | None = None
    axis: Axis | None = None
    assumed: bool = False
    reason: str | None = None

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.info.name

    @property
    def view(self) -> MatrixView:
        """The matrix view of a pruned tensor, as it is stored."""
        assert self.axis is not None
        return self.info.view(self.axis)
