"""Where the shared library of the kernels is, and whether it can be used here."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nmconvert.errors import KernelsUnavailableError

LIBRARY_VARIABLE = "NMCONVERT_KERNELS"  # the path of a library to use instead, or "off"
ISA_VARIABLE = "NMCONVERT_ISA"  # an instruction set to use instead of the best
_NAME = "libnmconvert.dylib" if sys.platform == "darwin" else "libnmconvert.so"
_REBUILD = "install nmconvert anew where a C++17 compiler is found (pip install --force-reinstall --no-deps FOLDER)"


@dataclass(frozen=True)
class Kernels:
    """The kernels as found: ``path`` and ``isa`` where they can be used, ``reason`` and ``remedy`` where they cannot."""

    path: Path | None = None
    isa: str = ""
    version: str = ""
    reason: str = ""
    remedy: str = ""

    @property
    def usable(self) -> bool:
        """Whether sessions will run on them."""
        return self.path is not None and not self.reason


def kernels() -> Kernels:
    """Find the library, load it and ask which instruction set it would use on this CPU."""
    import nmconvert

    wanted = os.environ.get(LIBRARY_VARIABLE, "")
    if wanted == "off":
        return Kernels(reason=f"switched off by {LIBRARY_VARIABLE}=off", remedy=f"unset {LIBRARY_VARIABLE}")
    path = Path(wanted) if wanted else _installed()
    rebuild = f"unset {LIBRARY_VARIABLE}" if wanted else _REBUILD
    if path is None or not path.is_file():
        why = f"at {path}, as {LIBRARY_VARIABLE} says" if wanted else "it was not built"
        return Kernels(reason=f"the library of kernels is not there: {why}", remedy=rebuild)
    try:
        native = ctypes.CDLL(str(path))
        native.NmconvertIsa.restype = native.NmconvertVersion.restype = ctypes.c_char_p
        isa, version = native.NmconvertIsa().decode(), native.NmconvertVersion().decode()
    except (OSError, AttributeError) as error:
        return Kernels(path, reason=f"{path.name} cannot be loaded: {error}", remedy=rebuild)
    if version and version != nmconvert.__version__:
        reason = f"{path.name} is of version {version}, nmconvert of {nmconvert.__version__}"
        return Kernels(path, isa, version, reason, rebuild)
    if not isa:
        forced = os.environ.get(ISA_VARIABLE)
        reason = f"this CPU ({platform.machine()}) has no instruction set that they were written for"
        if forced:
            reason = f"NMCONVERT_ISA={forced} is not an instruction set of this CPU"
        return Kernels(path, isa, version, reason, "unset NMCONVERT_ISA" if forced else "nothing: the functions serve")
    return Kernels(path, isa, version)


def _installed() -> Path | None:
    """Beside this package: a source checkout that was installed editable has a second folder, for what was compiled."""
    candidates = [Path(folder) / _NAME for folder in sys.modules["nmconvert.runtime"].__path__]
    return next((path for path in candidates if path.is_file()), None)


def library() -> Path:
    """The shared library, for ``SessionOptions.register_custom_ops_library``.

    Raises:
        KernelsUnavailableError: it was not built, is broken, or does not fit this CPU or this nmconvert.
    """
    found = kernels()
    if found.path is None or found.reason:
        raise KernelsUnavailableError(f"no native kernels: {found.reason}; {found.remedy}")
    return found.path


def library_with(function: str) -> ctypes.CDLL | None:
    """The library, opened to be called from Python; None where none fits this CPU, or it was built without ``function``."""
    return _library_with(function, os.environ.get(LIBRARY_VARIABLE), os.environ.get(ISA_VARIABLE))


@cache
def _library_with(function: str, *settings: str | None) -> ctypes.CDLL | None:
    found = kernels()
    library = ctypes.CDLL(str(found.path)) if found.usable else None
    return library if hasattr(library, function) else None
