"""Does a compressed file cost anything in stock onnxruntime? Speed and size against dense zeros, on a ResNet-50.

    python -m benchmarks.export_speed [--pattern 2:4] [--rounds 15] [--size 224] [--threads 1]

Builds a ResNet-50-shaped network (weights drawn at random: neither speed nor size looks at them), prunes it, exports it
dense and compressed, and runs the two files in turns. Prints one line of JSON:

``speed``    dense time / compressed time for one image, the median over rounds (1 is equal, more is faster), and its quartiles;
             with one thread that thread's own time, which a busy machine disturbs less
``weights``  packed bytes of the sparse weights / their dense bytes
``overhead`` what the compressed file holds besides packed weights, dense weights and biases / the file
``load``     seconds to open each file
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from benchmarks.models.resnet50 import resnet50
from nmconvert.export import export
from nmconvert.inputs import InputSpec
from nmconvert.onnx_graph import named_tensors
from nmconvert.pattern import Pattern
from nmconvert.prune import prune

CLASSIFIER = "22.weight"  # stays dense, as it would by the name that published checkpoints have for it


def open_session(path: Path, threads: int) -> tuple[onnxruntime.InferenceSession, float]:
    """A stock session, and the seconds that opening it took."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, time.perf_counter() - start


def interleaved(sessions: list[onnxruntime.InferenceSession], x: np.ndarray, rounds: int) -> list[list[float]]:
    """Seconds of each session in each round; whatever else the machine does hits all alike."""
    clock = time.thread_time if sessions[0].get_session_options().intra_op_num_threads == 1 else time.perf_counter
    feeds = [{session.get_inputs()[0].name: x} for session in sessions]
    seconds: list[list[float]] = [[] for _ in sessions]
    for number in range(rounds + 2):
        order = range(len(sessions)) if number % 2 else reversed(range(len(sessions)))
        for which in order:
            start = clock()
            sessions[which].run(None, feeds[which])
            if number >= 2:  # the first two warm up
                seconds[which].append(clock() - start)
    return seconds


def overhead(path: Path) -> float:
    """The share of a file that is no values, no mask, no dense weight and no bias."""
    total = path.stat().st_size
    data = sum(len(t.raw_data) for name, t in named_tensors(onnx.load(path)) if not name.startswith("nmconvert."))
    return (total - data) / total


def main() -> None:
    """Build, prune, export twice, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="export-speed-") as name:
        folder = Path(name)
        torch.manual_seed(0)
        torch.save(resnet50().eval().state_dict(), folder / "a.pt")
        pruned = prune(folder / "a.pt", Pattern.parse(arguments.pattern), exclude=[CLASSIFIER]).output
        inputs = [InputSpec(None, (1, 3, arguments.size, arguments.size))]
        model = "benchmarks.models.resnet50:resnet50"
        files = [export(pruned, flavour=f, model=model, inputs=inputs, dynamic={}) for f in ("dense", "compressed")]
        opened = [open_session(result.output, arguments.threads) for result in files]
        x = np.random.default_rng(0).standard_normal((1, 3, arguments.size, arguments.size)).astype(np.float32)
        dense, compressed = interleaved([session for session, _ in opened], x, arguments.rounds)
        ratios = sorted(one / other for one, other in zip(dense, compressed, strict=True))
        packed = files[1].compressed
        print(
            json.dumps(
                {
                    "pattern": arguments.pattern,
                    "speed": round(statistics.median(ratios), 4),
                    "quartiles": [round(q, 4) for q in (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4])],
                    "dense_ms": round(1000 * statistics.median(dense), 2),
                    "weights": round(packed.packed_bytes / packed.dense_bytes, 4),
                    "file": round(files[1].nbytes / files[0].nbytes, 4),
                    "overhead": round(overhead(files[1].output), 5),
                    "load": [round(seconds, 3) for _, seconds in opened],
                }
            )
        )


if __name__ == "__main__":
    main()
