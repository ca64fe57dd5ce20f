"""Options that several commands share, and how a command prints its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

TASKS = ("classification",)
"""The keys of `nmconvert.tasks.TASKS`, without the import of torch that they cost."""


def output_options(function: F) -> F:
    """``--json``, ``--quiet`` and ``--debug``: how much is printed, and in which form."""
    for option in (
        click.option("--debug", is_flag=True, expose_value=False, help="On an error, show the traceback."),
        click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ):
        function = option(function)
    return function


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
        click.option("--data", required=True, metavar="DATA", help="Folder, file or package.module:callable."),
        click.option("--task", type=click.Choice(TASKS), default=TASKS[0], show_default=True,
                     help="What the model does: decides on data, loss and metric."),
    ):  # fmt: skip
        function = option(function)
    return function


def show(result: Mapping[str, Any], *, as_json: bool, quiet: bool, render: Callable[[], object]) -> None:
    """Print ``result`` as JSON, or ``render()`` to a rich console; nothing when quiet."""
    if as_json:
        click.echo(json.dumps(result, indent=2, allow_nan=False))
    elif not quiet:
        from rich.console import Console

        Console().print(render())
