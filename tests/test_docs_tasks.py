"""docs/tasks.md lists every setting of every task, with the default that the code has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from nmconvert.tasks import TASKS

TEXT = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text("utf-8")


@pytest.mark.parametrize("name", TASKS)
def test_every_setting_is_listed_with_its_default(name: str) -> None:
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1 + list(TASKS).index(name)]
    assert section.startswith(f"{name} — ")
    if name == "segmentation":
        assert [f.name for f in dataclasses.fields(TASKS[name])] == [f.name for f in dataclasses.fields(TASKS["detection"])]
        return
    rows = {}
    for names, default in re.findall(r"^\| (`.*?) \| (.*?) \|", section, flags=re.MULTILINE):
        said = re.findall(r"`(\w+)`", default) or [default] * 2
        rows |= dict(zip(re.findall(r"`(\w+)`", names), said, strict=False))
    fields = {field.name: field.default for field in dataclasses.fields(TASKS[name])}
    assert set(rows) == set(fields)
    for setting, default in fields.items():
        if isinstance(default, bool | str):
            assert rows[setting] == str(default).lower()
        elif isinstance(default, int | float):
            assert float(rows[setting]) == default
