"""Magnitude pruning by the native library: one pass over a block of weights while it is in the cache."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial

from nmconvert.pattern import Pattern
from nmconvert.runtime.locate import library_with

DTYPES = ("float32", "float16", "bfloat16", "float64")  # by their number in the library

KeepLargest = Callable[[int, int, int, Pattern, str], tuple[float, float] | None]


def keep_largest() -> KeepLargest | None:
    """The library's function, or None where there is none for this CPU.

    It takes an address, rows, K, a pattern and one of :data:`DTYPES`, prunes the row-major matrix there in place, ties to the
    lower index, and returns the sums of squares before and after; None where a weight is NaN or infinite, and the matrix is
    then spoilt. It holds no lock: threads may prune at once.
    """
    library = library_with("NmconvertPrune")
    return None if library is None else _bound(library)


@cache
def _bound(library: ctypes.CDLL) -> KeepLargest:
    function: Callable[..., int] = library.NmconvertPrune
    whole, number, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    function.argtypes = [pointer, whole, whole, number, number, number, pointer]  # type: ignore[attr-defined]
    return partial(_call, function)


def _call(
    prune: Callable[..., int], address: int, rows: int, columns: int, pattern: Pattern, dtype: str
) -> tuple[float, float] | None:
    energy = (ctypes.c_double * 2)()
    status = prune(address, rows, columns, pattern.n, pattern.m, DTYPES.index(dtype), energy)
    assert status in (0, 1)
    return (energy[0], energy[1]) if status == 0 else None
