"""The dense models of the real-data benchmarks that nobody published: trained here first, pruned afterwards.

    python benchmarks/data.py bccd DATA/bccd        (and nuclei, multi30k, tinyshakespeare)
    python -m benchmarks.dense bccd DATA OUT        → OUT/bccd.pt, and its metric on the test part

The modules are those of sample_models, in the sizes below; `nmconvert` finds them as ``benchmarks.dense:bccd``, ….
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import DataLoader

from nmconvert.tasks import Task, build_task
from sample_models.detector import Detector
from sample_models.gpt import GPT
from sample_models.segmenter import Segmenter
from sample_models.translator import Translator

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]  # in the order that sample_models/translator.py names
WORDS = 6000


def bccd() -> nn.Module:
    """Cells in blood: three classes, up to 48 an image."""
    return Detector(classes=3, width=32, detections=48)


def nuclei() -> nn.Module:
    """Nuclei of cells: one class, up to 100 an image."""
    return Segmenter(classes=1, width=32, detections=100)


def multi30k() -> nn.Module:
    """Captions, English to German."""
    return Translator(WORDS, width=128, depth=2, heads=4, length=64, dropout=0.1)


def tinyshakespeare() -> nn.Module:
    """Shakespeare, byte by byte."""
    return GPT(width=128, depth=4, heads=4, context=128)


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how long; the best that a few minutes on a core or two give."""

    build: Any
    task: str
    settings: dict[str, str]
    steps: int
    batch: int
    lr: float


RECIPES = {
    "bccd": Recipe(bccd, "detection", {}, 700, 8, 2e-3),
    "nuclei": Recipe(nuclei, "segmentation", {}, 700, 6, 2e-3),
    "multi30k": Recipe(multi30k, "translation", {"max_length": "63"}, 3000, 64, 2e-3),
    "tinyshakespeare": Recipe(tinyshakespeare, "language_model", {"block": "128"}, 2000, 24, 2e-3),
}


def make_tokenizer(data: Path) -> Path:
    """One vocabulary of 6,000 pieces for both languages (BPE), learned from the training part; beside it."""
    made = Tokenizer(models.BPE(unk_token=SPECIAL[3]))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    from tokenizers import decoders

    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=SPECIAL, show_progress=False)
    made.train([str(data / "train.en"), str(data / "train.de")], trainer)
    made.save(str(data / "tokenizer.json"))
    return data / "tokenizer.json"


def batches(task: Task, data: str, size: int) -> Iterator[Any]:
    """Batches of the training part, epoch after epoch."""
    epoch = 0
    samples = task.dataset(data, split="train", augment=True)
    while True:
        samples.set_epoch(epoch)
        yield from DataLoader(samples, size, shuffle=True, drop_last=True, collate_fn=task.collate)
        epoch += 1


def train(name: str, data: Path, out: Path, steps: int | None = None) -> dict[str, float]:
    """Train ``name`` and write OUT/name.pt; returns its metrics on the test part."""
    recipe = RECIPES[name]
    settings = dict(recipe.settings)
    if recipe.task == "translation":
        settings["tokenizer"] = str(make_tokenizer(data / name))
    task = build_task(recipe.task, settings)
    torch.manual_seed(0)
    model = recipe.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.05, betas=(0.9, 0.98))
    total = steps or recipe.steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=total)
    began, recent = time.perf_counter(), 0.0
    for step, batch in zip(range(total), batches(task, str(data / name), recipe.batch), strict=False):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent += loss.item()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {recent / 50:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
            recent = 0.0
    model.eval()
    test = DataLoader(task.dataset(str(data / name), split="test", augment=False), recipe.batch, collate_fn=task.collate)
    metrics = task.evaluate(task.predictor(model), test)
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict(), **metrics}, out / f"{name}.pt")
    return metrics


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in RECIPES:
        sys.exit(f"usage: python -m benchmarks.dense {{{','.join(RECIPES)}}} DATA OUT [STEPS]")
    steps = int(sys.argv[4]) if len(sys.argv) == 5 else None
    metrics = train(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), steps)
    print(sys.argv[1], {key: round(value, 3) for key, value in metrics.items()})
