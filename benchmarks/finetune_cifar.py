"""ResNets on CIFAR-10: dense, one-shot, and after a few epochs of SR-STE, STE and a fixed mask.

    python benchmarks/data.py cifar10 work/cifar10.npz
    python -m benchmarks.finetune_cifar work --networks resnet20 --patterns 2:4,1:4 --epochs 3
    python -m benchmarks.finetune_cifar work --patterns 2:4,1:4 --starts magnitude,sparsegpt,auto --epochs 5

The published checkpoints are pruned and fine-tuned by the functions behind `nmconvert prune` and `nmconvert finetune`; the
teacher is the dense checkpoint, and no label is used. Training starts from the dense weights (``--starts dense``), or from what
magnitude, sequential SparseGPT as published, or everything (``auto``) left, the last two calibrated on 512 unlabelled images.
Each result is one line of ``work/results.jsonl``; what is there already is not run again, and a run that was killed is resumed.
At the end the table is printed, in Markdown, with top-1 after every epoch: all of one schedule, whose rate falls to the last.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration import PLAIN
from benchmarks.data import CHECKPOINTS, ROOT
from nmconvert.calibrate.driver import DEFAULT
from nmconvert.calibrate.stage import Calibration
from nmconvert.cli.calibration import CalibrationData
from nmconvert.evaluate import load_model
from nmconvert.model import build
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.train import Settings, finetune

MODELS = Path(__file__).parents[1] / "sample_models" / "resnet.py"
RECIPES = {"sparsegpt": PLAIN, "auto": DEFAULT}


def pruned_by(start: str, work: Path, network: str, pattern: str, axis: Any) -> Path:
    """The checkpoint that training starts from; ``dense`` takes its masks by magnitude."""
    criterion = "magnitude" if start == "dense" else start
    output = work / f"{network}.{pattern.replace(':', '-')}.{axis}.{criterion}.th"
    if not output.exists():
        source, model = ROOT / "checkpoints" / CHECKPOINTS[network], f"{MODELS}:{network}"
        built, calibration = build(model, {}, trust=False), None
        if criterion in RECIPES:
            data = CalibrationData(str(work / "cifar10.npz"), "classification", {}, 512, 32, 0)
            batches = data.batches(source, built, partial(load_model, source, model, {}))
            calibration = Calibration(batches, RECIPES[criterion])
        prune(
            source,
            Pattern.parse(pattern),
            axis,
            output=output,
            criterion=criterion,
            model=built,
            calibration=calibration,
            settings={"model": model},
        )
    return output


def run(
    work: Path, network: str, pattern: str, axis: Any, start: str, method: Any, epochs: int, lr: float
) -> dict[str, Any]:  # fmt: skip
    """Prune and fine-tune once; the line of results.jsonl."""
    pruned = pruned_by(start, work, network, pattern, axis)
    settings = Settings(
        epochs=epochs, batch=128, lr=lr, precision="bf16", method=method, freeze_masks=0.3, save_minutes=3.0
    )  # fmt: skip
    result = finetune(
        pruned,
        "classification",
        str(work / "cifar10.npz"),
        settings,
        task_settings={"temperature": "4"},
        from_dense=start == "dense",
        output=work / f"{network}.{pattern.replace(':', '-')}.{axis}.{start}.{method}.{epochs}.th",
        resume=True,
        display=True,
    )
    tops = {row.label: row.metrics["top1"] for row in result.training.rows}
    facts = {"network": network, "pattern": pattern, "axis": axis, "start": start, "method": method, "epochs": epochs, "lr": lr}
    return {**facts, "dense": tops["dense"], "top1": [tops[str(epoch)] for epoch in ("start", *range(1, epochs + 1))]}


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table, a row for each run: top-1 of the dense model, of the start, and after every epoch."""
    names = ("network", "pattern", "axis", "start", "method", "lr")
    epochs = max(line["epochs"] for line in lines)
    heads = [*names, "dense", "start's top-1", *(f"epoch {epoch}" for epoch in range(1, epochs + 1))]
    text = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for line in lines:
        numbers = [f"{value:.2f}" for value in (line["dense"], *line["top1"])] + [""] * (epochs - line["epochs"])
        text.append(f"| {' | '.join([*(str(line[name]) for name in names), *numbers])} |")
    return "\n".join(text)


def main() -> None:
    """Run what is asked for and is not there yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder with cifar10.npz; results go there")
    parser.add_argument("--networks", default="resnet20")
    parser.add_argument("--patterns", default="2:4")
    parser.add_argument("--axes", default="channel")
    parser.add_argument("--starts", default="dense", help="of dense, magnitude, sparsegpt, auto")
    parser.add_argument("--methods", default="sr-ste")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results = asked.work / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    names = ("network", "pattern", "axis", "start", "method")
    lists = (getattr(asked, name).split(",") for name in ("networks", "patterns", "axes", "starts", "methods"))
    for chosen in product(*lists):
        facts: dict[str, Any] = dict(zip(names, chosen, strict=True)) | {"epochs": asked.epochs, "lr": asked.lr}
        if any(facts.items() <= line.items() for line in lines):
            continue
        lines.append(run(asked.work, **facts))
        with results.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
