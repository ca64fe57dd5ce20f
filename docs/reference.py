"""The README's command reference, written from ``--help``: ``python -m docs.reference``."""

from __future__ import annotations

from pathlib import Path

import click

from nmconvert.cli import COMMANDS, group

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- written by `make docs`: begin -->\n"
END = "<!-- written by `make docs`: end -->\n"
WIDTH = 100


def reference() -> str:
    """Markdown: the help of ``nmconvert``, then of each command in the order of its list."""
    root = _context(group, "nmconvert")
    parts = [_block(group.get_help(root))]
    for name in COMMANDS:
        command = group.get_command(root, name)
        assert command is not None
        parts.append(f"### nmconvert {name}\n\n" + _block(command.get_help(_context(command, name, root))))
    return "\n".join(parts)


def updated(readme: str) -> str:
    """``readme`` with what stands between the two markers replaced; raises ValueError where a marker is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} lacks a line {BEGIN.strip()!r} or {END.strip()!r}")
    return f"{before}{begin}\n{reference()}\n{end}{after}"


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH)


def _block(text: str) -> str:
    lines = (line.rstrip() for line in text.splitlines())
    return "```text\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    README.write_text(updated(README.read_text("utf-8")), "utf-8")
