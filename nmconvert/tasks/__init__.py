"""The tasks: what data they read, what they give a model, what loss trains it and what metric judges it.

`TASKS` maps a name to a dataclass whose fields are the settings of that task; `build_task` makes one of ``name=value``
texts, as the command line has them. The protocol that all follow is `nmconvert.tasks.base.Task`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from nmconvert.errors import UsageError
from nmconvert.tasks import detr
from nmconvert.tasks.base import Batch, Gather, Predict, Samples, Split, Task, misfits_named
from nmconvert.tasks.classification import Classification
from nmconvert.tasks.detection import Detection
from nmconvert.tasks.language_model import LanguageModel
from nmconvert.tasks.segmentation import Segmentation
from nmconvert.tasks.translation import Translation

__all__ = [
    "TASKS",
    "Batch",
    "Gather",
    "Predict",
    "Samples",
    "Split",
    "Task",
    "build_task",
    "calibration_inputs",
    "misfits_named",
]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
    "translation": Translation,
    "language_model": LanguageModel,
}

LIMITS: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (lambda value: value > 0, "more than 0", ("size", "temperature", "block", "max_length", "beams")),
    (lambda value: all(part > 0 for part in value), "more than 0", ("std",)),
    (lambda value: all(0 <= part <= 1 for part in value), "0 to 1, of pixels divided by 255", ("mean",)),
    (
        lambda value: value <= 1_000_000,
        "at most 1,000,000",
        ("size", "temperature", "block", "max_length", "beams", "crop", "zoom"),
    ),
    (lambda value: value >= 0, "0 or more", ("crop",)),
    (lambda value: value >= 1, "1 or more", ("zoom",)),
    (lambda value: 0 <= value <= 1, "a share, 0 to 1", ("label_smoothing", "teacher_score")),
)
"""What must hold for a setting that is not None, in words, and of which settings."""


def build_task(name: str, settings: Mapping[str, str] | None = None, *, folder: Path | None = None) -> Task:
    """The task ``name`` with ``settings``, texts that are read as the type of the field says (lists: ``1,2,3``).

    Where no tokenizer is among the settings, that of ``folder`` is taken, the Hugging Face folder of the model.

    Raises:
        UsageError: no such task or setting, or a text that does not fit.
    """
    if name not in TASKS:
        raise UsageError(f"there is no task '{name}': choose of {', '.join(TASKS)}")
    hints = get_type_hints(TASKS[name])
    known = [field.name for field in dataclasses.fields(TASKS[name])]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if folder is not None and "tokenizer" in known and (folder / "tokenizer.json").is_file():
        values["tokenizer"] = str(folder)
    for key, text in (settings or {}).items():
        if key not in known:
            raise UsageError(f"the task {name} has no setting '{key}': it has {', '.join(known)}")
        try:
            values[key] = _parse(text, hints[key])
        except ValueError as error:
            raise UsageError(f"{key}={text}: {error}") from error
        for holds, words, names in LIMITS:
            if key in names and values[key] is not None and not holds(values[key]):
                raise UsageError(f"{key}={text}: has to be {words}")
    return TASKS[name](**values)


def calibration_inputs(task: Task, batch: Batch, model: Any, dense: Callable[[], Any]) -> Any:
    """What ``model`` is called with to be calibrated: its arguments, by name or in order.

    Of translation these are the words that a decoder reads, too; where the data has none ``dense()`` is asked, the same model
    with its weights.
    """
    if isinstance(task, Translation):
        return task.with_answers(dense, batch)
    if isinstance(batch.inputs, list):
        return detr.padded(batch.inputs) if detr.is_detr(model) else (batch.inputs,)
    return batch.inputs


def _parse(text: str, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_parse(part, get_args(kind)[0]) for part in text.split(",") if part)
    if NoneType in get_args(kind):
        return None if text == "" else _parse(text, next(a for a in get_args(kind) if a is not NoneType))
    if kind is bool:
        if text.lower() not in ("1", "0", "true", "false", "yes", "no", "on", "off"):
            raise ValueError("a switch is true or false")
        return text.lower() in ("1", "true", "yes", "on")
    return kind(text)
