"""Whole models, node by node: the sum of the least times of their nodes, dense onnxruntime and the kernels in turn.

    python -m benchmarks.kernels_nodes --models resnet50,minilm --patterns 2:4 --library build/old.so --keep /tmp/models

For machines that neighbours never leave alone for as long as a model takes: a node is short, and in ten seconds of turns most
are met undisturbed once (two are too few). Times are those of onnxruntime's profiler; what lies between nodes, some
microseconds each, is in none of them. All packed layers run on the kernels. Each --library is another build of them, which
takes turns, too. Prints the rows of a Markdown table; with --layers also every node that takes the kernels more than a
hundredth of the whole.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from benchmarks.kernels_models import MODELS, write
from nmconvert import runtime
from nmconvert.inputs import example_feed
from nmconvert.pattern import Pattern

Least = dict[str, float]  # milliseconds of every node


def open_profiled(path: Path, library: Path | None, threads: int, profile: Path) -> onnxruntime.InferenceSession:
    """A session of stock onnxruntime, or of the kernels in ``library``, that writes a profile."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(profile)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def least_times(profile: Path) -> Least:
    """Of every node that onnxruntime's ``profile`` has runs of."""
    least: Least = {}
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            least[name] = min(event["dur"] / 1e3, least.get(name, float("inf")))
    return least


def race(sessions: Sequence[onnxruntime.InferenceSession], feed: dict[str, Any], seconds: float) -> tuple[list[Least], int]:
    """The least times of each session's nodes, in turns until ``seconds`` are over, and how many turns each had."""
    end = time.perf_counter() + seconds
    turns = 0
    while time.perf_counter() < end:
        turns += 1
        for session in sessions:
            session.run(None, feed)
    return [least_times(Path(session.end_profiling())) for session in sessions], turns


def main() -> None:
    """One row a model and pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--patterns", default="2:4,1:4,1:16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--library", type=Path, action="append", default=[], help="Another build of the kernels.")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--keep", type=Path, help="Folder of the models' files, written where they are not there.")
    given = parser.parse_args()
    libraries = [runtime.library(), *given.library]
    names = ["kernels", *(path.stem for path in given.library)]
    print("| model | pattern | batch | threads | turns | dense ms |", " | ".join(f"{name} ms | ratio" for name in names), "|")
    print("|" + "---|" * (6 + 2 * len(names)))
    with tempfile.TemporaryDirectory() as scratch:
        for name, pattern in product(given.models.split(","), given.patterns.split(",")):
            folder = (given.keep or Path(scratch)) / f"{name}.{pattern.replace(':', '-')}.b{given.batch}"
            folder.mkdir(parents=True, exist_ok=True)
            dense, sparse = write(name, Pattern.parse(pattern), given.batch, folder)
            files = [(dense, None), *((sparse, library) for library in libraries)]
            sessions = [
                open_profiled(path, library, given.threads, Path(scratch) / f"profile{number}")
                for number, (path, library) in enumerate(files)
            ]
            found, turns = race(sessions, example_feed(onnx.load(dense)), given.seconds)
            whole = [sum(least.values()) for least in found]
            cells = [name, pattern, given.batch, given.threads, turns, f"{whole[0]:.2f}"]
            cells += [f"{ms:.2f} | **{whole[0] / ms:.2f}**" for ms in whole[1:]]
            print("|", " | ".join(map(str, cells)), "|", flush=True)
            for node, ms in found[1].items() if given.layers else ():
                if ms > whole[1] / 100:
                    print(f"    {node}: " + ", ".join(f"{least.get(node, float('nan')):.3f}" for least in found[1:]))


if __name__ == "__main__":
    main()
