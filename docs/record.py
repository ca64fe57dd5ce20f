"""The README's picture, a real run in a terminal: ``python -m docs.record`` runs the commands and writes ``demo.svg``."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "sample_models"
WIDTH = 110

COMMANDS = (
    "nmconvert prune digits.pt --nm 2:4 --model digits.py:digits",
    "nmconvert export digits.nm2-4.pt --onnx --input 1,1,8,8",
    "nmconvert verify digits.nm2-4.onnx",
)


def record(commands: tuple[str, ...], folder: Path) -> str:
    """Run ``commands`` in ``folder`` and draw what a terminal would show, as SVG; raises CalledProcessError."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    for command in commands:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        program = [sys.executable, "-m", *shlex.split(command)]
        run = subprocess.run(program, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        console.print(Text.from_ansi(run.stdout))
    return console.export_svg(title="nmconvert", unique_id="nmconvert")


def main() -> None:
    """Record the three commands on the digits model."""
    with TemporaryDirectory() as folder:
        for name in ("digits.pt", "digits.py", "digits.npz"):
            shutil.copy(SAMPLES / name, folder)
        picture = record(COMMANDS, Path(folder))
    (HERE / "demo.svg").write_text(picture, "utf-8")


if __name__ == "__main__":
    main()
