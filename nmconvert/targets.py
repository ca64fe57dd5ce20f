"""Which layers a runtime can speed up: each target is a function that says why it cannot use a planned row, or None.

Sources: TensorRT developer guide, "Structured sparsity" (2 of 4 along C for each kernel position, C % 4 == 0); cuSPARSELt as
torch 2.13 uses it (``torch.sparse.semi_structured``, minimum and multiple of rows and columns per type); our own kernels.
"""

from __future__ import annotations

from collections.abc import Callable

from nmconvert.pattern import Pattern
from nmconvert.tensor import Row

_TWO_OF_FOUR = Pattern(2, 4)
_CUSPARSELT_MULTIPLE = {"float16": 16, "bfloat16": 16, "float32": 8}


def generic(row: Row) -> str | None:
    """Any runtime: nothing is required, and no speed is promised."""
    return None


def ort(row: Row) -> str | None:
    """Our kernels inside onnxruntime: fp32 compute, convolutions of one or two dimensions and linear layers."""
    if row.info.dtype == "float64":
        return "ort: float64 has no kernel"
    if row.info.kind == "conv_transpose":
        return "ort: transposed convolutions have no kernel"
    if row.info.kind == "conv" and len(row.info.shape) > 4:
        return "ort: 3-D convolutions have no kernel"
    return None


def tensorrt(row: Row) -> str | None:
    """TensorRT's sparse tactics: 2:4 along the input channels, a multiple of 4 of them, one group."""
    if row.pattern != _TWO_OF_FOUR:
        return f"tensorrt: only 2:4, not {row.pattern}"
    if row.info.kind == "conv_transpose":
        return "tensorrt: no sparse transposed convolutions"
    if row.info.kind == "conv" and row.axis != "channel" and any(k > 1 for k in row.info.shape[2:]):
        return "tensorrt: only groups along the channel axis"
    if row.info.groups > 1:
        return "tensorrt: no sparse grouped convolutions"
    channels = row.info.shape[1] if row.info.kind == "conv" else row.view.columns
    if channels % 4:
        return f"tensorrt: {channels} input channels, not a multiple of 4"
    return None


def cusparselt(row: Row) -> str | None:
    """cuSPARSELt through torch: 2:4 linear layers with rows and columns in whole tiles."""
    if row.pattern != _TWO_OF_FOUR:
        return f"cusparselt: only 2:4, not {row.pattern}"
    if row.info.kind not in ("linear", "matmul"):
        return "cusparselt: only linear layers"
    multiple = _CUSPARSELT_MULTIPLE.get(row.info.dtype)
    if multiple is None:
        return f"cusparselt: no {row.info.dtype}"
    if row.view.rows % multiple or row.view.columns % multiple:
        return f"cusparselt: {row.view.rows}×{row.view.columns} is no multiple of {multiple}"
    return None


TARGETS: dict[str, Callable[[Row], str | None]] = {
    "generic": generic,
    "ort": ort,
    "tensorrt": tensorrt,
    "cusparselt": cusparselt,
}


def usable_by(row: Row) -> tuple[str, ...]:
    """The targets that can use the zeros of a pruned row."""
    return tuple(name for name, why_not in TARGETS.items() if name != "generic" and why_not(row) is None)
