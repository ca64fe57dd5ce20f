"""The README says what the code does: its reference is --help, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import click
import pytest

import nmconvert
from docs.reference import README, updated
from nmconvert.cli import COMMANDS, group

ROOT = README.parent
DOCUMENTS = [README, ROOT / "sample_models" / "README.md", ROOT / "CHANGELOG.md"]
TEXT = README.read_text("utf-8")


def test_reference_is_the_help() -> None:
    assert updated(TEXT) == TEXT, "run make docs"


def test_reference_needs_its_markers() -> None:
    with pytest.raises(ValueError, match="lacks a line"):
        updated("# nmconvert")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", document.read_text("utf-8"))
    missing = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert missing == []


def shell_lines() -> list[str]:
    """The lines of the README's ``sh`` blocks that call nmconvert or make, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = chain.from_iterable(block.replace("\\\n", " ").splitlines() for block in blocks)
    return [line.partition(" #")[0].strip() for line in lines if re.match(r"(nmconvert|make) ", line)]


def test_commands_in_the_text_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    for line in shell_lines():
        program, name, *rest = line.split()
        if program == "make":
            assert name in targets, line
            continue
        command = group.get_command(click.Context(group), name)
        assert command is not None, line
        known = set(chain.from_iterable(p.opts for p in command.params if isinstance(p, click.Option)))
        assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= known, line


def test_changelog_has_this_version_or_is_unreleased() -> None:
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert headings[0] in {"Unreleased", nmconvert.__version__}


def test_every_command_is_in_the_reference() -> None:
    assert [name for name in COMMANDS if f"### nmconvert {name}\n" not in TEXT] == []
