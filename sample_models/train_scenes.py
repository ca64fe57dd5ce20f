"""Train ``detector.pt`` and ``segmenter.pt``: ``python -m sample_models.train_scenes``, some minutes on one core each."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from nmconvert.tasks import Task, build_task
from sample_models import digit_scenes
from sample_models.detector import detector
from sample_models.segmenter import segmenter

HERE = Path(__file__).parent
EPOCHS = 30
BATCH = 25
MODELS = {"detector": ("detection", detector), "segmenter": ("segmentation", segmenter)}


def train(model: nn.Module, task: Task, data: str) -> dict[str, float]:
    """AdamW with a one-cycle learning rate; returns the metrics on the validation images."""
    samples = task.dataset(data, split="train", augment=False)
    read: list[Any] = [samples[number] for number in range(len(samples))]  # once, not once an epoch
    loader: DataLoader[Any] = DataLoader(read, BATCH, shuffle=True, collate_fn=task.collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=EPOCHS * len(loader))
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in loader:
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}", flush=True)
    model.eval()
    val = DataLoader(task.dataset(data, split="val", augment=False), BATCH, collate_fn=task.collate)
    return task.evaluate(task.predictor(model), val)


def main(names: list[str]) -> None:
    """Train the models ``names``, and write their checkpoints beside this file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        digit_scenes.write(Path(folder))
        for name in names:
            kind, build = MODELS[name]
            torch.manual_seed(0)
            model = build()
            metrics = train(model, build_task(kind), folder)
            torch.save({"state_dict": model.state_dict(), **metrics}, HERE / f"{name}.pt")
            print(name, {key: round(value, 2) for key, value in metrics.items()})


if __name__ == "__main__":
    main(sys.argv[1:] or [*MODELS])
