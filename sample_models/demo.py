"""``make demo``: prune, export and verify a small trained model, and measure it at each step; all files land in ``demo/``."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nmconvert.report import new_table, size

HERE = Path(__file__).parent
FILES = ("digits.pt", "digits.py", "digits.npz")

STEPS = (
    ("Keep 2 of every 4 weights, those of largest magnitude.", "nmconvert prune digits.pt --nm 2:4 --model digits.py:digits"),
    ("Write an ONNX file that holds only what was kept.", "nmconvert export digits.nm2-4.pt --onnx --input 1,1,8,8"),
    ("Prove that it is what it says.", "nmconvert verify digits.nm2-4.onnx --against digits.nm2-4.pt"),
)
MEASURED = (
    ("digits.pt", "as it was trained"),
    ("digits.nm2-4.pt", "2:4, one shot"),
    ("digits.nm2-4.onnx", "the same, compressed, in onnxruntime"),
)


def main() -> None:
    """Run every step in a fresh folder ``demo``, then measure every file; raises CalledProcessError where one fails."""
    folder = HERE.parent / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in FILES:
        shutil.copy(HERE / name, folder)
    console = Console()
    for why, command in STEPS:
        console.print(Text.assemble("\n", (why, "italic"), "\n", ("$ ", "bold green"), (command, "bold")))
        nmconvert(command, folder)
    console.print()
    console.print(comparison(folder))


def comparison(folder: Path) -> Table:
    """Size and accuracy of every file of ``MEASURED``, each measured by ``nmconvert eval``."""
    table = new_table("What happened, on 360 test images", "file", "what it is", "size", "top-1", right=("size", "top-1"))
    for name, what in MEASURED:
        command = f"nmconvert eval {name} --data digits.npz --model digits.py:digits --json"
        top1 = json.loads(nmconvert(command, folder, capture=True))["metrics"]["top1"]
        table.add_row(name, what, size((folder / name).stat().st_size), f"{top1:.2f} %")
    return table


def nmconvert(command: str, folder: Path, *, capture: bool = False) -> str:
    """Run ``command`` in ``folder`` with this Python; what it printed, where that is asked for."""
    program = [sys.executable, "-m", *shlex.split(command)]
    paths = filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))  # the checkout, installed or not
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    sys.stdout.flush()
    run = subprocess.run(
        program, cwd=folder, env=environment, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return run.stdout or ""


if __name__ == "__main__":
    main()
