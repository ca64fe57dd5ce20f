"""Train ``gpt.pt`` and ``translator.pt``: ``python -m sample_models.train_text``, some minutes on one core each."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader

from nmconvert.tasks import Task, build_task
from sample_models import sentences, stdlib_text
from sample_models.gpt import gpt
from sample_models.translator import translator

HERE = Path(__file__).parent
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # in the order that translator.py names


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how long."""

    build: Any
    write: Any
    task: str
    settings: dict[str, str]
    steps: int
    batch: int
    lr: float


RECIPES = {
    "gpt": Recipe(gpt, stdlib_text.write, "language_model", {"block": "128"}, 1200, 16, 3e-3),
    "translator": Recipe(
        translator,
        sentences.write,
        "translation",
        {"tokenizer": str(HERE / "tokenizer.json"), "max_length": "63"},
        900,
        48,
        3e-3,
    ),
}


def tokenizer() -> Tokenizer:
    """The words of both languages of `sample_models.sentences`, split at spaces, in order of the alphabet."""
    words = sorted({word for pair in sentences.pairs("train") for side in pair for word in side.split()})
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token=SPECIAL[3]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([*SPECIAL])
    return made


def batches(task: Task, data: str, size: int) -> Iterator[Any]:
    """Batches of the training part, epoch after epoch."""
    epoch = 0
    while True:
        samples = task.dataset(data, split="train", augment=True)
        samples.set_epoch(epoch)
        yield from DataLoader(samples, size, shuffle=True, drop_last=True, collate_fn=task.collate)
        epoch += 1


def train(model: nn.Module, task: Task, data: str, recipe: Recipe) -> dict[str, float]:
    """AdamW with a one-cycle learning rate; returns the metrics on the validation part."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=recipe.steps)
    total = 0.0
    for step, batch in zip(range(recipe.steps), batches(task, data, recipe.batch), strict=False):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {total / 100:.4f}", flush=True)
            total = 0.0
    model.eval()
    val = DataLoader(task.dataset(data, split="val", augment=False), 50, collate_fn=task.collate)
    return task.evaluate(task.predictor(model), val)


def main(names: list[str]) -> None:
    """Train the models ``names``, and write their checkpoints and the tokenizer beside this file."""
    torch.set_num_threads(1)
    tokenizer().save(str(HERE / "tokenizer.json"))
    for name in names:
        recipe = RECIPES[name]
        with tempfile.TemporaryDirectory() as folder:
            recipe.write(Path(folder))
            torch.manual_seed(0)
            model = recipe.build()
            metrics = train(model, build_task(recipe.task, recipe.settings), folder, recipe)
        torch.save({"state_dict": model.state_dict(), **metrics}, HERE / f"{name}.pt")
        print(name, {key: round(value, 3) for key, value in metrics.items()})


if __name__ == "__main__":
    main(sys.argv[1:] or [*RECIPES])
