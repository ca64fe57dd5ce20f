"""Whole models: the sparse file on the kernels ÷ the dense file in stock onnxruntime with all its optimisations.

    python -m benchmarks.kernels_models --models resnet50,bert --patterns 2:4,1:4 --threads 1,2 --batch 1 --keep /tmp/models

The models have random weights in the shapes of the real ones: speed does not depend on their values. All convolutions but the
first and all linear layers of a model are pruned by magnitude, the embeddings are not. Both files come from the same traced
graph; OpenVINO (``--peers openvino,torch``; at float32) reads the dense file, torch runs the module. All take turns, in
rounds. Times and the first ratio are medians of the turns in which neighbours left the machine alone (quiet.py): rounds go on
until each has had enough of these, or until the seconds are over. After it the median of all rounds' own ratios, with
quartiles, and the ratio of the fastest turns. With one thread processor time is taken, which does not count what other
processes use; with more, wall time. Prints the rows of a Markdown table. What loading costs: load.py.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks.models.resnet50 import resnet50
from benchmarks.quiet import Probe
from nmconvert import runtime
from nmconvert.export.compress import compress
from nmconvert.export.find import sparse_layers
from nmconvert.export.fuse import fuse
from nmconvert.export.narrow import round_weights
from nmconvert.export.trace import trace
from nmconvert.inputs import InputSpec, example_feed
from nmconvert.masks import nm_mask
from nmconvert.matrix import Kind, MatrixView
from nmconvert.pattern import Pattern
from sample_models.resnet import resnet20, resnet56


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

    config = BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=4 * width
    )
    return Encoder(BertModel(config, add_pooling_layer=False))


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


FULL = "float32"  # how weights are stored that are not rounded


def prune(module: nn.Module, pattern: Pattern) -> nn.Module:
    """Zero all but the largest n of m weights, along the input channels, in every layer but a stem of 3 channels."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[1] != 3:
            kind: Kind = "linear" if isinstance(layer, nn.Linear) else "conv"
            view = MatrixView.of(kind, layer.weight.shape, "channel")
            mask = nm_mask(view.to_matrix(layer.weight.detach()).abs(), pattern)
            layer.weight.data *= view.from_matrix(mask)
    return module.eval()


def build(name: str, pattern: Pattern) -> nn.Module:
    """The module, pruned."""
    torch.manual_seed(0)
    return prune(MODELS[name][0](), pattern)


def write(name: str, pattern: Pattern, batch: int, folder: Path, values: str = FULL) -> tuple[Path, Path]:
    """The dense and the sparse file of one model, where they are not there yet; ``values`` is the type of the kept weights."""
    dense, sparse = folder / "dense.onnx", folder / f"sparse{'' if values == FULL else f'.{values}'}.onnx"
    if not sparse.exists():
        specs = [InputSpec.parse(text.format(batch=batch)) for text in MODELS[name][1]]
        model = trace(build(name, pattern), specs, {}).model
        onnx.save(model, dense)
        rounded = round_weights(model, sparse_layers(model, [(pattern, "channel")]), values) if values != FULL else {}
        compress(model, [(pattern, "channel")], quantized=rounded if values == "int8" else ())
        fuse(model)
        onnx.save(model, sparse)
    return dense, sparse


Run = Callable[[], object]


def contestants(
    name: str, pattern: Pattern, files: tuple[Path, Path], feed: dict[str, Any], threads: int, layers: str, peers: Sequence[str]
) -> Iterator[tuple[str, Run]]:
    """Who takes turns: the dense file in onnxruntime first, the kernels, and those of ``peers``."""
    dense, sparse = files
    options = [onnxruntime.SessionOptions() for _ in range(2)]
    for made in options:
        made.intra_op_num_threads = threads
        made.log_severity_level = 3
        made.add_session_config_entry("session.force_spinning_stop", "1")
    stock = onnxruntime.InferenceSession(dense, options[0], providers=["CPUExecutionProvider"])
    ours = runtime.session(sparse, options[1], layers=layers)
    yield "dense", lambda: stock.run(None, feed)
    yield "kernels", lambda: ours.run(None, feed)
    if "openvino" in peers:
        import openvino

        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        request = openvino.Core().compile_model(dense, "CPU", hints).create_infer_request()
        yield "openvino", lambda: request.infer(feed, share_inputs=True)
    if "torch" not in peers:
        return
    module, tensors = build(name, pattern), [torch.from_numpy(array) for array in feed.values()]

    def run_torch() -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            module(*tensors)

    yield "torch", run_torch


