"""``nmconvert eval``: the metric of a task, on a checkpoint or an ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmconvert.cli.common import model_options, newest_result, output_options, show, task_options

if TYPE_CHECKING:
    from rich.table import Table

    from nmconvert.evaluate import Evaluation


@click.command("eval")
@click.argument("file", required=False, callback=newest_result, type=click.Path(exists=True, path_type=Path))
@task_options
@model_options
@click.option("--batch-size", default=100, show_default=True, type=click.IntRange(1), help="How many samples at once.")
@click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Processes that read the data.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many samples.")
@click.option("--device", default="cpu", show_default=True, help="Where a checkpoint's model runs, e.g. cuda:0.")
@output_options
def command(
    file: Path, task: str | None, data: str | None, settings: dict[str, str], model: str | None,
    model_arguments: dict[str, str], trust: bool, batch_size: int, workers: int, limit: int | None, device: str,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure FILE, a checkpoint or an ONNX file, with the metric of its task on DATA.

    FILE is by default the newest result of nmconvert in this folder. What was said before (--task, --data, --model) need
    not be said again.
    """
    from nmconvert.evaluate import evaluate_again

    result = evaluate_again(
        file, task, settings, data, model=model, model_arguments=model_arguments, trust=trust, batch_size=batch_size,
        workers=workers, limit=limit, device=device,
    )  # fmt: skip
    show(dataclasses.asdict(result), as_json=as_json, quiet=quiet, render=lambda: table(result))


def table(result: Evaluation) -> Table:
    """One row a metric, the one that decides first."""
    from rich.table import Table

    caption = f"{result.samples} samples of {result.data} in {result.seconds:.1f} s"
    shown = Table(title=f"{result.file}: {result.task.replace('_', ' ')}", caption=caption)
    shown.add_column("metric")
    shown.add_column("value", justify="right")
    for name in sorted(result.metrics, key=lambda name: name != result.metric):
        style = "bold" if name == result.metric else ""
        digits = 4 if name in ("loss", "bits_per_byte") else 2
        shown.add_row(name.replace("_", " "), f"{result.metrics[name]:.{digits}f}", style=style)
    return shown
