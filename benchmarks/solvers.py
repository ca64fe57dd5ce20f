"""Time and memory of pruning one layer against its inputs: every solver, in a process of its own.

    python -m benchmarks.solvers --sizes 4096x4096 --patterns 2:4 --methods sparsegpt,exact,admm,auto

Weights and inputs are random, the inputs correlated; the layer is solved against dense outputs (a Hessian and a cross moment).
The error is the squared error of the output relative to its energy. Peak memory is that of the process, its imports and the two
moments of [K, K] in float64 included.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from itertools import product

import torch

from nmconvert.pattern import Pattern
from nmconvert.solvers.sparsegpt import METHODS, solve


def measure(rows: int, columns: int, pattern: Pattern, method: str) -> str:
    """One line of the table."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns) / 2
    x = torch.randn(columns + 512, columns, generator=generator) @ mix
    hessian = (x.T @ x / len(x)).double()
    del x, mix
    weight = torch.randn(rows, columns, generator=generator)
    wall, cpu = time.perf_counter(), time.process_time()
    solution = solve(weight, hessian, pattern, method=method, cross=hessian.clone())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    error = float(solution.error.sum()) / solution.signal
    return f"| {rows}×{columns} | {pattern} | {method} | {wall:.1f} | {cpu:.1f} | {peak:.2f} | {error:.4f} |"


def main() -> None:
    """Print the table, a line as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4096x4096", help="rows x columns")
    parser.add_argument("--patterns", default="2:4")
    parser.add_argument("--methods", default="exact,auto", help=f"among {', '.join(METHODS)}")
    parser.add_argument("--line", action="store_true", help="print the line of the one case alone")
    asked = parser.parse_args()
    cases = list(product(asked.sizes.split(","), asked.patterns.split(","), asked.methods.split(",")))
    if asked.line:
        size, pattern, method = cases[0]
        rows, columns = map(int, size.split("x"))
        print(measure(rows, columns, Pattern.parse(pattern), method))
        return
    print(f"{torch.get_num_threads()} threads\n\n| layer | pattern | solver | s | cpu s | GB | error |")
    print(f"|{'---|' * 7}", flush=True)
    for size, pattern, method in cases:
        case = ["--sizes", size, "--patterns", pattern, "--methods", method, "--line"]
        subprocess.run([sys.executable, "-m", "benchmarks.solvers", *case], check=True)


if __name__ == "__main__":
    main()
