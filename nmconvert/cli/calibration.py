"""Options for calibration data, shared by the commands that take it, and the batches that they name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nmconvert.cli.common import TASKS, key_values, printable
from nmconvert.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from nmconvert.calibrate.replay import Batch

F = TypeVar("F", bound=Callable[..., Any])

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "exact", "admm", "auto")
"""`nmconvert.solvers.sparsegpt.METHODS`, without the import of torch that it costs."""


def calibration_options(function: F) -> F:
    """``--calib`` and how it is read: ``--task``, ``--task-arg``, ``--samples``, ``--batch-size`` and ``--seed``."""
    for option in (
        click.option("--seed", default=0, show_default=True, help="Decides which samples are taken, and their order."),
        click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Samples at once."),
        click.option("--samples", default=512, show_default=True, type=click.IntRange(2), help="How many of DATA."),
        click.option("--task-arg", "settings", multiple=True, callback=key_values, metavar="NAME=VALUE",
                     help="A setting of the task, such as size=224; may be repeated."),
        click.option("--task", type=click.Choice(TASKS), default="classification", show_default=True,
                     help="Whose formats DATA is read in."),
        click.option("--calib", metavar="DATA", help="Calibrate on these samples (labels are not looked at)."),
    ):  # fmt: skip
        function = option(function)
    return function


def calibration_batches(
    calib: str,
    task: str,
    settings: dict[str, str],
    samples: int,
    batch_size: int,
    seed: int,
    folder: Path,
    model: nn.Module | None,
    dense: Callable[[], Any],
) -> list[Batch]:
    """What ``model`` takes of ``samples`` random training samples of ``calib``, in batches; eight, where all would be in one.

    ``folder`` may have the model's tokenizer; ``dense()`` is the model with its weights, which answers where it reads answers
    and the data has none. Without a model it is a graph's inputs.
    """
    import torch

    from nmconvert.tasks import build_task, calibration_inputs

    reader = build_task(task, settings, folder=folder)
    dataset = reader.dataset(calib, split="train", augment=False)
    generator = torch.Generator().manual_seed(seed)
    if len(dataset) < 2:
        raise DataError(f"{calib}: calibration needs at least 2 samples, one of them held out; there is {len(dataset)}")
    order = torch.randperm(len(dataset), generator=generator)[:samples].tolist()
    if len(order) <= batch_size:
        batch_size = -(-len(order) // 8)
    batches = []
    for low in range(0, len(order), batch_size):
        batch = reader.collate([dataset[i] for i in order[low : low + batch_size]])
        batches.append(calibration_inputs(reader, batch, model, dense))
    return batches


def folder_itself(checkpoint: Path) -> str | None:
    """What builds the model of a Hugging Face folder where no ``--model`` says it: the folder itself."""
    return str(checkpoint) if (checkpoint / "config.json").is_file() else None


def calibration_data_named(model: nn.Module | None) -> AbstractContextManager[None]:
    """Where ``model`` cannot take the data, the error is one line about both; a graph (None) names what does not fit itself."""
    if model is None:
        return nullcontext()
    from nmconvert.tasks import misfits_named

    return misfits_named(model)


def teller(quiet: bool) -> Callable[[str], None]:
    """Where the line of progress of each layer goes: to a terminal's stderr, or nowhere."""
    if quiet or not sys.stderr.isatty():
        return lambda line: None
    return lambda line: click.echo(printable(line), err=True)
