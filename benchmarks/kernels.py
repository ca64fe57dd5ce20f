"""Layers alone: dense onnxruntime against the kernels, in interleaved rounds.

    python -m benchmarks.kernels [--threads 1] [--patterns 2:4,1:4] [--only linear] [--rounds 15] [--json out.json] [--grid]

With --grid, layers in sizes that suit sparse kernels least, narrow ones and such with few pixels or few tokens, instead of
those of the usual networks: where does registering the library alone, with no choice by measurement, run slower than dense?

One model holds one dense layer, another the same layer packed; they are run in turn, so that both meet the same neighbours.
With one thread its processor time is taken, which does not count what other processes use; with more, wall time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper

from nmconvert import runtime
from tests.runtime_models import layer, random_weight, tensor


@dataclass(frozen=True)
class Shape:
    """One layer: ``kind`` linear or conv, its weight, its input, and the stride of a convolution."""

    family: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    stride: int = 1

    @property
    def flops(self) -> int:
        """Of the dense product."""
        if len(self.weight) == 2:
            return 2 * prod(self.weight) * prod(self.x[:-1])
        pixels = self.x[0] * prod((size - 1) // self.stride + 1 for size in self.x[2:])
        return 2 * prod(self.weight) * pixels


def _linear(tokens: int) -> list[Shape]:
    weights = [(768, 768), (768, 3072), (3072, 768), (1024, 1024)]
    return [Shape(f"linear, {tokens} token{'s' if tokens > 1 else ''}", weight, (tokens, weight[0])) for weight in weights]


def _conv(kernel: int, batch: int) -> list[Shape]:
    sides = {
        3: [(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)],
        1: [(256, 64, 56), (128, 512, 28), (1024, 256, 14), (512, 2048, 7)],
    }[kernel]
    return [
        Shape(f"conv {kernel}×{kernel}, batch {batch}", (o, i, kernel, kernel), (batch, i, side, side)) for o, i, side in sides
    ]


SHAPES = [
    *_linear(1),
    *_linear(8),
    *_linear(64),
    *_linear(128),
    *_linear(256),
    Shape("linear 4096×4096, 1 token", (4096, 4096), (1, 4096)),
    *_conv(3, 1),
    *_conv(1, 1),
    *_conv(3, 8),
    *_conv(1, 8),
]


# Sizes from hardly anything to a few hundred megaflops.
GRID = [
    *(
        Shape(f"linear, {tokens} tokens", weight, (tokens, weight[0]))
        for tokens in (1, 4, 8, 16, 32, 64, 128)
        for weight in ((64, 64), (128, 512), (256, 256), (768, 768), (2048, 1000))
    ),
    *(
        Shape(f"conv {kernel}×{kernel}, side {side}", (outputs, inputs, kernel, kernel), (1, inputs, side, side))
        for kernel, widths in (
            (1, ((64, 64), (64, 256), (512, 128), (256, 1024), (2048, 512))),
            (3, ((16, 16), (64, 64), (256, 256))),
        )
        for side in (1, 2, 4, 7, 8, 14, 16, 28, 32)
        for outputs, inputs in widths
    ),
]


def sessions(shape: Shape, pattern: str, threads: int) -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    """The dense layer in stock onnxruntime, and the packed one on the kernels."""
    rng = np.random.default_rng(0)
    linear = len(shape.weight) == 2
    weight = random_weight(rng, "matmul" if linear else "conv", shape.weight, pattern)
    bias = rng.standard_normal(shape.weight[1] if linear else shape.weight[0]).astype(np.float32)
    attributes: dict[str, Any] = {}
    if not linear:
        pad = shape.weight[2] // 2
        attributes = {"strides": [shape.stride] * 2, "pads": [pad] * 4}
    sparse = layer("SparseLinear" if linear else "SparseConv", weight, list(shape.x), {"B": bias}, **attributes)
    nodes = [helper.make_node("Conv", ["x", "W", "B"], ["y"], **attributes)]
    if linear:
        nodes = [helper.make_node("MatMul", ["x", "W"], ["p"]), helper.make_node("Add", ["p", "B"], ["y"])]
    graph = helper.make_graph(
        nodes, "dense", sparse.graph.input, sparse.graph.output, [tensor("W", weight.dense), tensor("B", bias)]
    )
    dense = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    made = []
    for model, kernels in ((dense, False), (sparse, True)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if kernels:
            options.register_custom_ops_library(str(runtime.library()))
        made.append(onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]))
    return made[0], made[1]


def race(shape: Shape, pattern: str, threads: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round, dense and sparse; a round is long enough to be timed (2 ms)."""
    rng = np.random.default_rng(1)
    feed = {"x": rng.standard_normal(shape.x).astype(np.float32)}
    dense, sparse = sessions(shape, pattern, threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    expected, got = dense.run(None, feed)[0], sparse.run(None, feed)[0]
    assert np.abs(expected - got).max() < 1e-4 * np.abs(expected).max()
    start = clock()
    dense.run(None, feed)
    repeats = max(1, int(0.002 / (clock() - start)))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for session, record in zip((dense, sparse), times, strict=True):
            start = clock()
            for _ in range(repeats):
                session.run(None, feed)
            record.append((clock() - start) / repeats)
    return times[0][1:], times[1][1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line a layer, and the geometric means of each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patterns", default="2:4,1:4,1:16")
    parser.add_argument("--only", default="", help="families whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--grid", action="store_true", help="layers that suit sparse kernels least")
    parser.add_argument("--json")
    chosen = parser.parse_args(arguments)
    rows, summary = [], []
    for pattern in chosen.patterns.split(","):
        families: dict[str, list[tuple[float, float]]] = {}
        for shape in GRID if chosen.grid else SHAPES:
            if chosen.only not in shape.family:
                continue
            dense, sparse = race(shape, pattern, chosen.threads, chosen.rounds)
            ratio = median(d / s for d, s in zip(dense, sparse, strict=True))
            best = min(dense) / min(sparse)
            families.setdefault(shape.family, []).append((ratio, best))
            gflops = shape.flops / min(dense) / 1e9
            rows.append(
                {
                    **asdict(shape),
                    "pattern": pattern,
                    "threads": chosen.threads,
                    "dense_ms": min(dense) * 1e3,
                    "sparse_ms": min(sparse) * 1e3,
                    "median": ratio,
                    "best": best,
                }
            )
            print(
                f"{shape.family:28} {shape.weight!s:20} {pattern:5} dense {min(dense) * 1e3:8.3f} ms ({gflops:6.1f} GF/s)  "
                f"sparse {min(sparse) * 1e3:8.3f} ms  med {ratio:5.2f} best {best:5.2f}",
                flush=True,
            )
        for family, found in families.items():
            summary.append(
                {
                    "family": family,
                    "pattern": pattern,
                    "threads": chosen.threads,
                    "median": geometric_mean(m for m, _ in found),
                    "best": geometric_mean(b for _, b in found),
                }
            )
    for row in summary:
        print(f"{row['family']:28} {row['pattern']:5} med {row['median']:5.2f} best {row['best']:5.2f}")
    if chosen.json:
        with Path(chosen.json).open("w") as file:
            json.dump({"isa": runtime.kernels().isa, "layers": rows, "summary": summary}, file, indent=1)


if __name__ == "__main__":
    main()
