"""``nmconvert export``: a checkpoint or an ONNX file → an ONNX file with compressed weights."""

from __future__ import annotations

from pathlib import Path

import click

from nmconvert.cli.common import Printer, dimensions, model_options, newest_checkpoint, output_options
from nmconvert.errors import UsageError


@click.command("export")
@click.argument("checkpoint", required=False, callback=newest_checkpoint, type=click.Path(exists=True, path_type=Path))
@click.option("--onnx", "as_onnx", is_flag=True, default=True, help="Write ONNX (the default, and the only format so far).")
@click.option(
    "--flavour", type=click.Choice(["compressed", "dense", "inlined"]), default="compressed", show_default=True,
    help="Packed weights for any onnxruntime; zeros in place for TensorRT; packed without functions for OpenVINO.",
)  # fmt: skip
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]SHAPE[:DTYPE]", help="An example input. May be repeated.")
@click.option(
    "--dynamic", multiple=True, callback=dimensions, metavar="AXIS=NAME",
    help="A dimension of the inputs that stays open; default: 0=batch. May be repeated.",
)  # fmt: skip
@click.option("--static", is_flag=True, help="Fix every dimension.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), help="Convert the module to this type first.")
@click.option(
    "--values", type=click.Choice(["float16", "bfloat16", "int8"]),
    help="Round the kept weights of float32 layers to this type (int8: with a scale for each output channel) and store them "
    "so; the model computes in float32.",
)  # fmt: skip
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Where to write; default: CHECKPOINT with .onnx.")
@model_options
@output_options
def command(
    checkpoint: Path, as_onnx: bool, flavour: str, inputs: tuple[str, ...], dynamic: dict[int, str], static: bool,
    dtype: str | None, values: str | None, output: Path | None, model: str | None, model_arguments: dict[str, str], trust: bool,
    printer: Printer,
) -> None:  # fmt: skip
    """Write CHECKPOINT as an ONNX file that holds only the kept weights, and check it against the model.

    CHECKPOINT is any file that nmconvert pruned (default: the newest in this folder). --model and --input need not be said
    again where they were said before.
    """
    from nmconvert.inputs import InputSpec

    if static and dynamic:
        raise UsageError("--static fixes every dimension, --dynamic leaves some open: give one of them")
    specs = [InputSpec.parse(text) for text in inputs]
    import torch

    from nmconvert import report
    from nmconvert.export import export

    result = export(
        checkpoint, output=output, flavour=flavour, model=model, model_arguments=model_arguments or None, inputs=specs,
        dynamic={} if static else dynamic or None, dtype=getattr(torch, dtype) if dtype else None, values=values,
        trust=trust,
    )  # fmt: skip
    printer.show(report.export_json(result), lambda: report.export_report(result))
