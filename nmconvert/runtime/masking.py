"""What SR-STE does with a weight and its mask at each step, by the native library: a pass each, that reads the weight once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from nmconvert.pattern import Pattern
from nmconvert.runtime.locate import library_with

DTYPES = ("float32", "float64")  # by their number in the library


@dataclass(frozen=True)
class Passes:
    """The library's functions. They take addresses of entries in the order of memory, and one of :data:`DTYPES`.

    Masks have one byte an entry, 0 or 1. No lock is held.
    """

    _renew: Callable[..., int]
    _masked: Callable[..., None]
    _add_pruned: Callable[..., None]

    def renew_mask(self, weight: int, mask: int, groups: int, spacing: int, pattern: Pattern, dtype: str) -> int:
        """Make ``mask`` that of the largest |w| of each group, whose entries lie ``spacing`` apart; how many entries changed.

        ``spacing`` groups lie side by side in a block. Ties go to the lower index.
        """
        return self._renew(weight, mask, groups, spacing, pattern.n, pattern.m, DTYPES.index(dtype))

    def masked(self, weight: int, mask: int, count: int, out: int, dtype: str) -> None:
        """out = mask ⊙ w."""
        self._masked(weight, mask, count, out, DTYPES.index(dtype))

    def add_pruned(self, weight: int, mask: int, count: int, factor: float, total: int, dtype: str) -> None:
        """total += factor · (1 − mask) ⊙ w; ``total`` may be the weight."""
        self._add_pruned(weight, mask, count, factor, total, DTYPES.index(dtype))


def passes() -> Passes | None:
    """The library's passes, or None where there are none for this CPU."""
    library = library_with("NmconvertRenewMask")
    return None if library is None else _bound(library)


@cache
def _bound(library: ctypes.CDLL) -> Passes:
    whole, number, real, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_double, ctypes.c_void_p
    renew, masked, add = library.NmconvertRenewMask, library.NmconvertMasked, library.NmconvertAddPruned
    renew.argtypes, renew.restype = [pointer, pointer, whole, whole, number, number, number], whole
    masked.argtypes, masked.restype = [pointer, pointer, whole, pointer, number], None
    add.argtypes, add.restype = [pointer, pointer, whole, real, pointer, number], None
    return Passes(renew, masked, add)
