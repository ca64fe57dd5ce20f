"""``nmconvert verify``: whether a file is what it says."""

from __future__ import annotations

from pathlib import Path

import click

from nmconvert.cli.common import Printer, model_options, newest_onnx, output_options
from nmconvert.errors import VerificationError


@click.command("verify")
@click.argument("file", required=False, callback=newest_onnx, type=click.Path(exists=True, path_type=Path))
@click.option("--against", type=click.Path(exists=True, path_type=Path), help="A checkpoint or ONNX file to compare with.")
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]SHAPE[:DTYPE]", help="An example input. May be repeated.")
@model_options
@output_options
def command(
    file: Path, against: Path | None, inputs: tuple[str, ...], model: str | None, model_arguments: dict[str, str],
    trust: bool, printer: Printer,
) -> None:  # fmt: skip
    """Check FILE's patterns and hashes, run it, and compare it with another file; exit status 1 if anything differs.

    FILE is a checkpoint or an ONNX file (default: the newest ONNX file of nmconvert in this folder).
    """
    from nmconvert.inputs import InputSpec

    specs = [InputSpec.parse(text) for text in inputs]
    from nmconvert import report
    from nmconvert.verify import verify

    result = verify(
        file, against, model=model, model_arguments=model_arguments or None, inputs=specs, trust=trust
    )  # fmt: skip
    printer.show(report.verify_json(result), lambda: report.verify_report(result))
    if result.failed:
        names = ", ".join(check.what for check in result.failed[:3])
        raise VerificationError(f"{file}: {len(result.failed)} of {len(result.checks)} checks fail, among them {names}")
