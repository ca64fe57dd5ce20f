"""``nmconvert bench``: dense against sparse, measured here."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import click

from nmconvert.cli.common import Printer, model_options, newest_onnx, output_options
from nmconvert.errors import UsageError, VerificationError

_MOST_THREADS = 1024  # onnxruntime starts as many as it is told to, and hangs where the system has no more


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    if value is None:
        return []
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"--{parameter.name} '{value}' is not a list of positive numbers, for example 1,2")
    return numbers


def _threads(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    numbers = _numbers(ctx, parameter, value)
    if max(numbers) > _MOST_THREADS:
        raise UsageError(f"--threads {max(numbers)} are too many: at most {_MOST_THREADS}")
    return numbers


def _finite(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not isfinite(value):
        raise UsageError(f"--{parameter.name} {value} is not a finite number")
    return value


@click.command("bench")
@click.argument(
    "file",
    metavar="[MODEL]",
    required=False,
    callback=newest_onnx,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--against",
    type=click.Path(exists=True, path_type=Path),
    help="A dense ONNX file, or a checkpoint, which is exported for that.  [default: MODEL with its weights unpacked]",
)
@click.option("--threads", default="1", show_default=True, callback=_threads, metavar="N,…", help="Threads, one run each.")
@click.option(
    "--batch",
    callback=_numbers,
    metavar="N,…",
    help="Batch sizes, one run each.  [default: the model's own, or 1]",
)
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]SHAPE[:DTYPE]", help="Shape of an input; may be repeated.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(3), help="Interleaved rounds.")
@click.option(
    "--seconds",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.01),
    callback=_finite,
    help="Time for each side of a run.",
)
@click.option("--layers/--no-layers", default=True, help="Time each distinct layer as well.  [default: layers]")
@click.option(
    "--tuned",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write MODEL into FILE with those layers unpacked that are faster dense here, for programs that register the library "
    "and measure nothing.",
)
@click.option(
    "--require",
    type=float,
    callback=_finite,
    metavar="RATIO",
    help="Exit with status 1 unless every run is this much faster.",
)
@model_options
@output_options
def command(
    file: Path,
    against: Path | None,
    threads: list[int],
    batch: list[int],
    inputs: tuple[str, ...],
    rounds: int,
    seconds: float,
    layers: bool,
    tuned: Path | None,
    require: float | None,
    model_arguments: dict[str, str],
    trust: bool,
    model: str | None,
    printer: Printer,
) -> None:
    """Measure MODEL on the native kernels against dense onnxruntime: whole model and each layer, in interleaved rounds.

    MODEL is a compressed ONNX file (default: the newest of nmconvert in this folder). The exit status is 0 also where nothing
    is gained; --require makes it 1.
    """
    from nmconvert import report
    from nmconvert.bench import bench
    from nmconvert.inputs import InputSpec

    specs = [InputSpec.parse(text) for text in inputs]
    result = bench(
        file,
        against=against,
        module=model,
        module_arguments=model_arguments or None,
        trust=trust,
        threads=threads,
        batches=batch,
        inputs=specs,
        rounds=rounds,
        seconds=seconds,
        per_layer=layers,
        tuned=tuned,
    )
    printer.show(report.bench_json(result), lambda: report.bench_report(result))
    if require is not None and result.slowest < require:
        raise VerificationError(f"{file}: dense ÷ sparse is {result.slowest:.2f}, {require:.2f} is required")
