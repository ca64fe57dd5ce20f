"""``nmconvert prune``: a checkpoint → its N:M-sparse copy."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from nmconvert.cli.calibration import (
    METHODS,
    CalibrationData,
    calibration_data_named,
    calibration_options,
    folder_itself,
    teller,
)
from nmconvert.cli.common import Printer, layer_patterns, model_options, output_options
from nmconvert.errors import UsageError
from nmconvert.pattern import AXES, Axis, Pattern


@click.command("prune")
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--nm", metavar="N:M", help="Keep N of every M weights, for example 2:4. M is at most 32.")
@click.option(
    "--budget", metavar="BUDGET",
    help="Instead of --nm, a pattern for each layer: 'size<=0.35' (of the compressed file), 'speedup>=1.5' (measured on this "
    "machine's kernels), or 'top1-drop<=0.5' (points of agreement with the dense model). Needs --model and --calib, for an "
    "ONNX file or a Hugging Face folder --calib alone.",
)  # fmt: skip
@click.option(
    "--axis", type=click.Choice(AXES), default="channel", show_default=True,
    help="Groups along the input channels at one kernel position, or along each filter's flattened I·kh·kw.",
)  # fmt: skip
@click.option(
    "--layer", "layers", multiple=True, callback=layer_patterns, metavar="GLOB=N:M",
    help="Another pattern (or 'dense') for the tensors that match; the last that matches wins. May be repeated.",
)  # fmt: skip
@click.option("--include", multiple=True, metavar="GLOB", help="Prune only these, whatever the rules say. May be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these dense. May be repeated.")
@click.option(
    "--target", type=click.Choice(["generic", "ort", "tensorrt", "cusparselt"]), default="generic", show_default=True,
    help="Prune only what this runtime can speed up.",
)  # fmt: skip
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Where to write; default: CHECKPOINT with .nmN-M.")
@calibration_options
@click.option(
    "--criterion", type=click.Choice(METHODS),
    help="How weights are chosen; all but magnitude need --calib.  [default: auto with --calib, else magnitude]",
)  # fmt: skip
@click.option(
    "--permute", is_flag=True,
    help="Put channels into an order that keeps more, where that is proved safe. Needs --model and --calib, for an ONNX file "
    "neither.",
)  # fmt: skip
@model_options
@output_options
def command(
    checkpoint: Path, nm: str | None, budget: str | None, axis: Axis, layers: list[tuple[str, Pattern | None]],
    include: tuple[str, ...], exclude: tuple[str, ...], target: str, output: Path | None, model: str | None,
    model_arguments: dict[str, str], calib: str | None, task: str, settings: dict[str, str], samples: int,
    batch_size: int, seed: int, criterion: str | None, permute: bool, trust: bool, printer: Printer,
) -> None:  # fmt: skip
    """Keep N of every M weights of CHECKPOINT's convolutions and linear layers.

    CHECKPOINT is a PyTorch file, a safetensors file, a Hugging Face folder or an ONNX model; the copy is of the same kind.
    Without --model, what a tensor is follows from its name and shape. Without --calib, the weights of largest magnitude are
    kept; with it, layer after layer is solved against the outputs of the dense model, and the kept weights change, too.
    An ONNX model or a Hugging Face folder needs no --model for any of this.
    """
    builds = model or (folder_itself(checkpoint) if calib else None)
    _check(checkpoint, builds, nm=nm, budget=budget, calib=calib, criterion=criterion, permute=permute)
    pattern = Pattern.parse("2:4" if nm is None else nm)
    from nmconvert import report
    from nmconvert.prune import prune

    built = calibration = None
    if builds is not None:
        from nmconvert.model import build

        built = build(builds, model_arguments, trust=trust)
    if permute or calib is not None:
        from nmconvert.calibrate.budget import Budget
        from nmconvert.calibrate.driver import Recipe
        from nmconvert.calibrate.stage import Calibration
        from nmconvert.evaluate import load_model
        from nmconvert.pace import Pace

        wanted = None if budget is None else Budget.parse(budget)
        data = None if calib is None else CalibrationData(calib, task, settings, samples, batch_size, seed)
        dense = partial(load_model, checkpoint, builds, model_arguments, trust=trust)
        batches = data.batches(Path(builds or checkpoint), built, dense) if data else ()
        recipe = Recipe(criterion=criterion or "auto", seed=seed)
        calibration = Calibration(batches, recipe, wanted, permute, teller(printer.quiet), Pace)
    said = {"model": model, "model_arguments": model_arguments if model else None, "calib": calib, "budget": budget}
    with calibration_data_named(built if calibration else None):
        result = prune(
            checkpoint, pattern, axis, output=output, layers=layers, include=include, exclude=exclude, target=target,
            criterion=criterion or ("auto" if calib else "magnitude"), model=built, calibration=calibration, settings=said,
            trust=trust,
        )  # fmt: skip
    printer.show(report.prune_json(result), lambda: report.prune_report(result))


def _check(
    checkpoint: Path, builds: str | None, *, nm: str | None, budget: str | None, calib: str | None, criterion: str | None,
    permute: bool,
) -> None:  # fmt: skip
    """Raise where the options do not say how much is kept, or lack what they need; ``builds`` is what makes the model."""
    from nmconvert.checkpoint import is_onnx

    if (nm is None) == (budget is None):
        raise UsageError("say how much is kept: --nm N:M for all layers, or --budget to choose for each")
    inputs_given = calib is not None and (builds is not None or is_onnx(checkpoint))
    if not inputs_given and (budget is not None or (permute and not is_onnx(checkpoint))):
        option, less = ("--permute", "neither") if budget is None else ("--budget", "--calib alone")
        raise UsageError(
            f"{option} runs the model on its inputs: give --model and --calib "
            f"(an ONNX file needs {less}, a Hugging Face folder no --model)"
        )
    if calib is not None and not inputs_given:
        raise UsageError(f"{checkpoint}: --calib runs the module that the weights belong to: give --model")
    if calib is None and criterion not in (None, "magnitude"):
        raise UsageError(f"--criterion {criterion} looks at the inputs of the layers: give --calib DATA")
