"""Every error that nmconvert raises on purpose.

    NmconvertError                   exit status 1
    ├── UsageError                   exit status 2: an argument is wrong or missing
    │   ├── PatternError             not an N:M pattern, or one that cannot be applied
    │   └── MissingExtraError        needs a package that is in an optional extra
    ├── CheckpointError              a file cannot be read, is damaged, or cannot be written
    │   └── UntrustedFileError       reading it would execute code from it
    ├── WeightError                  a tensor holds something that cannot be pruned or packed (NaN, wrong shape)
    ├── ModelError                   the module cannot be built, or does not fit its checkpoint
    ├── DataError                    data cannot be read, or is not what the task needs
    ├── ExportError                  no ONNX file could be made that passes its own checks
    ├── VerificationError            a file is not what it says
    └── KernelsUnavailableError      the native kernels were not built, or cannot run here

A message is one line: the name (file, tensor, layer), the number, and the remedy. The command line prints it and nothing
else; ``--debug`` adds the traceback.
"""

from __future__ import annotations

from collections.abc import Collection


class NmconvertError(Exception):
    """Base of all; the command line turns it into one line and ``exit_status``."""

    exit_status = 1


class UsageError(NmconvertError):
    """An argument is wrong, or one is missing."""

    exit_status = 2


class PatternError(UsageError, ValueError):
    """Not an N:M pattern, or one that cannot be applied."""


class MissingExtraError(UsageError, ImportError):
    """A package of an optional extra is needed; the message names ``pip install 'nmconvert[extra]'``."""


class CheckpointError(NmconvertError):
    """A file cannot be read, is damaged, or cannot be written."""


class UntrustedFileError(CheckpointError):
    """Reading this file would execute code from it, and ``--trust`` was not given."""


class WeightError(NmconvertError, ValueError):
    """A tensor holds something that cannot be pruned or packed."""


class ModelError(NmconvertError):
    """The module cannot be built, or does not fit its checkpoint."""


class DataError(NmconvertError):
    """Data cannot be read, or is not what the task needs."""


class ExportError(NmconvertError):
    """No ONNX file could be made that passes its own checks."""


class VerificationError(NmconvertError):
    """A file is not what it says."""


class KernelsUnavailableError(NmconvertError):
    """The native kernels were not built, or cannot run here."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException, most: int = 200) -> str:
    """All that it says as a part of one line, cut at ``most`` letters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def check_choice(what: str, given: str, choices: Collection[str]) -> None:
    """Hold an argument that takes one of a few words against them.

    Raises:
        UsageError: ``given`` is none of ``choices``.
    """
    if given not in choices:
        raise UsageError(f"{what} '{given}' is none of {', '.join(choices)}")
