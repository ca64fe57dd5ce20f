"""``nmconvert eval``: the metric of a task, on a checkpoint or an ONNX file."""

from __future__ import annotations

from pathlib import Path

import click

from nmconvert.cli.common import Printer, model_options, newest_result, output_options, task_options


@click.command("eval")
@click.argument("file", required=False, callback=newest_result, type=click.Path(exists=True, path_type=Path))
@task_options
@model_options
@click.option("--batch-size", default=100, show_default=True, type=click.IntRange(1), help="How many samples at once.")
@click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Processes that read the data.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many samples.")
@click.option("--device", default="cpu", show_default=True, help="Where a checkpoint's model runs, e.g. cuda:0.")
@click.option("--kernels", is_flag=True, help="Run an ONNX file on nmconvert's kernels, not on stock onnxruntime alone.")
@output_options
def command(
    file: Path, task: str | None, data: str | None, settings: dict[str, str], model: str | None,
    model_arguments: dict[str, str], trust: bool, batch_size: int, workers: int, limit: int | None, device: str,
    kernels: bool, printer: Printer,
) -> None:  # fmt: skip
    """Measure FILE, a checkpoint or an ONNX file, with the metric of its task on DATA.

    FILE is by default the newest result of nmconvert in this folder. What was said before (--task, --data, --model) need
    not be said again.
    """
    from nmconvert import report
    from nmconvert.evaluate import evaluate_again

    result = evaluate_again(
        file, task, settings, data, model=model, model_arguments=model_arguments, trust=trust, batch_size=batch_size,
        workers=workers, limit=limit, device=device, kernels=kernels,
    )  # fmt: skip
    printer.show(report.eval_json(result), lambda: report.eval_report(result))
