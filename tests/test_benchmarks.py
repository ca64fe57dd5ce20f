"""Every benchmark can be imported, and measures nothing before it is asked to."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT) for pattern in ("*.py", "models/*.py") for path in (ROOT / "benchmarks").glob(pattern))
SILENT = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)


def test_there_are_files() -> None:
    assert {Path("benchmarks/data.py"), Path("benchmarks/models/resnet50.py")} <= set(FILES)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_benchmark_can_be_imported(file: Path) -> None:
    try:
        import_module(".".join(file.with_suffix("").parts))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if find_spec(package):  # it is there, so that what was imported from it is what went away
            raise
        pytest.skip(f"needs {package}, which is not installed")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_benchmark_only_defines_when_it_is_imported(file: Path) -> None:
    for statement in ast.parse((ROOT / file).read_text("utf-8")).body:
        says = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)  # docstrings
        called = isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"
        assert says or called or isinstance(statement, SILENT), f"{file}:{statement.lineno}"
