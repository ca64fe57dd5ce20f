"""The HTML page of a result: the same cells as on the terminal, whole in one file, and harmless whatever the names are."""

from __future__ import annotations

import html
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Group
from rich.text import Text

from nmconvert.page import page, write_page
from nmconvert.report import new_table

VOID = {"meta", "path", "rect", "circle"}


class Reader(HTMLParser):
    """Cells, paragraphs, and everything that would load something; a tag that is closed wrongly raises."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.loaded: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [tag for name, _ in attrs if name in ("src", "href")] + [tag] * (tag in ("script", "link", "img"))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data


def shown() -> Group:
    table = new_table("Layers <b>", "tensor", "density", right=("density",))
    table.add_row("<script>alert(1)</script>", "50.0%")
    table.add_row(Text("conv & 'co'", style="bold red"), "25.0%")
    return Group(table, Text(), Text("2 tensors"))


def test_every_cell_is_there_and_nothing_is_loaded() -> None:
    result = {"name": "</pre><script>", "values": [1, None]}
    read = Reader(page("nmconvert prune 'a b.pt'", result, shown(), ["<svg xmlns='http://www.w3.org/2000/svg'></svg>"]))
    assert read.texts["td"] == ["<script>alert(1)</script>", "50.0%", "conv & 'co'", "25.0%"]
    assert read.texts["th"] == ["tensor", "density"]
    assert read.texts["caption"] == ["Layers <b>"]
    assert read.texts["p"] == ["2 tensors"]
    assert read.texts["h1"] == ["nmconvert prune 'a b.pt'"]
    assert json.loads(html.unescape(read.texts["pre"][0])) == result
    assert "svg" in read.texts
    assert read.loaded == []


def test_styles_and_sides() -> None:
    text = page("x", {}, shown())
    assert 'class="right">25.0%' in text
    assert "font-weight: bold" in text.split("conv &amp;")[0].rsplit("<span", 1)[1]


def test_what_has_no_html_is_refused_before_the_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(TypeError, match="no HTML for a int"):
        write_page(path, "x", {}, Group(3))  # type: ignore[arg-type]
    assert path.read_text() == "old"
