"""Turn trained models into N:M structured-sparse ones.

The command line is ``nmconvert``; the names below are the Python API. They are imported on first use, so that
``import nmconvert`` and ``nmconvert --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Pattern": "nmconvert.pattern",
    "NmconvertError": "nmconvert.errors",
    "session": "nmconvert.runtime",
    "sparsify": "nmconvert.srste",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nmconvert' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
