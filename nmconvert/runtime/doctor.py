"""What this installation can do, and why it cannot do the rest."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from nmconvert import __version__
from nmconvert.runtime.cache import cpu_model, folder
from nmconvert.runtime.locate import kernels

_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "transformers", "numpy")


@dataclass(frozen=True)
class Fact:
    """One line: what was looked at, what was found, whether that is as it should be, and what to do where it is not."""

    name: str
    found: str
    fine: bool = True
    remedy: str = ""


def examine() -> list[Fact]:
    """Everything about this installation that speed or a command depends on."""
    found = kernels()
    native = Fact("native kernels", found.reason, fine=False, remedy=found.remedy)
    if found.usable:
        native = Fact("native kernels", f"{found.isa}, {found.path}")
    cache = folder()
    return [
        Fact("python", platform.python_version()),
        Fact("nmconvert", __version__),
        *(_package(name) for name in _PACKAGES),
        Fact("cpu", f"{cpu_model()}, {os.cpu_count()} cores"),
        native,
        Fact("measurements", "kept nowhere" if cache is None else str(cache)),
    ]


def _package(name: str) -> Fact:
    wanted = _wanted(name)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        needed = name != "transformers"  # an extra
        return Fact(name, "not installed", fine=not needed, remedy=f"pip install '{wanted}'" if needed else "")
    if wanted.specifier.contains(version, prereleases=True):
        return Fact(name, version)
    return Fact(name, f"{version}, not tried", fine=False, remedy=f"pip install '{wanted}'")


def _wanted(name: str) -> Requirement:
    """What nmconvert was said to need of a package."""
    said = map(Requirement, metadata.requires("nmconvert") or ())
    return next((Requirement(f"{one.name}{one.specifier}") for one in said if one.name == name), Requirement(name))
