"""``nmconvert doctor``: what works here."""

from __future__ import annotations

from dataclasses import asdict

import click

from nmconvert.cli.common import Printer, output_options


@click.command("doctor")
@output_options
def command(printer: Printer) -> None:
    """Show versions, whether the native kernels can be used here, and what to do where something is amiss."""
    from nmconvert import report
    from nmconvert.runtime.doctor import examine

    facts = examine()
    result = {"facts": [asdict(fact) for fact in facts], "fine": all(fact.fine for fact in facts)}
    printer.show(result, lambda: report.doctor_report(facts))
