"""What a task is: batches, a loss, a distillation loss and a metric.

A task knows its data formats, what a model is given and returns, and how its people measure it; it knows nothing of
sparsity, optimisers or files of weights. ``model`` is, everywhere below, an ``nn.Module`` or anything that is called
like one: an ONNX file in onnxruntime (`nmconvert.onnx_model.OnnxModel`) is measured by the same code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import walk_tb
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils.data import Dataset

from nmconvert import dist
from nmconvert.errors import DataError, ModelError, NmconvertError, one_line

Split = Literal["train", "val", "test"]
"""Parts of the data. Data in named parts: ``test`` is its test part, or else its val part, and ``val`` the reverse.
Data in one piece: ``test`` is all of it; ``train`` and ``val`` are nine tenths and every tenth sample of it."""

IMAGE_MISFIT = "Is it of another size, another number of channels (mean and std have one value each), or another --task?"
"""What to ask where a model cannot take images."""


def text_misfit(setting: str) -> str:
    """The same of rows of tokens, whose length ``setting`` limits."""
    return f"Is a row longer than it reads (--task-arg {setting}=N cuts it), or the tokenizer another model's?"


Predict = Callable[[Any], Any]
Gather = Callable[[list[Any]], list[Any]]
"""Joins the lists of all ranks into one, the same on each; `list` where there is one process."""


@dataclass(frozen=True)
class Batch:
    """What ``collate`` makes of some samples."""

    inputs: Any
    """What the model is given: a tensor, a list of tensors (images of several sizes), or a dict of tensors."""
    targets: dict[str, Any]
    """What the loss and the metric need besides; only tensors in it move to the device."""
    size: int
    """Over how many items (images, tokens, sentences) the loss is a mean; 0 where every sample was skipped."""
    labelled: bool = True
    """False where the data has no labels: `Task.loss` then raises, `Task.distill` does not need them."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor of it on ``device``."""
        return replace(self, inputs=_move(self.inputs, device), targets=_move(self.targets, device))


class Task(Protocol):
    """The five tasks of `nmconvert.tasks.TASKS`; their settings are dataclass fields, for `build_task`."""

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    misfit: ClassVar[str]
    """What to ask where a model cannot take the data."""

    def dataset(self, data: str, *, split: Split, augment: bool) -> Samples:
        """Samples of ``data``, a path or ``package.module:callable``; raises `DataError` where it is none of ours."""
        ...

    def collate(self, samples: Sequence[Any]) -> Batch:
        """One batch of several samples."""
        ...

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The training loss, a scalar: a mean over ``batch.size`` items."""
        ...

    def distill(self, model: Any, teacher: Any, batch: Batch) -> Tensor:
        """How far ``model`` is from ``teacher`` on the batch, a scalar; labels are not looked at."""
        ...

    def taught(self, teacher: Any, batch: Batch) -> Batch:
        """The batch with the teacher's answers for labels: what to measure a model by where the data has none."""
        ...

    def predictor(self, model: Any) -> Predict:
        """The function from ``batch.inputs`` to what `evaluate` compares; the model should be in eval mode."""
        ...

    def evaluate(self, predict: Predict, loader: Iterable[Batch], *, gather: Gather = list) -> dict[str, float]:
        """Every metric of the task over the loader, under ``metric`` the one that decides."""
        ...


