"""Options that several commands share, and how a command prints its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


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


def show(result: Mapping[str, Any], *, as_json: bool, quiet: bool, render: Callable[[], object]) -> None:
    """Print ``result`` as JSON, or ``render()`` to a rich console; nothing when quiet."""
    if as_json:
        click.echo(json.dumps(result, indent=2, allow_nan=False))
    elif not quiet:
        from rich.console import Console

        Console().print(render())
