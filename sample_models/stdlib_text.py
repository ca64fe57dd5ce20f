"""The text of Python's own standard library, as ``train.txt`` and ``val.txt``: ``python -m sample_models.stdlib_text OUT``.

Some 5 MB of source code; it differs a little between versions of Python. With ``--excerpt``, ``train.txt`` has the first
600 kB: enough to fine-tune in a minute.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

VAL = (
    "bisect",
    "calendar",
    "colorsys",
    "csv",
    "fractions",
    "glob",
    "queue",
    "sched",
    "shlex",
    "statistics",
    "string",
    "textwrap",
)
EXCERPT = 600_000


def write(out: Path, most: int | None = None) -> None:
    """The modules named above in ``val.txt``, all others of the library's top folder in ``train.txt``, ``most`` characters."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        sys.exit("this Python has no standard library in source form")
    out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        chosen = [f.read_text("utf-8") for f in files if (f.stem in VAL) == (part == "val")]
        (out / f"{part}.txt").write_text("\n".join(chosen)[: most if part == "train" else None], encoding="utf-8")


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--excerpt"]
    if len(arguments) != 1:
        sys.exit("usage: python -m sample_models.stdlib_text [--excerpt] OUT")
    write(Path(arguments[0]), EXCERPT if "--excerpt" in sys.argv else None)
