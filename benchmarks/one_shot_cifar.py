"""ResNets on CIFAR-10, pruned in one shot: accuracy of the checkpoint and of the ONNX file, and how large the file is.

    python benchmarks/data.py cifar10 work/cifar10.npz
    python -m benchmarks.one_shot_cifar work --networks resnet20,resnet56 --patterns 2:4,4:8,1:4

Published checkpoints, magnitude, no data: the state that `nmconvert finetune` starts from. Sizes are those of two ONNX files of
the same pruned checkpoint, flavours ``compressed`` and ``dense``. The table is printed in Markdown.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.data import CHECKPOINTS, ROOT
from nmconvert.evaluate import evaluate
from nmconvert.export import export
from nmconvert.inputs import InputSpec
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.tasks import build_task

MODELS = Path(__file__).parents[1] / "sample_models" / "resnet.py"
HEADS = ("network", "pattern", "axis", "dense top-1", "pruned top-1", "ONNX top-1", "compressed kB", "dense kB", "ratio")


def top1(file: Path, work: Path, network: str) -> float:
    """Top-1 of a checkpoint or an ONNX file on the 10,000 test images."""
    task = build_task("classification")
    return evaluate(file, task, str(work / "cifar10.npz"), model=f"{MODELS}:{network}").metrics["top1"]


def measure(work: Path, network: str, pattern: str, axis: Any, dense: float) -> list[str]:
    """One row of the table; the files stay in ``work``."""
    name = f"{network}.{pattern.replace(':', '-')}.{axis}"
    source, model = ROOT / "checkpoints" / CHECKPOINTS[network], f"{MODELS}:{network}"
    pruned = prune(source, Pattern.parse(pattern), axis, output=work / f"{name}.th", settings={"model": model}).output
    size = {}
    for flavour in ("compressed", "dense"):
        exported = export(
            pruned, output=work / f"{name}.{flavour}.onnx", flavour=flavour, inputs=[InputSpec.parse("1,3,32,32")]
        )
        size[flavour] = exported.nbytes
    tops = (dense, top1(pruned, work, network), top1(work / f"{name}.compressed.onnx", work, network))
    sizes = (f"{size['compressed'] / 1000:.1f}", f"{size['dense'] / 1000:.1f}", f"{size['compressed'] / size['dense']:.1%}")
    return [network, pattern, axis, *(f"{value:.2f}" for value in tops), *sizes]


def main() -> None:
    """Measure what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder with cifar10.npz; files go there")
    parser.add_argument("--networks", default="resnet20")
    parser.add_argument("--patterns", default="2:4")
    parser.add_argument("--axes", default="channel,kernel")
    asked = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for network in asked.networks.split(","):
        dense = top1(ROOT / "checkpoints" / CHECKPOINTS[network], asked.work, network)
        for pattern, axis in product(asked.patterns.split(","), asked.axes.split(",")):
            print(f"| {' | '.join(measure(asked.work, network, pattern, axis, dense))} |", flush=True)


if __name__ == "__main__":
    main()
