"""Whole models: the sparse file on the kernels ÷ the dense file in stock onnxruntime with all its optimisations.

    python -m benchmarks.kernels_models --models resnet50,bert --patterns 2:4,1:4 --threads 1,2 --batch 1 --json out.json

The models have random weights in the shapes of the real ones: speed does not depend on their values. All convolutions but the
first and all linear layers of a model are pruned by magnitude, the embeddings are not. Both files come from the same traced
graph. Rounds are interleaved; with one thread processor time is taken, which does not count what other processes use.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from nmconvert import runtime
from nmconvert.export.compress import compress
from nmconvert.export.fuse import fuse
from nmconvert.export.trace import trace
from nmconvert.inputs import InputSpec, example_feed
from nmconvert.masks import nm_mask
from nmconvert.matrix import MatrixView
from nmconvert.pattern import Pattern
from sample_models.resnet import resnet20, resnet56


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1, and a shortcut (He et al. 2015, figure 5 right)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """The rectified sum."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """In the shapes of torchvision's resnet50."""
    blocks: list[nn.Module] = []
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(count):
            blocks.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    stem = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Encoder(nn.Module):
    """The last hidden state of a Hugging Face model, from token ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """[N, T] → [N, T, width]."""
        hidden: Tensor = self.model(input_ids=input_ids, return_dict=False)[0]
        return hidden


def _bert(layers: int, width: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 12}
    return Encoder(BertModel(BertConfig(vocab_size=1000, **shape), add_pooling_layer=False))


class DecodeStep(nn.Module):
    """The blocks of GPT-2 small for one new token, with the keys and values of 128 tokens before it."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.project = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.merge = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x [1, 1, width], past [layers, 2, heads, 128, width / heads] → [1, 1, width]."""
        for layer, (project, merge, up, down) in enumerate(zip(self.project, self.merge, self.up, self.down, strict=True)):
            q, k, v = project(self.norms[2 * layer](x)).reshape(3, self.heads, 1, -1)
            keys, values = torch.cat([past[layer, 0], k], 1), torch.cat([past[layer, 1], v], 1)
            weights = torch.softmax(q @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5, -1)
            x = x + merge((weights @ values).reshape(1, 1, -1))
            x = x + down(nn.functional.gelu(up(self.norms[2 * layer + 1](x)), approximate="tanh"))
        return x


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet50": (resnet50, ["{batch},3,224,224"]),
    "bert": (lambda: _bert(12, 768), ["{batch},128:int64"]),
    "minilm": (lambda: _bert(6, 384), ["{batch},128:int64"]),
    "gpt2-step": (DecodeStep, ["1,1,768", "12,2,12,128,64"]),
    "resnet20": (resnet20, ["{batch},3,32,32"]),
    "resnet56": (resnet56, ["{batch},3,32,32"]),
}


def prune(module: nn.Module, pattern: Pattern) -> nn.Module:
    """Zero all but the largest n of m weights, along the input channels, in every layer but a stem of 3 channels."""
    kinds = {nn.Linear: "linear", nn.Conv2d: "conv"}
    for layer in module.modules():
        kind = kinds.get(type(layer))
        if kind is None or layer.weight.shape[1] == 3:
            continue
        view = MatrixView.of(kind, layer.weight.shape, "channel")  # type: ignore[arg-type]
        mask = nm_mask(view.to_matrix(layer.weight.detach()).abs(), pattern)
        layer.weight.data *= view.from_matrix(mask)
    return module.eval()


def write(name: str, pattern: Pattern, batch: int, folder: Path) -> tuple[Path, Path]:
    """The dense and the sparse file of one model."""
    build, shapes = MODELS[name]
    torch.manual_seed(0)
    specs = [InputSpec.parse(text.format(batch=batch)) for text in shapes]
    model = trace(prune(build(), pattern), specs, {}).model
    dense, sparse = folder / "dense.onnx", folder / "sparse.onnx"
    onnx.save(model, dense)
    compress(model, [(pattern, "channel")])
    fuse(model)
    onnx.save(model, sparse)
    return dense, sparse


