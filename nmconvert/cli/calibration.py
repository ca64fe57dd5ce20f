"""Options for calibration data, shared by the commands that take it, and the batches that they name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nmconvert.cli.common import TASKS, key_values, printable
from nmconvert.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nmconvert.calibrate.replay import Batch

F = TypeVar("F", bound=Callable[..., Any])

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "exact", "admm", "auto")
"""`nmconvert.solvers.sparsegpt.METHODS`, without the import of torch that it costs."""

_READ_BY_TASKS = {*(f"{part}images" for part in ("", "train_", "val_", "test_")), "ids"}  # arrays

_SECONDS = 30.0  # between lines of progress in a log


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
        click.option("--calib", metavar="DATA",
                     help="Calibrate on these samples (labels are not looked at); also an .npz with an array for each of the "
                     "model's inputs, named as in forward or in the ONNX file, a sample a row."),
    ):  # fmt: skip
        function = option(function)
    return function


@dataclass(frozen=True)
class CalibrationData:
    """Calibration data and how it is read: what the options say.

    Attributes:
        data: folder, file, or ``package.module:callable``.
        task: whose formats it is in.
        settings: of the task.
        count: how many random training samples are taken, at most.
        batch_size: samples at once.
        seed: decides which, and their order.
    """

    data: str
    task: str
    settings: Mapping[str, str]
    count: int
    batch_size: int
    seed: int

    def batches(self, folder: Path, model: nn.Module | None, dense: Callable[[], Any]) -> list[Batch]:
        """What ``model`` takes of them, in batches; eight, where all would be in one.

        ``folder`` may have the model's tokenizer; without a model it is an ONNX file. The data may be arrays named like the
        inputs. ``dense()`` is the model with its weights, which answers where it reads answers and the data has none.
        """
        from nmconvert.tasks import build_task, calibration_inputs

        if arrays := _arrays_of_inputs(Path(self.data), model, folder):
            parts = self._parts(len(next(iter(arrays.values()))))
            return [{name: array[part] for name, array in arrays.items()} for part in parts]
        reader = build_task(self.task, self.settings, folder=folder)
        dataset = reader.dataset(self.data, split="train", augment=False)
        batches = [reader.collate([dataset[i] for i in part.tolist()]) for part in self._parts(len(dataset))]
        return [calibration_inputs(reader, batch, model, dense) for batch in batches]

    def _parts(self, there: int) -> Sequence[Tensor]:
        """Which of the samples that are ``there`` each batch holds."""
        import torch

        if there < 2:
            raise DataError(f"{self.data}: calibration needs at least 2 samples, one of them held out; there is {there}")
        order = torch.randperm(there, generator=torch.Generator().manual_seed(self.seed))[: self.count]
        parts: Sequence[Tensor] = order.split(self.batch_size if len(order) > self.batch_size else -(-len(order) // 8))
        return parts


def _arrays_of_inputs(calib: Path, model: nn.Module | None, checkpoint: Path) -> dict[str, Tensor]:
    """The arrays of an ``.npz`` file that has one, a sample a row, for each input of a model or an ONNX file; else none.

    Raises:
        DataError: one is missing, or they differ in their number of samples.
    """
    if calib.suffix != ".npz" or not calib.is_file():
        return {}
    import torch

    from nmconvert.tasks.labelled import open_npz

    needed, wanted = _inputs_of_module(model) if model is not None else _inputs_of_graph(checkpoint)
    with open_npz(calib) as file:
        given = {name for name in wanted if name in file}
        if not given or (_READ_BY_TASKS & set(file)) - given:
            return {}
        if missing := [name for name in wanted if name in needed - given]:
            there = ", ".join(sorted(given))
            raise DataError(f"{calib}: has arrays for the model's inputs {there}, and none for {', '.join(missing)}")
        arrays = {name: file[name] for name in wanted if name in given}
        sorts = {name: _sort(array.dtype.kind) for name, array in arrays.items()}
        if any(wanted[name] not in (None, sort) for name, sort in sorts.items()) or _are_pixels(arrays.get("images")):
            return {}  # bytes of images, say, which a task makes numbers of
        if no_numbers := [name for name, array in arrays.items() if array.dtype.kind not in "biufc"]:
            raise DataError(f"{calib}: its array '{no_numbers[0]}' holds {arrays[no_numbers[0]].dtype}, and no numbers")
        if len(counts := {array.shape[:1] for array in arrays.values()}) > 1:
            told = ", ".join(f"{name} {list(array.shape)}" for name, array in sorted(arrays.items()))
            raise DataError(f"{calib}: its arrays hold {len(counts)} numbers of samples: {told}")
        if others := sorted(set(file) - given):
            warnings.warn(
                f"{calib}: {', '.join(others)} not read: the model's inputs are called {', '.join(sorted(wanted))}",
                stacklevel=2,
            )
        return {name: torch.from_numpy(_single(array)) for name, array in arrays.items()}


def _inputs_of_graph(checkpoint: Path) -> tuple[set[str], dict[str, str | None]]:
    """Which inputs an ONNX file needs, and of which sort each is; none of what is no ONNX file."""
    from nmconvert.checkpoint import is_onnx

    if not is_onnx(checkpoint):
        return set(), {}
    import numpy as np
    import onnx

    from nmconvert.calibrate.onnx_driver import input_types

    types = input_types(onnx.load(checkpoint, load_external_data=False).graph)
    return set(types), {name: _sort(np.dtype(dtype).kind) for name, dtype in types.items()}


def _inputs_of_module(model: nn.Module) -> tuple[set[str], dict[str, str | None]]:
    """Which arguments ``forward`` needs, and which it takes, of any sort; none where it does not say, as in TorchScript."""
    try:
        said = signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return set(), {}
    parameters = [p for p in said if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name for p in parameters if p.default is p.empty}, {p.name: None for p in parameters}


def _are_pixels(array: Any) -> bool:
    return array is not None and array.dtype.kind == "u"


def _single(array: Any) -> Any:
    """NumPy's own floats, which are double, as torch's."""
    return array.astype("float32") if array.dtype == "float64" else array


def _sort(kind: str) -> str:
    """NumPy's letter of a type, the same for all integers."""
    return "i" if kind == "u" else kind


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
    """Where the line of progress of each layer goes: to stderr; one in half a minute, where that is no terminal; or nowhere."""
    pause, told = 0.0 if sys.stderr.isatty() else _SECONDS, monotonic()

    def tell(line: str) -> None:
        nonlocal told
        if not quiet and monotonic() - told >= pause:
            click.echo(printable(line), err=True)
            told = monotonic()

    return tell
