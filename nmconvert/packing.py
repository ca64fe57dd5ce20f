"""The packed form of an N:M matrix: the format's specification.

A matrix ``[rows, K]`` (:mod:`nmconvert.matrix`) under a pattern n:m becomes three arrays, or four:

``values``
    The kept weights, row after row, column after column; 1-D, in the weight's own dtype. A kept weight may be zero;
    every group holds exactly min(n, its length) of them, so a row holds ``pattern.kept(K)``.
``mask``
    uint8 codes, 1-D: which weights are kept, in the same order.
``table``
    uint8 ``[codes, width]``: the ``width`` mask bits that each code stands for, the first column first.
``scale``
    float32 ``[rows]``, positive; only where ``values`` are int8. A kept weight is its value times the scale of its row, in
    float32. :func:`quantize` gives scales 17 significant bits, so that this product is exact: the weight is the same in every
    runtime, bit for bit, and rounding it once more changes nothing.

``table[mask]`` is a sequence of bits; where ``parts`` > 1, each run of ``parts`` rows is added up first. Read in order, the
bits are the mask of the flattened matrix, and what is left over at the end is padding, to be ignored. A reader needs nothing
else: the k-th set bit stands where ``values[k]`` belongs. Three codings are written, the smallest that fits:

==============  ==========================================================================  =================================
coding          one byte is                                                                 bits per dense weight
==============  ==========================================================================  =================================
``bitmask``     8 mask bits, least significant first; any K, any m                          1
``combination`` as many whole groups as C(m, n)^groups ≤ 256 allows, the first group the    8/(groups·m): 2:4 0.67, 1:4 0.5,
                most significant digit; combinations in ascending order of their bit mask   1:8 0.5, 1:16 0.25, 2:16 0.5
``position``    the position of one kept weight; a group takes n bytes (``parts`` = n)      8n/m: 2:32 0.5
==============  ==========================================================================  =================================

``combination`` and ``position`` need K % m == 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from nmconvert.errors import WeightError
from nmconvert.pattern import Pattern

Matrix = npt.NDArray[Any]
_LARGEST_INTEGER = 127
_SCALE_BITS = 17  # times 7 bits of an integer are the 24 of a float32
_SMALLEST_SCALE = 2.0**-126  # the least normal float32: below, the bits of a scale run out


@dataclass(frozen=True)
class Coding:
    """How mask bits are written as bytes: ``table`` uint8 [codes, width], and ``parts`` codes added up for each ``width``."""

    name: str
    table: npt.NDArray[np.uint8]
    parts: int = 1

    @property
    def width(self) -> int:
        """Mask bits that ``parts`` codes stand for."""
        return int(self.table.shape[1])

    def code_count(self, weights: int) -> int:
        """Bytes of mask for a matrix of ``weights`` entries."""
        return -(-weights // self.width) * self.parts


@dataclass(frozen=True)
class Packed:
    """A packed matrix [rows, columns]; see the module docstring."""

    pattern: Pattern
    rows: int
    columns: int
    values: Matrix
    mask: npt.NDArray[np.uint8]
    coding: Coding
    scale: npt.NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values, mask and scale; the table is shared by all matrices of a pattern."""
        return int(self.values.nbytes + self.mask.nbytes + (0 if self.scale is None else self.scale.nbytes))

    def quantized(self) -> Packed:
        """The same with int8 values and a scale for each row: rounded, unless the weights were that already."""
        values, scale = quantize(self.values.reshape(self.rows, -1))
        return replace(self, values=values.reshape(-1), scale=scale)


@cache
def coding_for(pattern: Pattern, columns: int) -> Coding:
    """The smallest coding for rows of ``columns`` entries."""
    bitmask = _bitmask()
    if columns % pattern.m:
        return bitmask
    candidates = [bitmask]
    if comb(pattern.m, pattern.n) <= 256:
        candidates.append(_combination(pattern))
    candidates.append(Coding("position", np.eye(pattern.m, dtype=np.uint8), parts=pattern.n))
    return min(candidates, key=lambda coding: coding.parts / coding.width)  # the first of equals: bitmask


