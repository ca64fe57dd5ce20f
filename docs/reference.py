"""What of the README is written from the code: its list of modules and its command reference; ``python -m docs.reference``."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import click

import nmconvert
from docs.rooms import ROOMS
from nmconvert.cli import COMMANDS, group

README = Path(__file__).parent.parent / "README.md"
PACKAGE = Path(nmconvert.__file__).parent
WIDTH = 100


def modules(rooms: Sequence[Sequence[str]] = ROOMS) -> str:
    """Markdown: a table of the modules, from the top of the house to its cellar, each with what its docstring says first."""
    rows = ["| `nmconvert/` | |", "|---|---|"]
    for room in (room for row in rooms for room in row):
        folder = PACKAGE / room
        path, name = (folder / "__init__.py", f"{room}/") if folder.is_dir() else (PACKAGE / f"{room}.py", f"{room}.py")
        rows.append(f"| `{name}` | {first_sentence(path)} |")
    return "\n".join(rows) + "\n"


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, reStructuredText turned into Markdown."""
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    sentence = " ".join(docstring.split("\n\n")[0].split()).partition(". ")[0].rstrip(".:")
    return re.sub(r":\w+:`", "`", sentence).replace("``", "`").replace("|", "\\|")


def reference() -> str:
    """Markdown: the help of ``nmconvert``, then of each command in the order of its list."""
    root = _context(group, "nmconvert")
    root.help_option_names = group.context_settings["help_option_names"]  # the commands inherit it
    parts = [_block(group.get_help(root))]
    for name in COMMANDS:
        command = group.get_command(root, name)
        assert command is not None
        parts.append(f"### nmconvert {name}\n\n" + _block(command.get_help(_context(command, name, root))))
    return "\n".join(parts)


def updated(readme: str) -> str:
    """``readme`` with what stands between its markers written anew; raises ValueError where a marker is missing."""
    return _between(_between(readme, "modules", modules()), "commands", reference())


def _between(readme: str, part: str, text: str) -> str:
    begin, end = (f"<!-- {part}, written by `make docs`: {edge} -->\n" for edge in ("begin", "end"))
    before, found, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{README} lacks the line {begin.strip()!r} or {end.strip()!r}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH)


def _block(text: str) -> str:
    lines = (line.rstrip() for line in text.splitlines())
    return "```text\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    README.write_text(updated(README.read_text("utf-8")), "utf-8")
