"""Options that several commands share, and how a command prints its result."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nmconvert.errors import UsageError
from nmconvert.pattern import Pattern

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

F = TypeVar("F", bound=Callable[..., Any])

TASKS = ("classification", "detection", "segmentation", "translation", "language_model")
"""The keys of `nmconvert.tasks.TASKS`, without the import of torch that they cost."""

_READ = ("checkpoint", "file", "teacher", "against", "calib", "data", "model")
"""Parameters of commands that name a file or a folder that is read; settings of a task and arguments of a model can, too."""

_MADE = {"html": "a page", "plot": "an SVG picture", "tuned": "an ONNX file"}
"""Options that name a file that is written, and what it is. An ``output`` is of the kind of what it is made from."""

_VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20) if code != 0x0A},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""The signs that Unicode has for control characters; for those of ISO 8859 it has none."""


@dataclass(frozen=True)
class Printer:
    """How a command gives its result: as tables on the terminal, as JSON, or not at all, and as a page beside that."""

    as_json: bool = False
    quiet: bool = False
    page: Path | None = None

    @property
    def silent(self) -> bool:
        """Whether nothing but the result's JSON may be printed."""
        return self.as_json or self.quiet

    def show(
        self, result: Mapping[str, Any], render: Callable[[], RenderableType], pictures: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """Give ``result``; ``render`` makes its tables and ``pictures`` its SVGs, where they are wanted."""
        if self.page is not None:
            from nmconvert.page import write_page

            write_page(self.page, command_line(), result, render(), pictures())
        if self.as_json:
            click.echo(json.dumps(result, indent=2, allow_nan=False))
        elif not self.quiet:
            _print(render())


def command_line() -> str:
    """The command as it was typed, for a shell."""
    return shlex.join(["nmconvert", *sys.argv[1:]])


def _print(shown: RenderableType) -> None:
    from rich.console import Console

    def console(width: int | None = None) -> Console:
        return Console(width=width, markup=False, emoji=False)  # names of tensors are what they are

    wide = console() if console().is_terminal else console(140)  # a pipe has no width; 80 columns would fold the names
    wide.print(_Printable(shown))


@dataclass(frozen=True)
class _Printable:
    """What it holds, with `printable` text: names come from files, and a terminal obeys what it is sent."""

    shown: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for text, style, control in console.render(self.shown, options):
            yield Segment(text if control else printable(text), style, control)


def printable(text: str) -> str:
    """``text`` with a visible sign for each control character that is no end of a line."""
    return text.translate(_VISIBLE)


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """``--json``, ``--html``, ``--quiet`` and ``--debug``: what is printed, and in which form. The command takes a printer."""

    @wraps(function)
    def command(*, as_json: bool, quiet: bool, html: Path | None, **said: Any) -> None:
        _check_files({**said, "html": html})
        function(printer=Printer(as_json, quiet, html), **said)

    for option in (
        click.option("--debug", is_flag=True, expose_value=False, help="On an error, show the traceback."),
        click.option("--quiet", "-q", is_flag=True, is_eager=True, help="Print nothing but errors."),
        click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the result into this page, too."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ):
        command = option(command)
    return command


def _check_files(said: Mapping[str, Any]) -> None:
    """Hold the files that the options of any command have it write against those that they have it read, before any work."""
    from nmconvert.checkpoint import check_apart, check_target
    from nmconvert.imports import file_of

    settings = {**said.get("settings", {}), **said.get("model_arguments", {})}
    check_apart(
        [(said[option], f"--{option}") for option in ("output", *_MADE) if said.get(option) is not None],
        [*(file_of(str(said[name])) for name in _READ if said.get(name) is not None), *map(Path, settings.values())],
    )
    for option, made in _MADE.items():
        if said.get(option) is not None:
            check_target(said[option], f"--{option}", made=made)


def model_options(function: F) -> F:
    """``--model``, ``--model-arg`` and ``--trust``: which module a checkpoint belongs to."""
    for option in (
        click.option("--trust", is_flag=True, help="Load files that execute code (pickled modules, TorchScript, .pt2)."),
        click.option(
            "--model-arg",
            "model_arguments",
            multiple=True,
            callback=key_values,
            metavar="NAME=VALUE",
            help="An argument of the model's callable. May be repeated.",
        ),
        click.option(
            "--model", metavar="SPEC", help="package.module:callable, path/to/file.py:callable, or a Hugging Face folder."
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def layer_patterns(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> list[tuple[str, Pattern | None]]:
    """Callback of ``--layer GLOB=N:M`` and ``--layer GLOB=dense``."""
    pairs = [item.rpartition("=") for item in value]
    for glob, _, right in pairs:
        if not glob or not right:
            raise click.BadParameter(f"'{glob or right}' is not of the form GLOB=N:M", ctx, parameter)
    return [(glob, None if right == "dense" else Pattern.parse(right)) for glob, _, right in pairs]


def newest_checkpoint(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path:
    """Callback of an optional CHECKPOINT: the newest file in this folder that nmconvert pruned or trained."""
    return value or _newest(ctx, "checkpoint", "nmconvert prune", lambda onnx: not onnx)


def newest_onnx(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path:
    """Callback of an optional FILE: the newest ONNX file in this folder that nmconvert wrote."""
    return value or _newest(ctx, "ONNX file", "nmconvert export --onnx", lambda onnx: onnx)


def newest_result(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path:
    """Callback of an optional FILE: the newest file in this folder that nmconvert wrote, checkpoint or ONNX."""
    return value or _newest(ctx, "result", "nmconvert prune", lambda onnx: True)


def _newest(ctx: click.Context, what: str, first: str, wanted: Callable[[bool], bool]) -> Path:
    """The newest of nmconvert's files here, by its manifest: logs, pages and unfinished work have such names, too."""
    from nmconvert.checkpoint import has_manifest, is_onnx

    named = [path for path in Path().glob("*.nm*") if re.search(r"\.nm\d+-\d+(\.|$)", path.name) and path.exists()]
    named.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    newest = next((path for path in named if has_manifest(path) and wanted(is_onnx(path))), None)
    if newest is None:
        raise UsageError(f"no {what} was given, and this folder has none of nmconvert's: run {first} first")
    if not ctx.params["quiet"]:
        click.echo(f"nmconvert: taking {newest}, the newest {what} of nmconvert here", err=True)
    return newest


def dimensions(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[int, str]:
    """Callback of ``--dynamic AXIS=NAME``."""
    pairs = key_values(ctx, parameter, value)
    if not all(axis.isdecimal() and len(axis) < 4 and name.isidentifier() for axis, name in pairs.items()):
        raise click.BadParameter("write the number of the dimension and a name for it, for example 0=batch", ctx, parameter)
    return {int(axis): name for axis, name in pairs.items()}


def key_values(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    """Callback of options written ``NAME=VALUE`` and given any number of times."""
    pairs = {}
    for item in value:
        name, equals, right = item.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"'{item}' is not of the form NAME=VALUE", ctx, parameter)
        pairs[name] = right
    return pairs


def task_options(function: F) -> F:
    """``--task``, ``--data`` and the task's settings; ``--mean``, ``--std`` and ``--skip-bad`` are settings, too."""

    def merged(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
        shorthand = {name: text for name in ("mean", "std") if (text := ctx.params.pop(name, None)) is not None}
        skip = {"skip_bad": "true"} if ctx.params.pop("skip_bad", False) else {}
        return shorthand | skip | key_values(ctx, parameter, value)

    for option in (
        click.option("--task-arg", "settings", multiple=True, callback=merged, metavar="NAME=VALUE",
                     help="A setting of the task, such as size=224; may be repeated."),
        click.option("--skip-bad", is_flag=True, is_eager=True, help="Leave out images that cannot be read."),
        click.option("--std", is_eager=True, metavar="X,Y,Z", help="Divides after that, as in --mean."),
        click.option("--mean", is_eager=True, metavar="X,Y,Z",
                     help="Subtracted from images scaled to 0..1, per channel  [default: ImageNet's]."),
        click.option("--data", metavar="DATA", help="Folder, file or package.module:callable."),
        click.option("--task", type=click.Choice(TASKS),
                     help="What the model does: decides on data, loss and metric.  [default: classification]"),
    ):  # fmt: skip
        function = option(function)
    return function
