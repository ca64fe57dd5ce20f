"""``nmconvert inspect``: what pattern each tensor satisfies."""

from __future__ import annotations

from pathlib import Path

import click

from nmconvert.cli.common import Printer, output_options
from nmconvert.errors import VerificationError
from nmconvert.pattern import Pattern


@click.command("inspect")
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--require", metavar="N:M", help="Exit with status 1 unless every sparse tensor satisfies this pattern.")
@click.option("--trust", is_flag=True, help="Load files that execute code (pickled modules, TorchScript, .pt2).")
@output_options
def command(file: Path, require: str | None, trust: bool, printer: Printer) -> None:
    """Show the tightest N:M that each tensor of FILE satisfies, per axis, found from its zeros.

    FILE is any checkpoint or ONNX file, written by nmconvert or not.
    """
    required = None if require is None else Pattern.parse(require)
    from nmconvert import report
    from nmconvert.inspect import inspect

    result = inspect(file, require=required, trust=trust)
    printer.show(report.inspect_json(result), lambda: report.inspect_report(result, required))
    if required and result.failing:
        names = ", ".join(found.name for found in result.failing[:3])
        raise VerificationError(f"{file}: {len(result.failing)} of {len(result.tensors)} tensors fail {required}: {names}")
