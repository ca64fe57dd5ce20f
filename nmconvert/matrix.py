"""Matrix views: every weight becomes a matrix ``[rows, K]`` whose last axis is the grouped one.

This is the only module that knows how convolutions, transposed convolutions and linear layers lay out their weights.
Masks, solvers, packing and kernels see matrices only. A view is three standard steps, so that it can be written down in
an ONNX function as well as computed here: ``weight.reshape(split).transpose(perm).reshape(rows, columns)``.

=================  ========================  ==========================================================
kind               weight                    rows × K
=================  ========================  ==========================================================
``conv``           [O, I/g, *kernel]         O × (*kernel, I/g) on the channel axis, O × (I/g, *kernel) on the kernel axis
``conv_transpose`` [I, O/g, *kernel]         (g, O/g) × (*kernel, I/g), or (g, O/g) × (I/g, *kernel)
``linear``         [..., O, I]               (..., O) × I
``matmul``         [..., I, O]               (..., O) × I
=================  ========================  ==========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeVar, get_args

from nmconvert.errors import WeightError
from nmconvert.pattern import Axis

Kind = Literal["conv", "conv_transpose", "linear", "matmul"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Array = TypeVar("Array", bound=Any)  # a torch tensor or a NumPy array


@dataclass(frozen=True)
class MatrixView:
    """How one weight of ``shape`` is seen as ``[rows, columns]``; see the module docstring."""

    shape: tuple[int, ...]
    split: tuple[int, ...]
    perm: tuple[int, ...]
    rows: int
    columns: int

    @classmethod
    def of(cls, kind: Kind, shape: Sequence[int], axis: Axis, groups: int = 1) -> MatrixView:
        """The view of a weight of ``kind`` and ``shape`` along ``axis``; ``groups`` is the convolution's.

        Raises:
            WeightError: the shape does not fit the kind.
        """
        shape = tuple(int(s) for s in shape)
        rank = len(shape)
        if rank < (3 if kind.startswith("conv") else 2):
            raise WeightError(f"a {kind} weight of shape {list(shape)} has too few dimensions")
        if kind == "conv":
            perm = (0, *range(2, rank), 1) if axis == "channel" else tuple(range(rank))
            return cls(shape, shape, perm, shape[0], prod(shape[1:]))
        if kind == "conv_transpose":
            inputs, outputs, *kernel = shape
            if inputs % groups:
                raise WeightError(f"a conv_transpose weight of shape {list(shape)} cannot have {groups} groups")
            split = (groups, inputs // groups, outputs, *kernel)
            spatial = range(3, len(split))
            perm = (0, 2, *spatial, 1) if axis == "channel" else (0, 2, 1, *spatial)
            return cls(shape, split, perm, groups * outputs, inputs // groups * prod(kernel))
        if kind == "linear":
            return cls(shape, shape, tuple(range(rank)), prod(shape[:-1]), shape[-1])
        perm = (*range(rank - 2), rank - 1, rank - 2)
        return cls(shape, shape, perm, prod(shape[:-2]) * shape[-1], shape[-2])

    @property
    def permuted(self) -> tuple[int, ...]:
        """The shape between transpose and the last reshape: ``split`` in the order of ``perm``."""
        return tuple(self.split[p] for p in self.perm)

    @property
    def inverse_perm(self) -> tuple[int, ...]:
        """The transpose that leads from ``permuted`` back to ``split``."""
        return tuple(self.perm.index(axis) for axis in range(len(self.perm)))

    def to_matrix(self, weight: Array) -> Array:
        """``weight`` [*shape] → [rows, columns]; a view where no data has to move."""
        matrix: Array = _transpose(weight.reshape(self.split), self.perm).reshape(self.rows, self.columns)
        return matrix

    def from_matrix(self, matrix: Array) -> Array:
        """[rows, columns] → [*shape], the inverse of :meth:`to_matrix`."""
        weight: Array = _transpose(matrix.reshape(self.permuted), self.inverse_perm).reshape(self.shape)
        return weight

    def group_spacing(self, strides: Sequence[int], m: int) -> int | None:
        """How far apart the entries of each group of ``m`` lie in the memory of a weight with these ``strides``.

        None where that is not the same for all of them, a group is short, or the memory has gaps.
        """
        strides = self._split_strides(strides)
        if not is_dense(self.split, strides):
            return None
        length, spacing = 1, 1
        for dim in reversed(self.perm):  # the grouped axis: the last dimension, and those that go on where it ends
            if self.split[dim] == 1:
                continue
            if length > 1 and strides[dim] != length * spacing:
                return None
            spacing = strides[dim] if length == 1 else spacing
            length *= self.split[dim]
            if length % m == 0 or length >= self.columns:
                break
        return spacing if length % m == 0 and self.columns % m == 0 else None

    def _split_strides(self, strides: Sequence[int]) -> tuple[int, ...]:
        if len(self.split) == len(self.shape):
            return tuple(strides)
        return (self.split[1] * strides[0], *strides)  # only the first dimension is ever split, in two

    def before_transpose(self, perm: Sequence[int]) -> MatrixView:
        """The view of the tensor ``base``, given that ``base.transpose(perm)`` is the weight that this view is of."""
        parts = _parts(self.shape, self.split)  # per dimension of the weight, the split dimensions that make it up
        origin = [list(perm).index(d) for d in range(len(self.shape))]  # base dimension d is the weight's origin[d]
        order = [axis for d in range(len(self.shape)) for axis in parts[origin[d]]]
        return MatrixView(
            shape=tuple(self.shape[o] for o in origin),
            split=tuple(self.split[axis] for axis in order),
            perm=tuple(order.index(p) for p in self.perm),
            rows=self.rows,
            columns=self.columns,
        )


def _transpose(array: Array, perm: tuple[int, ...]) -> Array:
    transposed: Array = array.permute(perm) if hasattr(array, "permute") else array.transpose(perm)
    return transposed


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor fills its memory without gaps and without overlap."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _parts(shape: tuple[int, ...], split: tuple[int, ...]) -> list[list[int]]:
    """Which dimensions of ``split`` make up each dimension of ``shape``."""
    if shape == split:
        return [[d] for d in range(len(shape))]
    # Only conv_transpose splits, and only its first dimension, in two.
    return [[0, 1], *([d] for d in range(2, len(split)))]
