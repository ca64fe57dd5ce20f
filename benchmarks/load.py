"""What it takes to load a model: time to make the session, time of the first run, and peak memory.

    python -m benchmarks.load --models resnet50,bert,gpt2-step --patterns 2:4,1:4

The dense file in stock onnxruntime, the compressed one in stock onnxruntime (its functions are inlined and folded), and the
compressed one with the kernels registered, each in new processes of one thread; medians of several. Memory is what the process
peaks at above what it takes up before the session is made. Figures in kernels.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.kernels_models import write
from nmconvert.pattern import Pattern

WAYS = (("dense", "dense.onnx", False), ("folded", "sparse.onnx", False), ("kernels", "sparse.onnx", True))
PROGRAM = """
import json, sys, time
import numpy as np
import onnxruntime
from pathlib import Path
path, library = sys.argv[1], sys.argv[2]
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
if library: options.register_custom_ops_library(library)
before, start = peak(), time.perf_counter()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
made = time.perf_counter()
feed = {i.name: np.ones(i.shape, TYPES[i.type]) for i in session.get_inputs()}
session.run(None, feed)
first = time.perf_counter()
session.run(None, feed)
second = time.perf_counter()
print(json.dumps([made - start, first - made, second - first, peak() - before]))
"""


def load(path: Path, *, kernels: bool) -> tuple[float, float, float, float]:
    """Seconds to make a session, of the first and of the second run, and the peak in MB, in a process of its own."""
    from nmconvert import runtime

    command = [sys.executable, "-c", PROGRAM, str(path), str(runtime.library()) if kernels else ""]
    made, first, second, megabytes = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return made, first, second, megabytes


def measure(name: str, pattern: str, folder: Path, rounds: int) -> None:
    """Print one row for each way of loading."""
    if not (folder / "sparse.onnx").exists():
        write(name, Pattern.parse(pattern), 1, folder)
    found: dict[str, list[tuple[float, float, float, float]]] = {way: [] for way, _, _ in WAYS}
    for _ in range(rounds):
        for way, file, kernels in WAYS:
            found[way].append(load(folder / file, kernels=kernels))
    for way, file, _ in WAYS:
        made, first, second, megabytes = (median(values) for values in zip(*found[way], strict=True))
        size = (folder / file).stat().st_size / 1e6
        cells = [
            f"{size:.0f}",
            f"{made:.2f}",
            f"{first * 1e3:.0f}",
            f"{second * 1e3:.0f}",
            f"{made + first:.2f}",
            f"{megabytes:.0f}",
        ]
        print(f"| {name} {pattern}, {way} | " + " | ".join(cells) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet50,bert,gpt2-step")
    parser.add_argument("--patterns", default="2:4,1:4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="Folder of the models' files, written where they are not there.")
    chosen = parser.parse_args(arguments)
    columns = ["model", "file MB", "session s", "first run ms", "second run ms", "session + first s", "peak MB"]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen.models.split(","):
            for pattern in chosen.patterns.split(","):
                folder = (chosen.keep or Path(scratch)) / f"{name}.{pattern.replace(':', '-')}.b1"
                folder.mkdir(parents=True, exist_ok=True)
                measure(name, pattern, folder, chosen.rounds)


if __name__ == "__main__":
    main()
