"""The README's picture, a real run in a terminal: ``python -m docs.record`` runs the demo and writes ``demo.svg``."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
WIDTH = 120


def record(program: list[str]) -> str:
    """Run ``program`` and draw what a terminal of ``WIDTH`` columns would show, as SVG; raises CalledProcessError."""
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    run = subprocess.run(program, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), ("make demo", "bold")))
    console.print(Text.from_ansi(run.stdout))
    return console.export_svg(title="nmconvert", unique_id="nmconvert")


if __name__ == "__main__":
    (HERE / "demo.svg").write_text(record([sys.executable, "-m", "sample_models.demo"]), "utf-8")
