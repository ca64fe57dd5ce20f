"""Pruning a large safetensors file: memory beyond the imports, and time against ``cp`` of the same file.

    python benchmarks/prune_large.py [--gigabytes 6] [--dtype float32] [--rounds 3] [--folder /tmp]

The limits are 1 GB of resident memory and twice the time of ``cp``. The file holds random tensors of the shapes of a
7-billion-parameter language model. Copies and prunes alternate, each into a new file, after a sync that leaves the disk idle.
nmconvert syncs what it writes before it renames it; ``cp`` does not, so that its time is given both without and with one; the
limit is for the one without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import ml_dtypes  # noqa: F401  (np.dtype knows bfloat16 by it)
import numpy as np

WIDTH, HIDDEN, VOCABULARY = 4096, 11008, 32000
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PRUNE = "import sys; from nmconvert.cli import main; sys.argv[0] = 'nmconvert'; main()"


def tensors(size: int, itemsize: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a llama-like model of about ``size`` bytes."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    written, layer = VOCABULARY * WIDTH * itemsize, 0
    while written < size:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{name}.weight", (WIDTH, WIDTH)
        yield f"model.layers.{layer}.mlp.gate_proj.weight", (HIDDEN, WIDTH)
        yield f"model.layers.{layer}.mlp.up_proj.weight", (HIDDEN, WIDTH)
        yield f"model.layers.{layer}.mlp.down_proj.weight", (WIDTH, HIDDEN)
        yield f"model.layers.{layer}.input_layernorm.weight", (WIDTH,)
        written += (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN + WIDTH) * itemsize
        layer += 1


def make(path: Path, size: int, dtype: str) -> None:
    """Write a safetensors file of random values, a block at a time."""
    header, offset = {}, 0
    itemsize = np.dtype(dtype).itemsize
    random = np.random.default_rng(0)
    for name, shape in tensors(size, itemsize):
        end = offset + prod(shape) * itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = offset
        while left:
            block = random.standard_normal(1 << 20, np.float32).astype(dtype).view(np.uint8)[:left]
            file.write(block.data)
            left -= len(block)


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident memory in bytes of a command, run when the disk is idle.

    Linux counts what this process holds when it forks as the command's, too: so torch is not imported here.
    """
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status != 0:
        raise SystemExit(f"{command[0]} failed")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    """Measure, print a table, and exit with 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--dtype", choices=list(NAMES), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measure(Path(name), int(arguments.gigabytes * 1e9), arguments.dtype, arguments.rounds)


def measure(folder: Path, size: int, dtype: str, rounds: int) -> None:
    """Alternate ``cp`` and ``nmconvert prune --nm 2:4``; see the module docstring."""
    small, large, copy, pruned = (folder / f"{name}.safetensors" for name in ("small", "large", "copy", "pruned"))
    make(large, size, dtype)
    header = {"w": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}
    text = json.dumps(header).encode()
    small.write_bytes(len(text).to_bytes(8, "little") + text + np.arange(64, dtype=np.float32).tobytes())
    prune = [sys.executable, "-c", PRUNE, "prune", "--quiet", "--nm", "2:4"]
    start, imports = timed([*prune, str(small), "--output", str(pruned)])
    cp, cp_sync, ours, memory = [], [], [], 0
    for _ in range(rounds):
        cp.append(timed(["cp", str(large), str(copy)])[0])
        copy.unlink()
        cp_sync.append(timed(["sh", "-c", f"cp '{large}' '{copy}' && sync '{copy}'"])[0])
        copy.unlink()
        seconds, peak = timed([*prune, str(large), "--output", str(pruned)])
        ours.append(seconds)
        memory = max(memory, peak - imports)
        pruned.unlink()
    ratios = [statistics.median(ours) / statistics.median(times) for times in (cp, cp_sync)]
    print(f"{large.stat().st_size / 1e9:.2f} GB of {dtype}, {rounds} rounds, {os.cpu_count()} cores")
    for what, times in (("cp", cp), ("cp and sync", cp_sync), ("nmconvert prune --nm 2:4", ours)):
        print(f"{what:26} {statistics.median(times):6.2f} s   ({', '.join(f'{t:.2f}' for t in times)})")
    print(f"{'of which start and imports':26} {start:6.2f} s")
    print(f"ratio {ratios[0]:.2f} to cp (limit 2), {ratios[1]:.2f} to cp and sync")
    print(f"memory {memory / 1e9:.2f} GB beyond the {imports / 1e9:.2f} GB of the imports (limit 1)")
    sys.exit(0 if ratios[0] <= 2 and memory <= 1e9 else 1)


if __name__ == "__main__":
    main()
