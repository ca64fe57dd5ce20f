"""The command line: one file a command, each parses, calls one function and prints.

Commands are imported when they are used, so that ``nmconvert --help`` returns at once.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from io import TextIOWrapper

import click

from nmconvert import __version__
from nmconvert.cli.common import printable
from nmconvert.errors import NmconvertError

COMMANDS = {
    "prune": "keep n of every m weights of a trained checkpoint",
    "sensitivity": "what each pattern costs in each layer, by calibration data",
    "finetune": "bring back accuracy by some epochs of SR-STE",
    "inspect": "what pattern each tensor of any checkpoint or ONNX file satisfies",
    "export": "write an ONNX file with compressed weights",
    "verify": "prove that a file is what it says",
    "bench": "measure it on the native kernels against dense onnxruntime",
    "doctor": "what works in this installation, and what to do about the rest",
    "eval": "measure a checkpoint or an ONNX file with the metric of its task",
}


class LazyGroup(click.Group):
    """A group whose commands live in ``nmconvert.cli.<name>`` and are imported on use; its help needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order in which one uses them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"nmconvert.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them with what each does, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="nmconvert")
def group() -> None:
    """Turn trained models into N:M structured-sparse ones: n weights are kept in every group of m."""


def main() -> None:
    """Run the command line; warnings and errors are a line each, errors an exit status: 1 failed, 2 usage, 130 interrupted."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign shows another, after all the work
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            group.main(prog_name="nmconvert", standalone_mode=False)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _fail(*_one_line(error))
    except KeyboardInterrupt:
        _fail("interrupted; no result was left half written", 130)


def _one_line(error: Exception) -> tuple[str, int]:
    """The message and the exit status that an error becomes."""
    if isinstance(error, NmconvertError):
        return str(error), error.exit_status
    if isinstance(error, click.exceptions.Abort) and isinstance(error.__cause__, EOFError):
        error = error.__cause__  # for click the end of any file is that of a person's patience
    if isinstance(error, click.exceptions.Abort):
        return "interrupted; no result was left half written", 130
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "nmconvert"
        return f"{error.format_message()} (see {command} --help)", error.exit_code
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}", 1
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "out of memory: a smaller batch or a machine with more memory is needed", 1
    return f"{type(error).__name__}: {error}; this is a bug in nmconvert: please report it with the output of --debug", 1


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    click.echo(f"nmconvert: warning: {printable(' '.join(str(message).split()))}", err=True)


def _fail(message: str, status: int) -> None:
    click.echo(f"nmconvert: error: {printable(' '.join(message.split()))}", err=True)
    sys.exit(status)