class Turn(NamedTuple):
    """Seconds of a run, the mean of some, and whether neighbours left the machine alone."""

    seconds: float
    quiet: bool


Turns = dict[str, list[Turn]]


def race(runs: dict[str, Run], probe: Probe, *, rounds: int, seconds: float, threads: int) -> Turns:
    """Turns of 40 ms or more: rounds until each had ``rounds`` quiet turns or ``seconds`` are over, but ``rounds`` at least."""
    clock = time.process_time if threads == 1 else time.perf_counter
    repeats = {}
    for name, run in runs.items():
        run()
        begin = clock()
        run()
        repeats[name] = max(1, int(0.04 / (clock() - begin)))
    turns: Turns = {name: [] for name in runs}
    start = time.perf_counter()
    while len(turns["dense"]) < rounds or (time.perf_counter() - start < seconds and _fewest_quiet(turns) < rounds):
        for name, run in runs.items():
            if threads > 1:
                time.sleep(0.02)  # threads of the one before spin on for a while
            quiet = probe.quiet()
            if repeats[name] > 1:
                run()  # its weights back into the caches
            begin = clock()
            for _ in range(repeats[name]):
                run()
            turns[name].append(Turn((clock() - begin) / repeats[name], quiet and probe.quiet()))
    probe.leave()  # threads of later sessions would stay on the core of this one
    return turns


def _quiet(turns: Sequence[Turn]) -> list[float]:
    return [turn.seconds for turn in turns if turn.quiet]


def _fewest_quiet(turns: Turns) -> int:
    return min(len(_quiet(of_one)) for of_one in turns.values())


def row(name: str, pattern: str, batch: int, threads: int, turns: Turns) -> str:
    """The cells of ``COLUMNS``."""

    def quiet_ms(side: str) -> float:
        return median(_quiet(turns[side])) * 1e3 if _quiet(turns[side]) else float("nan")

    def best(side: str) -> float:
        return min(turn.seconds for turn in turns[side])

    dense, sparse = quiet_ms("dense"), quiet_ms("kernels")
    low, middle, high = quantiles([d.seconds / s.seconds for d, s in zip(turns["dense"], turns["kernels"], strict=True)], n=4)
    cells = [
        name,
        pattern,
        batch,
        threads,
        f"{dense:.2f}",
        f"{sparse:.2f}",
        f"**{dense / sparse:.2f}** ({_fewest_quiet(turns)} of {len(turns['dense'])})",
        f"{middle:.2f} ({low:.2f}–{high:.2f})",
        f"{best('dense') / best('kernels'):.2f}",
        *(f"{dense / quiet_ms(peer):.2f}" if peer in turns else "" for peer in ("openvino", "torch")),
    ]
    return f"| {' | '.join(map(str, cells))} |"


COLUMNS = (
    "model",
    "pattern",
    "batch",
    "threads",
    "dense ms",
    "kernels ms",
    "dense ÷ kernels in quiet turns (how many)",
    "in all rounds",
    "best",
    "dense ÷ OpenVINO",
    "dense ÷ torch",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--patterns", default="2:4,1:4,1:16")
    parser.add_argument("--values", default=FULL, help="Types of the kept weights: float32, float16, bfloat16, int8.")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--layers", default="auto", choices=("auto", "sparse"))
    parser.add_argument("--peers", default="torch", help="who else takes turns: openvino, torch, both, or nobody")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--keep", type=Path, help="Folder of the models' files, written where they are not there.")
    chosen = parser.parse_args(arguments)
    probes = {threads: Probe(threads) for threads in map(int, chosen.threads.split(","))}
    print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for name, batch, pattern, values in product(
            *(given.split(",") for given in (chosen.models, chosen.batch, chosen.patterns, chosen.values))
        ):
            folder = (chosen.keep or Path(scratch)) / f"{name}.{pattern.replace(':', '-')}.b{batch}"
            folder.mkdir(parents=True, exist_ok=True)
            files = write(name, Pattern.parse(pattern), int(batch), folder, values)
            label = pattern if values == FULL else f"{pattern}, {values}"
            feed = example_feed(onnx.load(files[0]))
            for threads, probe in probes.items():
                peers = [peer for peer in chosen.peers.split(",") if peer]
                runs = dict(contestants(name, Pattern.parse(pattern), files, feed, threads, chosen.layers, peers))
                turns = race(runs, probe, rounds=chosen.rounds, seconds=chosen.seconds, threads=threads)
                print(row(name, label, int(batch), threads, turns), flush=True)


if __name__ == "__main__":
    main()