def race(
    dense: Any, sparse: Any, feed: dict[str, Any], *, threads: int, rounds: int, seconds: float
) -> tuple[float, float, float, float]:
    """Dense ms, sparse ms (both the shortest round), median and spread (interquartile) of the ratios."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    for session in (dense, sparse):
        session.run(None, feed)
    start = time.perf_counter()
    while len(times[0]) < rounds or (time.perf_counter() - start < seconds and len(times[0]) < 200):
        for session, record in zip((dense, sparse), times, strict=True):
            begin = clock()
            session.run(None, feed)
            record.append(clock() - begin)
    ratios = sorted(d / s for d, s in zip(*times, strict=True))
    spread = (ratios[3 * len(ratios) // 4] - ratios[len(ratios) // 4]) / median(ratios)
    return min(times[0]) * 1e3, min(times[1]) * 1e3, median(ratios), spread


def load_cost(path: Path, *, kernels: bool) -> tuple[float, float]:
    """Seconds to make a session in a new process, and its peak memory in MB above that of the imports."""
    program = f"""
import time
from pathlib import Path
import onnxruntime
from nmconvert import runtime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
if {kernels}: options.register_custom_ops_library(str(runtime.library()))
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
start = time.process_time()
session = onnxruntime.InferenceSession({str(path)!r}, options, providers=["CPUExecutionProvider"])
print(time.process_time() - start, peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, result.stdout.split())
    return seconds, megabytes


def measure(name: str, pattern: str, batch: int, threads: Sequence[int], *, layers: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each number of threads."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense_file, sparse_file = write(name, Pattern.parse(pattern), batch, Path(folder))
        feed = example_feed(onnx.load(dense_file))
        costs = {"dense": load_cost(dense_file, kernels=False), "sparse": load_cost(sparse_file, kernels=True)}
        for count in threads:
            options = [onnxruntime.SessionOptions() for _ in range(2)]
            for made in options:
                made.intra_op_num_threads = count
                made.log_severity_level = 3
                made.add_session_config_entry("session.force_spinning_stop", "1")
            dense = onnxruntime.InferenceSession(dense_file, options[0], providers=["CPUExecutionProvider"])
            sparse = runtime.session(sparse_file, options[1], layers=layers)
            d, s, ratio, spread = race(dense, sparse, feed, threads=count, rounds=rounds, seconds=4.0)
            row = {
                "model": name,
                "pattern": pattern,
                "batch": batch,
                "threads": count,
                "dense_ms": d,
                "sparse_ms": s,
                "median": ratio,
                "best": d / s,
                "spread": spread,
                "dense_load_s": costs["dense"][0],
                "sparse_load_s": costs["sparse"][0],
                "dense_load_mb": costs["dense"][1],
                "sparse_load_mb": costs["sparse"][1],
                "dense_file_mb": dense_file.stat().st_size / 1e6,
                "sparse_file_mb": sparse_file.stat().st_size / 1e6,
            }
            rows.append(row)
            speed = f"dense {d:8.2f} ms  sparse {s:8.2f} ms  med {ratio:5.2f} ±{spread:4.0%} best {d / s:5.2f}"
            load = f"load {row['dense_load_s']:.2f} → {row['sparse_load_s']:.2f} s, "
            load += f"{row['dense_load_mb']:.0f} → {row['sparse_load_mb']:.0f} MB"
            print(f"{name:10} {pattern:5} batch {batch} threads {count}  {speed}   {load}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--patterns", default="2:4,1:4,1:16")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--layers", default="auto", choices=("auto", "sparse"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    chosen = parser.parse_args(arguments)
    rows = []
    for name in chosen.models.split(","):
        for batch in map(int, chosen.batch.split(",")):
            for pattern in chosen.patterns.split(","):
                threads = list(map(int, chosen.threads.split(",")))
                rows += measure(name, pattern, batch, threads, layers=chosen.layers, rounds=chosen.rounds)
    if chosen.json:
        content = {"isa": runtime.kernels().isa, "onnxruntime": onnxruntime.__version__, "rows": rows}
        Path(chosen.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
