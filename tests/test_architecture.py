"""What holds across modules: which may import which, what is public, and what every command offers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import click
import pytest

import nmconvert
from docs.rooms import ROOMS
from nmconvert.cli import COMMANDS, group

PACKAGE = Path(nmconvert.__file__).parent

LEVEL = {room: level for level, rooms in enumerate(rooms for rooms in reversed(ROOMS)) for room in rooms}


def module_files() -> dict[str, Path]:
    """Dotted name below ``nmconvert`` → file; a package stands under its own name, ``nmconvert`` itself under ""."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = module_files()


def imported(tree: ast.AST) -> Iterator[str]:
    """Every name that is imported anywhere in the file, as module or module.name; not what only a type checker imports."""
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """The modules of ours that ``tree`` imports."""
    found = set()
    for name in imported(tree):
        if name == "nmconvert" or name.startswith("nmconvert."):
            inner = name.removeprefix("nmconvert").removeprefix(".")
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {name: own_imports(ast.parse(path.read_text("utf-8"))) - {name} for name, path in MODULES.items()}


def test_every_module_has_its_room() -> None:
    assert {room(name) for name in MODULES} - {""} == set(LEVEL)


def test_imports_run_downwards(graph: dict[str, set[str]]) -> None:
    upwards = [
        f"nmconvert.{name} imports nmconvert.{other}"
        for name, others in graph.items()
        for other in others - {""}
        if LEVEL[room(other)] > (LEVEL[room(name)] if name else -1)
    ]
    assert upwards == []


def test_no_import_cycle(graph: dict[str, set[str]]) -> None:
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert set(order) == set(MODULES)


def test_only_the_command_line_knows_click() -> None:
    users = {
        room(name)
        for name, path in MODULES.items()
        if any(module.partition(".")[0] == "click" for module in imported(ast.parse(path.read_text("utf-8"))))
    }
    assert users == {"cli"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_waits_for_no_heavy_import(arguments: list[str]) -> None:
    program = (
        "import sys, nmconvert.cli\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "nmconvert.cli.main()\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_public_names() -> None:
    assert set(nmconvert.__all__) == {"NmconvertError", "Pattern", "__version__", "session", "sparsify"}
    for name in nmconvert.__all__:
        assert getattr(nmconvert, name) is not None
    assert dir(nmconvert) == sorted(nmconvert.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pruned'"):
        nmconvert.pruned  # noqa: B018 (the access is what is tested)


def test_every_command_has_its_file_and_every_file_its_command() -> None:
    shared = {"__init__", "common", "calibration"}  # options that several commands take
    files = {path.stem for path in (PACKAGE / "cli").glob("*.py")} - shared
    assert files == {name.replace("-", "_") for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    assert command.help
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert [o.name for o in options if not o.help] == []
    assert {"--json", "--quiet", "--debug"} <= {flag for o in options for flag in o.opts}