class Samples(Dataset[Any]):
    """A list of samples, read when asked for, changed at random when augmented.

    Sample ``index`` of epoch ``epoch`` is a function of ``(seed, epoch, index)`` alone, so that neither the number of
    workers nor a resumed run changes it. Call `set_epoch` before the loader is iterated.

    Args:
        read: the number of a sample → the sample; raises `DataError` where it cannot be read.
        length: how many there are.
        augment: a sample and a random generator → a changed sample, or None.
        bad: what an unreadable sample does: ``raise`` its error; be ``drop``ped by `collate` (evaluation); or have the
            next readable one ``replace`` it, so that every training step has its full batch.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        length: int,
        *,
        augment: Callable[[Any, Generator], Any] | None = None,
        bad: Literal["raise", "drop", "replace"] = "raise",
    ) -> None:
        self.read, self.length, self.augment, self.bad = read, length, augment, bad
        self.seed = self.epoch = 0

    def set_epoch(self, epoch: int, *, seed: int = 0) -> None:
        """Choose the random changes of this epoch."""
        self.epoch, self.seed = epoch, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        sample = self.read(index) if self.bad == "raise" else self._read_or_skip(index)
        if sample is None or self.augment is None:
            return sample
        return self.augment(sample, np.random.default_rng((self.seed, self.epoch, index)))

    def _read_or_skip(self, index: int) -> Any:
        tries = self.length if self.bad == "replace" else 1
        for step in range(tries):
            try:
                return self.read((index + step) % self.length)
            except DataError as error:
                warnings.warn(f"skipped: {error}", stacklevel=3)
        if self.bad == "replace":
            raise DataError(f"none of the {self.length} samples can be read")
        return None


def held_out(length: int, split: Split) -> range | list[int]:
    """The sample numbers of ``split`` in data that is in one piece: see `Split`."""
    if split == "test":
        return range(length)
    return [i for i in range(length) if (i % 10 == 9) == (split == "val")]


def part_names(split: Split) -> tuple[str, ...]:
    """The names that a part of the data may have, the wanted one first."""
    val, test = ("val", "valid", "validation"), ("test", "testing")
    return {"train": ("train", "training"), "val": (*val, *test), "test": (*test, *val)}[split]


def part_folders(path: Path) -> dict[str, Path]:
    """The folders of all parts in ``path``, by their names in small letters; none where the data is in one piece."""
    names = {*part_names("train"), *part_names("val")}
    return {p.name.lower(): p for p in sorted(path.iterdir()) if p.name.lower() in names and p.is_dir()}


def part_folder(path: Path, split: Split) -> Path:
    """The folder of ``split`` in ``path``; ``path`` itself where the data is in one piece.

    Raises:
        DataError: ``path`` has other parts only, which would be taken for classes, or measured in the place of this one.
    """
    there, wanted = part_folders(path), part_names(split)
    found = next((there[name] for name in wanted if name in there), None)
    if found is None and there:
        names, other = " or ".join(wanted), next(iter(there.values()))
        raise DataError(f"{path}: has the part '{other.name}' and none called {names}; name one so, or give {other} itself")
    return found or path


def on_bad(skip_bad: bool, split: Split) -> Literal["raise", "drop", "replace"]:
    """What `Samples` does with unreadable ones, given ``--skip-bad``."""
    if not skip_bad:
        return "raise"
    return "replace" if split == "train" else "drop"


def tensor_of(output: Any, name: str = "logits") -> Tensor:
    """The tensor in what a model returned: the output itself, its field or key ``name``, or its first element."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict) and name in output:
        found = output[name]
    elif hasattr(output, name):
        found = getattr(output, name)
    elif isinstance(output, Sequence) and output:
        found = output[0]
    else:
        found = None
    if not isinstance(found, Tensor):
        raise DataError(f"the model returned {type(output).__name__}, which has no '{name}': is it of another task?")
    return found


def unwrapped(model: Any) -> Any:
    """The model within what DistributedDataParallel or torch.compile made of it, to look at and not to call."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    return unwrapped(model._orig_mod) if isinstance(model, OptimizedModule) else model


@contextmanager
def misfits_named(model: object, question: str | None = None) -> Iterator[None]:
    """What goes wrong inside ``model`` on the data that it is given becomes one line about both.

    ``question`` is what to ask of the data, `Task.misfit`; without one it goes by the error.

    Raises:
        ModelError: with what torch said. Errors of ours, of memory and of other processes pass.
    """
    try:
        yield
    except (NmconvertError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not _in_a_module(error) or dist.lost_peer(error) or "allocate memory" in str(error):
            raise
        said = f"{type(error).__name__}: {one_line(error, 300).rstrip('.')}"
        name = type(unwrapped(model)).__name__
        if isinstance(error, AttributeError | ImportError | KeyError | NameError):
            raise ModelError(f"{name} fails, which its code has to mend: {said}. --debug shows where") from error
        unknown_token = "index out of range in self" in str(error)
        asked = question or (text_misfit("block=N or max_length") if unknown_token else IMAGE_MISFIT)
        raise ModelError(f"{name} cannot take this data: {said}. {asked} --debug shows where") from error


def _in_a_module(error: BaseException) -> bool:
    """Whether ``error`` was raised while a module ran."""
    return any(frame.f_code is nn.Module._call_impl.__code__ for frame, _ in walk_tb(error.__traceback__))


def need_labels(batch: Batch, remedy: str = "give some") -> None:
    """Raise where the batch has no labels to compare with; ``remedy`` says which data has some."""
    if not batch.labelled:
        raise DataError(
            f"the data has no labels to compare with: {remedy} (only finetune can do without: --teacher and --distill 1)"
        )


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_move(item, device) for item in value)
    return value
