"""Packages that only some tasks need, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from nmconvert.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which the optional extra ``extra`` of nmconvert installs.

    Raises:
        MissingExtraError: it is not installed; the message says what installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        package = module.partition(".")[0]
        raise MissingExtraError(f"this needs the package '{package}': pip install 'nmconvert[{extra}]'") from error
