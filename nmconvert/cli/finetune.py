"""``nmconvert finetune``: SR-STE on a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nmconvert.cli.common import F, Printer, model_options, newest_checkpoint, output_options, task_options
from nmconvert.errors import UsageError

SETTINGS: tuple[Callable[[F], F], ...] = (
    click.option("--epochs", type=int, help="Passes over the training data.  [default: 3]"),
    click.option("--batch", type=int, help="Samples per step, over all processes.  [default: 64]"),
    click.option("--accumulate", type=int, help="Parts in which each process takes its share.  [default: 1]"),
    click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="[default: sgd for classification, else adamw]"),
    click.option("--lr", type=float, help="Highest learning rate.  [default: 0.02 for sgd, 1e-3 for adamw]"),
    click.option("--weight-decay", type=float, help="Of matrices and filters.  [default: 1e-4]"),
    click.option("--warmup", type=float, help="Share of the steps until the highest rate.  [default: 0.05]"),
    click.option("--clip", type=float, help="Largest norm of the gradient."),
    click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the forward pass.  [default: fp32]"),
    click.option("--ema", type=float, help="Keep averaged weights, with this decay per step."),
    click.option("--distill", type=float, help="Share of the teacher in the loss; 1 needs no labels.  [default: 1]"),
    click.option("--method", type=click.Choice(["sr-ste", "ste", "fixed-mask"]), help="[default: sr-ste]"),
    click.option("--decay", type=float, help="λ of SR-STE.  [default: 0.1 for sgd, 10 for adamw]"),
    click.option("--anneal", type=click.Choice(["constant", "rise", "fall"]), help="λ over the steps.  [default: constant]"),
    click.option("--freeze-masks", type=float, help="Share of the steps, at the end, with fixed masks.  [default: 0]"),
    click.option("--patience", type=int, help="Stop after so many epochs without a better metric, and keep the best."),
    click.option("--augment/--no-augment", default=None, help="Random changes of the training data.  [default: augment]"),
    click.option("--workers", type=int, help="Processes that read the data.  [default: 0]"),
    click.option("--seed", type=int, help="Of everything random.  [default: 0]"),
    click.option("--save-minutes", type=float, help="Between states within an epoch.  [default: 10]"),
    click.option("--shard", is_flag=True, default=None, help="Under torchrun: spread the weights over the processes (FSDP2)."),
)


def training_options(function: F) -> F:
    """The fields of `nmconvert.train.Settings`; what is left out is decided there."""
    for option in reversed(SETTINGS):
        function = option(function)
    return function


@click.command("finetune")
@click.argument("checkpoint", required=False, type=click.Path(exists=True, path_type=Path), callback=newest_checkpoint)
@task_options
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), help="Dense checkpoint.  [default: what was pruned]")
@click.option("--no-teacher", is_flag=True, help="Learn from labels alone.")
@click.option("--from-dense", is_flag=True, help="Start from the teacher's weights, masked.")
@click.option("--resume", is_flag=True, help="Go on with a run that did not end, bit for bit.")
@click.option("--device", help="cpu, cuda:0 …; cuda is each process's own.  [default: a GPU if there is one]")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Where to write; default: CHECKPOINT with .ft.")
@training_options
@model_options
@output_options
def command(
    checkpoint: Path, task: str | None, data: str | None, settings: dict[str, str], teacher: Path | None, no_teacher: bool,
    from_dense: bool, resume: bool, device: str | None, output: Path | None, model: str | None,
    model_arguments: dict[str, str], trust: bool, printer: Printer, **numbers: Any,
) -> None:  # fmt: skip
    """Bring back the accuracy of CHECKPOINT, which `nmconvert prune` wrote, by some epochs of SR-STE.

    CHECKPOINT is by default the newest checkpoint of nmconvert in this folder. What was said before (--task, --data, --model)
    need not be said again. The dense checkpoint that was pruned is the teacher, so that data without labels is enough.
    Under torchrun all processes train together: torchrun --nproc-per-node 2 -m nmconvert finetune …
    """
    from nmconvert.train import Settings, finetune

    if no_teacher and (teacher or numbers["distill"]):
        raise UsageError(
            f"{'--teacher' if teacher else '--distill'} needs the teacher that --no-teacher does without: leave out one"
        )
    result = finetune(
        checkpoint, task, data, Settings(**{name: value for name, value in numbers.items() if value is not None}),
        task_settings=settings, model=model, model_arguments=model_arguments, teacher=teacher, learn_alone=no_teacher,
        from_dense=from_dense, output=output, resume=resume, device=device, trust=trust, display=not printer.silent,
    )  # fmt: skip
    from nmconvert import dist
    from nmconvert.report import finetune_json, finetune_report

    if dist.started_rank() == 0:
        printer.show(finetune_json(result), lambda: finetune_report(result), lambda: [result.curves.read_text("utf-8")])
