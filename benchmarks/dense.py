"""The dense models of the real-data benchmarks that nobody published: trained here first, pruned afterwards.

    python -m benchmarks.dense WORK bccd        (and nuclei, multi30k, tinyshakespeare) → WORK/bccd.pt and its metrics

The loop is that of `nmconvert finetune` with a plan of no weights, so a run that was killed goes on where it was. Data come
from ``WORK/data``, or are made there. The modules are in `benchmarks.models.trained`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks import data
from benchmarks.models import trained
from nmconvert.plan import Plan
from nmconvert.tasks import Batch, Samples, Task, build_task
from nmconvert.tasks.translation import Translation
from nmconvert.train import Settings
from nmconvert.train import train as run
from nmconvert.train.diagnose import slow_in
from nmconvert.train.settings import Precision

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]  # in the order that sample_models/translator.py names


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how; the best that some minutes on a core give."""

    build: Callable[[], nn.Module]
    task: str
    settings: Settings
    task_settings: dict[str, str] = field(default_factory=dict)


PRECISION: Precision = "fp32" if slow_in("bf16", torch.device("cpu")) else "bf16"
"""What is fast here: with AVX2 alone torch's convolutions took seven to eleven times as long in bf16 as in fp32 on Zen 1."""


def settings(epochs: int, batch: int) -> Settings:
    """AdamW, cosine; the averaged weights are kept."""
    return Settings(
        epochs=epochs, batch=batch, optimizer="adamw", lr=2e-3, weight_decay=0.05, warmup=0.1, clip=1.0, precision=PRECISION,
        ema=0.99, save_minutes=2.0,
    )  # fmt: skip


RECIPES = {
    "bccd": Recipe(trained.bccd, "detection", settings(30, 8)),
    "nuclei": Recipe(trained.nuclei, "segmentation", settings(9, 6)),
    # A batch of Multi30k is a bundle. Smoothed labels make worse teachers (Müller et al. 2019).
    "multi30k": Recipe(trained.multi30k, "translation", settings(6, 1), {"max_length": "63", "label_smoothing": "0"}),
    "tinyshakespeare": Recipe(trained.tinyshakespeare, "language_model", settings(4, 24), {"block": "128"}),
}


class Bundles(Dataset[Any]):
    """``samples``, pairs of sentences, in bundles of ``size`` of like length, so that little of a batch is padding."""

    def __init__(self, samples: Samples, size: int = 64) -> None:
        self.samples, self.size = samples, size
        self.lengths = np.array([len(pair[0]) + len(pair[1]) for pair in (samples[i] for i in range(len(samples)))])
        self.set_epoch(0)

    def set_epoch(self, epoch: int, *, seed: int = 0) -> None:
        """Bundle them anew: lengths count as up to a tenth more or less than they are."""
        noise = np.random.default_rng((seed, epoch)).uniform(0.9, 1.1, len(self.lengths))
        order = np.argsort(self.lengths * noise)
        self.bundles = order[: len(order) // self.size * self.size].reshape(-1, self.size)

    def __len__(self) -> int:
        return len(self.bundles)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.samples[int(number)] for number in self.bundles[index]]


class BundledTranslation(Translation):
    """Translation whose samples are bundles."""

    def collate(self, samples: Sequence[Any]) -> Batch:
        """One batch of all bundles."""
        return super().collate([pair for bundle in samples for pair in bundle])


def make_tokenizer(folder: Path) -> Path:
    """One vocabulary (BPE) for both languages in ``folder``, learned from the training part; its ``tokenizer.json``."""
    made = Tokenizer(models.BPE(unk_token=SPECIAL[3]))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=trained.WORDS, special_tokens=SPECIAL, show_progress=False)
    made.train([str(folder / "train.en"), str(folder / "train.de")], trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def prepared(work: Path, name: str) -> Path:
    """``WORK/data/NAME``, made if it is not there."""
    folder = work / "data" / name
    if not folder.exists():
        data.SETS[name](folder)
    if name == "multi30k" and not (folder / "tokenizer.json").exists():
        make_tokenizer(folder)
    return folder


def task_of(recipe: Recipe, folder: Path) -> Task:
    """The task with all its settings."""
    if recipe.task == "translation":
        return build_task(recipe.task, recipe.task_settings | {"tokenizer": str(folder / "tokenizer.json")})
    return build_task(recipe.task, recipe.task_settings)


def train(name: str, work: Path) -> dict[str, float]:
    """Train ``name`` and write WORK/NAME.pt; returns its metrics on the test part."""
    recipe, folder, began = RECIPES[name], prepared(work, name), perf_counter()
    task = task_of(recipe, folder)
    samples: Any = task.dataset(str(folder), split="train", augment=True)
    held_out: Any = Subset(task.dataset(str(folder), split="val", augment=False), range(64))  # to look at, no more
    learner = task
    if isinstance(task, Translation):
        learner = BundledTranslation(**asdict(task))
        samples, held_out = Bundles(samples), Bundles(held_out, 32)
    torch.manual_seed(0)
    model, state = recipe.build(), work / f"{name}.state"
    log = work / f"{name}.jsonl"
    run(
        model, Plan(()), learner, samples, held_out, recipe.settings, folder=state, log=log, resume=state.is_dir(), display=True
    )
    metrics = measured(task, model.eval(), folder) | {"seconds": perf_counter() - began}
    torch.save({"state_dict": model.state_dict(), **metrics}, work / f"{name}.pt")
    shutil.rmtree(state)
    return metrics


def measured(task: Task, model: nn.Module, folder: Path) -> dict[str, float]:
    """Every metric on the test part."""
    test = DataLoader(task.dataset(str(folder), split="test", augment=False), 32, collate_fn=task.collate)
    return task.evaluate(task.predictor(model), test)


def main(arguments: list[str]) -> None:
    """Train those that are named."""
    if len(arguments) < 2 or not set(arguments[1:]) <= RECIPES.keys():
        sys.exit(f"usage: python -m benchmarks.dense WORK {{{','.join(RECIPES)}}}")
    torch.set_num_threads(1)
    for name in arguments[1:]:
        print(name, {key: round(value, 3) for key, value in train(name, Path(arguments[0])).items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
