"""ResNets on CIFAR-10: dense, one-shot, and after a few epochs of SR-STE, STE and a fixed mask.

    python benchmarks/data.py cifar10 work/cifar10.npz
    python benchmarks/finetune_cifar.py work --networks resnet20 --patterns 2:4,1:4 --epochs 3

The published checkpoints are pruned and fine-tuned by the functions behind `nmconvert prune` and `nmconvert finetune`; the
teacher is the dense checkpoint, and no label is used. Each result is one line of ``work/results.jsonl``; what is there
already is not run again, and a run that was killed is resumed. At the end the table is printed, in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import torch

from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.train import Settings, finetune

ROOT = Path(os.environ.get("NMCONVERT_DATA", Path(__file__).parents[2] / "shared" / "data"))
CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th", "resnet56": "resnet56-4bfd9763.th"}
MODELS = Path(__file__).parents[1] / "sample_models" / "resnet.py"


def run(work: Path, network: str, pattern: str, axis: Any, method: Any, epochs: int, lr: float) -> dict[str, Any]:
    """Prune and fine-tune once; the line of results.jsonl."""
    name = f"{network}.{pattern.replace(':', '-')}.{axis}"
    pruned = work / f"{name}.th"
    if not pruned.exists():
        said = {"model": f"{MODELS}:{network}"}
        prune(ROOT / "checkpoints" / CHECKPOINTS[network], Pattern.parse(pattern), axis, output=pruned, settings=said)
    output = work / f"{name}.{method}.{epochs}.th"
    settings = Settings(
        epochs=epochs, batch=128, lr=lr, precision="bf16", method=method, freeze_masks=0.3, save_minutes=3.0
    )  # fmt: skip
    result = finetune(
        pruned,
        "classification",
        str(work / "cifar10.npz"),
        settings,
        task_settings={"temperature": "4"},
        from_dense=True,
        output=output,
        resume=True,
        display=True,
    )
    tops = {row.label: row.metrics["top1"] for row in result.training.rows}
    facts = {"network": network, "pattern": pattern, "axis": axis, "method": method, "epochs": epochs, "lr": lr}
    return {**facts, "dense": tops["dense"], "one-shot": tops["start"], "top1": tops[str(epochs)]}


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table, a row for each network, pattern, axis and number of epochs, a column for each method."""
    methods = list(dict.fromkeys(line["method"] for line in lines))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        key = tuple(line[k] for k in ("network", "pattern", "axis", "epochs", "dense", "one-shot"))
        rows.setdefault(key, {})[line["method"]] = line["top1"]
    heads = ["network", "pattern", "axis", "epochs", "dense", "one-shot", *methods]
    text = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for key, tops in rows.items():
        numbers = [f"{value:.2f}" for value in key[4:]] + [f"{tops[m]:.2f}" if m in tops else "" for m in methods]
        text.append(f"| {' | '.join([*map(str, key[:4]), *numbers])} |")
    return "\n".join(text)


def main() -> None:
    """Run what is asked for and is not there yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder with cifar10.npz; results go there")
    parser.add_argument("--networks", default="resnet20")
    parser.add_argument("--patterns", default="2:4")
    parser.add_argument("--axes", default="channel")
    parser.add_argument("--methods", default="sr-ste")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results = asked.work / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    lists = (getattr(asked, name).split(",") for name in ("networks", "patterns", "axes", "methods"))
    for network, pattern, axis, method in product(*lists):
        facts = {"network": network, "pattern": pattern, "axis": axis, "method": method, "epochs": asked.epochs, "lr": asked.lr}
        if any(facts.items() <= line.items() for line in lines):
            continue
        lines.append(run(asked.work, **facts))
        with results.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