@cache
def _bitmask() -> Coding:
    return Coding("bitmask", np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"))


def _combination(pattern: Pattern) -> Coding:
    one_group = np.zeros((comb(pattern.m, pattern.n), pattern.m), np.uint8)
    by_mask = sorted(combinations(range(pattern.m), pattern.n), key=lambda kept: sum(1 << k for k in kept))
    for row, kept in zip(one_group, by_mask, strict=True):
        row[list(kept)] = 1
    groups = 1
    while len(one_group) > 1 and len(one_group) ** (groups + 1) <= 256:
        groups += 1
    table = np.stack([np.concatenate(rows) for rows in product(one_group, repeat=groups)])
    return Coding("combination", table)


def pack(matrix: Matrix, pattern: Pattern) -> Packed:
    """Pack ``matrix`` [rows, columns], which must satisfy ``pattern``.

    Where a group has fewer than n nonzeros, its first zeros are kept as well.

    Raises:
        WeightError: a value is not finite, or a group has more than n nonzeros.
    """
    rows, columns = matrix.shape
    keep = kept_positions(matrix, pattern)
    coding = coding_for(pattern, columns)
    return Packed(pattern, rows, columns, matrix[keep], _encode(keep.reshape(-1), coding, pattern), coding)


def kept_positions(matrix: Matrix, pattern: Pattern) -> npt.NDArray[np.bool_]:
    """The mask [rows, columns] of ``matrix``: its nonzeros, and the first zeros of groups that have fewer than n.

    Raises:
        WeightError: a value is not finite, or a group has more than n nonzeros.
    """
    if not np.isfinite(matrix).all():
        raise WeightError("the matrix holds NaN or infinite values: it cannot be packed")
    rows, columns = matrix.shape
    nonzero = matrix != 0
    keep = np.empty((rows, columns), np.bool_)
    tail = columns % pattern.m
    for part, length in ((slice(0, columns - tail), pattern.m), (slice(columns - tail, columns), tail)):
        if length:
            groups = nonzero[:, part].reshape(-1, length)
            keep[:, part] = _fill(groups, min(pattern.n, length), pattern).reshape(rows, -1)
    return keep


def _fill(nonzero: npt.NDArray[np.bool_], n: int, pattern: Pattern) -> npt.NDArray[np.bool_]:
    """nonzero [G, length] → exactly n set bits in each group."""
    count = nonzero.sum(axis=1, dtype=np.int32)
    if (excess := int(count.max(initial=0))) > n:
        where = int(count.argmax())
        raise WeightError(f"the matrix is not {pattern}: group {where} has {excess} nonzero weights, more than {n}")
    missing = n - count
    if not missing.any():
        return nonzero
    zeros_so_far = np.cumsum(~nonzero, axis=1, dtype=np.int32)
    filled: npt.NDArray[np.bool_] = nonzero | (zeros_so_far <= missing[:, None])
    return filled


def _encode(bits: npt.NDArray[np.bool_], coding: Coding, pattern: Pattern) -> npt.NDArray[np.uint8]:
    if coding.name == "bitmask":
        return np.packbits(bits, bitorder="little")
    if coding.name == "position":
        return (np.flatnonzero(bits) % pattern.m).astype(np.uint8)
    group_table = coding.table[: comb(pattern.m, pattern.n), -pattern.m :]  # the last group is the least significant digit
    powers = (1 << np.arange(pattern.m, dtype=np.uint64)).astype(np.uint64)
    digits = np.searchsorted(group_table @ powers, bits.reshape(-1, pattern.m) @ powers)
    groups = coding.width // pattern.m
    digits = np.concatenate([digits, np.zeros(-len(digits) % groups, digits.dtype)]).reshape(-1, groups)
    place = len(group_table) ** np.arange(groups - 1, -1, -1)
    return (digits @ place).astype(np.uint8)


def quantize(matrix: Matrix) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """``matrix`` [rows, any] → int8 of the same shape and scale [rows], such that integers × scale are nearest to it.

    Symmetric, to nearest even; the largest of a row becomes ±127. The scale has 17 significant bits, see above; it is at least
    2⁻¹²⁶, and 1 where a row becomes zeros.
    """
    largest = np.abs(matrix).max(axis=1, initial=0).astype(np.float64)
    needed = np.where(largest > _SMALLEST_SCALE / 2, np.maximum(largest / _LARGEST_INTEGER, _SMALLEST_SCALE), 1.0)
    unit = np.ldexp(1.0, np.frexp(needed)[1] - _SCALE_BITS)
    scale = np.ceil(needed / unit) * unit
    return np.rint(matrix / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def dequantize(integers: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """int8 [rows, any] × scale [rows], float32.

    Raises:
        WeightError: there is not one positive scale for each row.
    """
    if scale.shape != integers.shape[:1]:
        raise WeightError(f"{len(integers)} rows have a scale of shape {list(scale.shape)}: the file is damaged")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise WeightError("a row's scale is not a positive number: the file is damaged")
    weights: npt.NDArray[np.float32] = integers.astype(np.float32) * scale[:, None]
    return weights


def unpack(
    values: Matrix,
    mask: npt.NDArray[np.uint8],
    table: npt.NDArray[np.uint8],
    parts: int,
    rows: int,
    columns: int,
    scale: npt.NDArray[np.float32] | None = None,
) -> Matrix:
    """Rebuild the dense matrix [rows, columns], bit for bit, from what a file holds.

    Raises:
        WeightError: the arrays contradict each other (lengths, codes outside the table, bits and values that do not agree).
    """
    keep = unpack_mask(mask, table, parts, rows, columns)
    if (kept := int(keep.sum())) != len(values):
        raise WeightError(f"the mask keeps {kept} weights, but there are {len(values)} values: the file is damaged")
    matrix = np.zeros((rows, columns), values.dtype)
    matrix[keep] = values
    return matrix if scale is None else dequantize(matrix, scale)


def unpack_mask(
    mask: npt.NDArray[np.uint8], table: npt.NDArray[np.uint8], parts: int, rows: int, columns: int
) -> npt.NDArray[np.bool_]:
    """The mask [rows, columns] that ``mask``, ``table`` and ``parts`` stand for.

    Raises:
        WeightError: the arrays contradict each other.
    """
    coding = Coding("file", table, parts)
    if table.ndim != 2 or not table.size or table.max() > 1 or parts < 1:
        raise WeightError(f"a mask table of shape {list(table.shape)} with {parts} parts is not valid: the file is damaged")
    if mask.ndim != 1 or len(mask) != coding.code_count(rows * columns):
        raise WeightError(
            f"the mask has {mask.size} bytes, a matrix of {rows}×{columns} needs {coding.code_count(rows * columns)}: "
            "the file is damaged"
        )
    if mask.size and int(mask.max()) >= len(table):
        raise WeightError(f"mask code {int(mask.max())} is outside its table of {len(table)}: the file is damaged")
    bits = table[mask].reshape(-1, parts, coding.width).sum(axis=1, dtype=np.uint8).reshape(-1)
    if bits.max(initial=0) > 1:
        raise WeightError("the mask names a weight twice: the file is damaged")
    kept: npt.NDArray[np.bool_] = bits[: rows * columns].reshape(rows, columns).astype(np.bool_)
    return kept
