"""``nmconvert doctor``: what works here."""

from __future__ import annotations

from dataclasses import asdict

import click

from nmconvert.cli.common import output_options, show


@click.command("doctor")
@output_options
def command(as_json: bool, quiet: bool) -> None:
    """Show versions, whether the native kernels can be used here, and what to do where something is amiss."""
    from nmconvert import report
    from nmconvert.runtime.doctor import examine

    facts = examine()
    result = {"facts": [asdict(fact) for fact in facts], "fine": all(fact.fine for fact in facts)}
    show(result, as_json=as_json, quiet=quiet, render=lambda: report.doctor_report(facts))
