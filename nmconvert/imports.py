"""What a person names as ``package.module:name`` or ``path/to/file.py:name``, imported.

Naming something runs it, and what is run is somebody's program: it can raise anything, which becomes one line.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from nmconvert.errors import NmconvertError, UsageError, one_line


@dataclass(frozen=True)
class ImportPath:
    """``name`` in the module or the file ``where``; errors are of class ``error`` and begin with ``said``."""

    where: str
    name: str
    said: str
    error: type[NmconvertError]

    @classmethod
    def parse(cls, spec: str, said: str, error: type[NmconvertError]) -> ImportPath | None:
        """What ``spec`` names; None where it has neither form."""
        where, _, name = spec.rpartition(":")
        if not where or not all(part.isidentifier() for part in name.split(".")):
            return None
        return cls(where, name, said, error)

    @contextmanager
    def running(self, doing: str) -> Iterator[None]:
        """Modules of the current folder, and those beside a named file, can be imported, as with ``python -m``.

        Raises:
            NmconvertError: of class ``error``, for whatever the program raises; ``doing`` says at what. Ours pass.
        """
        before = sys.path[:]
        sys.path[:0] = [str(Path(self.where).resolve().parent)] if self.where.endswith(".py") else [str(Path.cwd())]
        try:
            yield
        except NmconvertError:
            raise
        except (Exception, SystemExit) as error:
            raise self.error(f"{self.said}: {doing} failed with {brief(error)}; --debug shows where") from error
        finally:
            sys.path[:] = before

    def load(self) -> Any:
        """What is named.

        Raises:
            UsageError: it is not there.
            NmconvertError: of class ``error``, where importing it fails.
        """
        with self.running("importing it"):
            value: Any = self._module()
        place = self.where
        for part in self.name.split("."):
            if not hasattr(value, part):
                close = get_close_matches(part, dir(value), 1)
                hint = f"did you mean '{close[0]}'?" if close else "see what it defines"
                raise UsageError(f"{self.said}: there is no '{part}' in {place}; {hint}")
            value, place = getattr(value, part), part
        return value

    def _module(self) -> ModuleType:
        try:
            return self._file() if self.where.endswith(".py") else importlib.import_module(self.where)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if self.where == missing or self.where.startswith(f"{missing}."):
                remedy = "install it, run from the folder that holds it, or give path/to/file.py:callable"
                raise UsageError(f"{self.said}: there is no module '{missing}'; {remedy}") from error
            remedy = f"which is not installed: pip install {missing}"
            raise self.error(f"{self.said}: it imports '{missing}', {remedy}") from error

    def _file(self) -> ModuleType:
        path = Path(self.where)
        if not path.is_file():
            raise UsageError(f"{self.said}: there is no file {path}")
        name = f"nmconvert_file_{path.stem}"
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # dataclasses and pickle look their module up there
        specification.loader.exec_module(module)
        return module


def file_of(spec: str) -> Path:
    """The file that ``spec`` names, or that holds the program that it names, in the current folder."""
    named = ImportPath.parse(spec, spec, NmconvertError)
    if named is None:
        return Path(spec)
    return Path(named.where) if named.where.endswith(".py") else Path(*named.where.split(".")).with_suffix(".py")


def brief(error: BaseException) -> str:
    """An error as a part of one line."""
    return f"{type(error).__name__}: {one_line(error)}"
