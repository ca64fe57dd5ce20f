"""A result as one HTML page: its tables, its pictures and its JSON, with nothing to load from elsewhere.

The tables are those of the terminal (:mod:`nmconvert.report`), so that both always say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from nmconvert import __version__
from nmconvert.checkpoint.atomic import atomic_file

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1f2328; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 }
caption { text-align: left; font-weight: bold; padding: .3rem 0 }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere }
th { border-bottom: 2px solid #d1d9e0 } td { border-bottom: 1px solid #eaeef2 }
.right { text-align: right; font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto } pre { overflow: auto } footer { color: #59636e }
"""


def write_page(path: Path, title: str, result: Mapping[str, Any], shown: RenderableType, pictures: Sequence[str] = ()) -> None:
    """Write ``shown`` (tables, texts and groups of them), SVG texts ``pictures`` and ``result`` into ``path``, atomically."""
    with atomic_file(path) as file:
        file.write(page(title, result, shown, pictures).encode(errors="replace"))


def page(title: str, result: Mapping[str, Any], shown: RenderableType, pictures: Sequence[str] = ()) -> str:
    """The text of the page; ``title`` is the command that was run."""
    made = f"nmconvert {__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    machine = escape(json.dumps(result, indent=2, allow_nan=False), quote=False)
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>',
        f"</head><body><h1><code>{escape(title)}</code></h1>",
        *_elements(shown),
        *pictures,
        f"<details><summary>JSON</summary><pre>{machine}</pre></details><footer>{made}</footer></body></html>\n",
    ]
    return "\n".join(parts)


def _elements(shown: RenderableType) -> Iterator[str]:
    if isinstance(shown, Group):
        for part in shown.renderables:
            yield from _elements(part)
    elif isinstance(shown, Table):
        yield _table(shown)
    elif isinstance(shown, Text | str):
        if str(shown).strip():
            yield f"<p>{_inline(shown)}</p>"
    else:
        raise TypeError(f"no HTML for a {type(shown).__name__}: make it a Table, a Text or a Group of them")


def _table(table: Table) -> str:
    sides = [' class="right"' if column.justify == "right" else "" for column in table.columns]
    caption = f"<caption>{_inline(table.title)}</caption>" if isinstance(table.title, Text | str) and table.title else ""
    head = "".join(f"<th{side}>{_inline(column.header)}</th>" for side, column in zip(sides, table.columns, strict=True))
    rows = (
        "<tr>" + "".join(f"<td{side}>{_inline(cell)}</td>" for side, cell in zip(sides, cells, strict=True)) + "</tr>"
        for cells in zip(*(column.cells for column in table.columns), strict=True)
    )
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _inline(cell: RenderableType) -> str:
    """A cell or a line, with the style of the whole of it."""
    if not isinstance(cell, Text):
        return escape(str(cell))
    css = Style.parse(str(cell.style)).get_html_style() if cell.style else ""
    return f'<span style="{escape(css)}">{escape(cell.plain)}</span>' if css else escape(cell.plain)
