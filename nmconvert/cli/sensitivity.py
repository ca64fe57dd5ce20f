"""``nmconvert sensitivity``: what each pattern costs in each layer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from nmconvert.cli.calibration import CalibrationData, calibration_data_named, calibration_options, folder_itself, teller
from nmconvert.cli.common import Printer, model_options, output_options
from nmconvert.errors import UsageError
from nmconvert.pattern import AXES, Axis, Pattern


@click.command("sensitivity")
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--nm", "patterns", default="2:4,1:4,4:8,2:8,1:8,1:16", show_default=True, metavar="N:M,…", help="Patterns to try."
)
@click.option("--axis", type=click.Choice(AXES), default="channel", show_default=True, help="As in prune.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the table into this SVG file, too.")
@calibration_options
@model_options
@output_options
def command(
    checkpoint: Path, patterns: str, axis: Axis, plot: Path | None, calib: str | None, task: str, settings: dict[str, str],
    samples: int, batch_size: int, seed: int, model: str | None, model_arguments: dict[str, str], trust: bool, printer: Printer,
) -> None:  # fmt: skip
    """Prune each layer of CHECKPOINT alone, to each pattern, and show what that does to the model's outputs.

    The loss is the squared error of the outputs relative to their energy, on calibration data; the bar shows the first
    pattern's. `nmconvert prune --budget` chooses patterns by these numbers. An ONNX file or a Hugging Face folder needs no
    --model.
    """
    from nmconvert.checkpoint import is_onnx, open_checkpoint

    chosen = [Pattern.parse(text) for text in patterns.split(",")]
    model = model or folder_itself(checkpoint)
    if calib is None or (model is None and not is_onnx(checkpoint)):
        raise UsageError(
            "sensitivities are measured on inputs: give --model and --calib "
            "(an ONNX file or a Hugging Face folder needs --calib alone)"
        )
    from nmconvert.calibrate.stage import sensitivities
    from nmconvert.evaluate import load_model
    from nmconvert.model import build
    from nmconvert.prune import need_pruned, plan_for

    built = None if model is None else build(model, model_arguments, trust=trust)
    opened = open_checkpoint(checkpoint, trust=trust)
    plan = plan_for(opened, chosen[0], axis, built, solved=True)
    need_pruned(checkpoint, plan)
    dense = partial(load_model, checkpoint, model, model_arguments, trust=trust)
    batches = CalibrationData(calib, task, settings, samples, batch_size, seed).batches(Path(model or checkpoint), built, dense)
    with calibration_data_named(built):
        found = sensitivities(built, opened, plan, batches, chosen, teller(printer.quiet))
    from nmconvert.plot import sensitivities_svg, write_sensitivities
    from nmconvert.report import sensitivity_json, sensitivity_report

    if plot is not None:
        write_sensitivities(plot, found)
    printer.show(sensitivity_json(found), lambda: sensitivity_report(found), lambda: [sensitivities_svg(found)])
