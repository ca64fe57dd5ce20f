"""The metric of a task, measured the same way for a checkpoint and for an ONNX file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Subset

from nmconvert import dist
from nmconvert.checkpoint import is_onnx, open_checkpoint
from nmconvert.errors import UsageError
from nmconvert.manifest import Manifest
from nmconvert.model import load
from nmconvert.onnx_model import OnnxModel
from nmconvert.tasks import Batch, Task, build_task, misfits_named


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one file; ``metrics[metric]`` is the one that decides."""

    file: str
    task: str
    data: str
    samples: int
    metric: str
    metrics: Mapping[str, float]
    seconds: float


def evaluate(
    file: Path,
    task: Task,
    data: str,
    *,
    model: str | None = None,
    model_arguments: Mapping[str, str] | None = None,
    trust: bool = False,
    batch_size: int = 100,
    workers: int = 0,
    limit: int | None = None,
    device: str = "cpu",
    kernels: bool = False,
) -> Evaluation:
    """Measure ``file`` with ``task`` on the test split of ``data`` (see `nmconvert.tasks.base.Split`).

    Args:
        file: an ONNX file, run by onnxruntime; or a checkpoint, whose weights go into ``model``.
        task: of `nmconvert.tasks.build_task`.
        data: a path or ``package.module:callable``; the task's ``dataset`` says which.
        model: as in `nmconvert.model.build`; not needed for ONNX and Hugging Face folders.
        model_arguments: for the callable that ``model`` names.
        trust: allow files that execute code when they are loaded.
        batch_size: how many samples at once; a graph with a fixed batch size gets them in pieces of that.
        workers: processes that read the data, beside this one.
        limit: only the first so many samples.
        device: where a checkpoint's model runs.
        kernels: run an ONNX file on nmconvert's kernels, not on stock onnxruntime alone.

    Raises:
        UsageError: a checkpoint without ``model``, or a device that is not here.
        CheckpointError, ModelError, DataError: the file, the model or the data is not what it has to be.
    """
    dataset: Any = task.dataset(data, split="test", augment=False)
    if limit is not None:
        dataset = Subset(dataset, range(min(limit, len(dataset))))
    place = dist.device(device)
    network = load_model(file, model, model_arguments or {}, trust=trust, device=device, kernels=kernels)
    loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=task.collate)
    start = time.perf_counter()
    sizes: list[int] = []

    def batches() -> Iterator[Batch]:
        for batch in loader:
            sizes.append(batch.size)
            yield batch.to(place)

    with misfits_named(network, task.misfit):
        metrics = task.evaluate(task.predictor(network), batches())
    seconds = time.perf_counter() - start
    measured = sum(sizes) if getattr(task, "skip_bad", False) else len(dataset)  # of texts, a size is that in tokens
    return Evaluation(str(file), task.name, data, measured, task.metric, metrics, seconds)


def evaluate_again(
    file: Path,
    task: str | None = None,
    settings: Mapping[str, str] | None = None,
    data: str | None = None,
    *,
    model: str | None = None,
    model_arguments: Mapping[str, str] | None = None,
    trust: bool = False,
    batch_size: int = 100,
    workers: int = 0,
    limit: int | None = None,
    device: str = "cpu",
    kernels: bool = False,
) -> Evaluation:
    """As `evaluate`, where what is not said is taken from the file's manifest: the task, its settings, the data, the model.

    Raises:
        UsageError: the data, or a checkpoint's model, was never said.
    """
    manifest = Manifest.of(open_checkpoint(file, trust=trust)) or Manifest()
    name, settings = manifest.said_task(task, settings)
    data = data or manifest.settings.get("data")
    if data is None:
        raise UsageError(f"{file}: measured on what? Give --data, a folder or a file of the task '{name}'")
    spec, arguments = manifest.said_model(file, model, model_arguments)
    chosen = build_task(name, settings, folder=Path(spec or file))
    return evaluate(
        file,
        chosen,
        data,
        model=spec,
        model_arguments=arguments,
        trust=trust,
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        device=device,
        kernels=kernels,
    )


def load_model(
    file: Path,
    model: str | None,
    arguments: Mapping[str, str],
    *,
    trust: bool = False,
    device: str = "cpu",
    kernels: bool = False,
) -> OnnxModel | nn.Module:
    """The ONNX file in onnxruntime, or the model with the checkpoint in it, in eval mode: both are called alike."""
    if is_onnx(file):
        return OnnxModel(file, kernels=kernels)
    if model is None and not (file.is_dir() and (file / "config.json").is_file()):
        raise UsageError(f"{file}: a checkpoint holds weights only; say what they belong to with --model module:callable")
    return load(model or str(file), file, arguments, trust=trust).to(dist.device(device)).eval()
