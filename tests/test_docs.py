"""The README says what the code does: its reference is --help, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import nmconvert
from docs.reference import README, updated
from nmconvert.cli import COMMANDS, group

ROOT = README.parent
DOCUMENTS = [README, ROOT / "sample_models" / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
TEXT = README.read_text("utf-8")


def test_reference_is_the_help() -> None:
    # In a process of its own: a command that another test called without its group keeps the help option that it had there.
    program = "import sys; from docs.reference import updated; text = sys.stdin.read(); sys.exit(updated(text) != text)"
    assert subprocess.run([sys.executable, "-c", program], input=TEXT, text=True, cwd=ROOT).returncode == 0, "run make docs"


def test_reference_needs_its_markers() -> None:
    with pytest.raises(ValueError, match="lacks the line"):
        updated("# nmconvert")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", document.read_text("utf-8"))
    missing = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert missing == []


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the digits model, its definition and its data; it is the current one."""
    for name in ("digits.pt", "digits.py", "digits.npz"):
        shutil.copy(ROOT / "sample_models" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_make_targets_in_the_text_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    used = re.findall(r"^make (\w+)", "".join(blocks("sh")), flags=re.MULTILINE)
    assert used
    assert set(used) <= set(targets)


def test_commands_in_the_text_run_as_printed(samples: Path) -> None:
    """And measure what the text says they do, to 1 %: training does not round the same way on every CPU."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("nmconvert ")]
    assert lines
    for line in lines:
        result = CliRunner().invoke(group, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, f"{line}: {result.exception or result.output}"
        if said := re.search(r"#.*?(\d+\.\d+) %", line):
            measured = re.search(r"^top1 +(\S+)", result.output, flags=re.MULTILINE)
            assert measured is not None, line
            assert float(measured[1]) == pytest.approx(float(said[1]), abs=1), line


def test_python_in_the_text_runs_as_printed(samples: Path) -> None:
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), {"__name__": "__main__"})
    weight = torch.load("digits.trained.pt")["features.1.0.weight"]
    kept = (weight.permute(0, 2, 3, 1).reshape(-1, 4) != 0).sum(dim=1)
    assert kept.max() == 2


def test_changelog_has_this_version_or_is_unreleased() -> None:
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert headings[0] in {"Unreleased", nmconvert.__version__}


def test_every_command_is_in_the_reference() -> None:
    assert [name for name in COMMANDS if f"### nmconvert {name}\n" not in TEXT] == []
