"""What a run leaves to read: a JSONL file of every step and epoch, the curves, and the live display on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, nan
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nmconvert.train.curves import write_curves


@dataclass(frozen=True)
class Row:
    """One line of the table of a run: a model that was validated.

    ``label`` is ``dense``, ``start`` or the number of the epoch; what does not apply is None.
    """

    label: str
    metrics: dict[str, float]
    loss: float | None = None
    flip_rate: float | None = None
    sad: int | None = None
    pruned_energy: float | None = None
    seconds: float | None = None


def row_json(row: Row) -> dict[str, Any]:
    """A row for JSON, which has no infinity and no NaN: they become None."""
    return {**asdict(row), "metrics": {name: value if isfinite(value) else None for name, value in row.metrics.items()}}


class Reporter:
    """All of it together: what happens is told once."""

    def __init__(self, log: Log, display: Display) -> None:
        self.log, self.display = log, display

    def __enter__(self) -> Reporter:
        self.display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.display.__exit__(*error)

    def rows(self, step: int, rows: Sequence[Row]) -> None:
        """Models that were validated after ``step``."""
        for row in rows:
            self.log.row(step, row)
            self.display.row(row)

    def epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """An epoch (from 0) begins, or goes on after ``done`` steps."""
        self.display.start(f"epoch {epoch + 1}/{epochs}", steps, done)

    def step(self, step: int, facts: Mapping[str, float]) -> None:
        """An optimiser step is done."""
        self.log.step(step, facts)
        self.display.step(facts)


class Log:
    """The JSONL file and the curves; of a resumed run, what was logged after the state it resumed from is dropped."""

    def __init__(self, path: Path | None, metric: str, steps_per_epoch: int, resumed_at: int | None) -> None:
        self.path, self.metric, self.steps_per_epoch = path, metric, steps_per_epoch
        self.lines: list[dict[str, Any]] = []
        if path is None:
            return
        if resumed_at is not None and path.is_file():
            self.lines = [line for line in _read_lines(path) if line["step"] <= resumed_at]
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def step(self, step: int, facts: Mapping[str, float]) -> None:
        """One optimiser step."""
        self._add({"kind": "step", "step": step, **facts})

    def row(self, step: int, row: Row) -> None:
        """A validated model; the curves are drawn anew."""
        self._add({"kind": "row", "step": step, **row_json(row)})
        if self.path is not None:
            self._draw(self.path.with_suffix(".svg"))

    def _add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _draw(self, path: Path) -> None:
        steps = [line for line in self.lines if line["kind"] == "step"]
        steps = steps[:: max(1, len(steps) // 500)]
        rows = [line for line in self.lines if line["kind"] == "row" and line["label"] != "dense"]
        per = self.steps_per_epoch

        def metric(line: dict[str, Any]) -> float:
            value = line["metrics"][self.metric]
            return nan if value is None else float(value)

        dense = {line["label"]: metric(line) for line in self.lines if line.get("label") == "dense"}
        panels = {
            "training loss": [(line["step"] / per, line["loss"]) for line in steps],
            self.metric: [(line["step"] / per, metric(line)) for line in rows],
            "learning rate": [(line["step"] / per, line["lr"]) for line in steps],
            "mask flips per step, %": [(r["step"] / per, 100 * r["flip_rate"]) for r in rows if r["flip_rate"] is not None],
        }
        write_curves(path, panels, levels={self.metric: dense})


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # a process that was killed left half a line, the last
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def table(rows: Sequence[Row], metric: str) -> Table:
    """Dense, start and every epoch so far."""
    names = [metric, *(name for name in rows[0].metrics if name != metric)] if rows else [metric]
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("")
    for name in [*names, "train loss", "flips/step", "SAD", "pruned energy", "time"]:
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            row.label if not row.label.isdigit() else f"epoch {row.label}",
            *(f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in names),
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.flip_rate is None else f"{row.flip_rate:.4%}",
            "" if row.sad is None else f"{row.sad:,}",
            "" if row.pruned_energy is None else f"{row.pruned_energy:.3%}",
            "" if row.seconds is None else f"{row.seconds:.0f} s",
        )
    return result


class Display:
    """The live display on stderr: the table, a bar, loss, time per step, time left. Nothing where that is no terminal."""

    def __init__(self, metric: str, rows: Sequence[Row], *, show: bool) -> None:
        self.metric, self.rows = metric, list(rows)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self.live = Live(console=console, auto_refresh=False) if show and sys.stderr.isatty() else None
        self._last = perf_counter()

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.transient = kind is None  # a run that ends well is shown by its result
            self.live.stop()

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A new bar."""
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self.progress.add_task(what, total=total, completed=done, facts="")
        self._refresh()

    def step(self, values: Mapping[str, float]) -> None:
        """One more step."""
        facts = f"loss {values['loss']:.4f}  {1e3 * values['seconds']:.0f} ms/step"
        for task in self.progress.task_ids:
            self.progress.update(task, advance=1, facts=facts)
        if perf_counter() - self._last > 0.2:
            self._refresh()

    def row(self, row: Row) -> None:
        """One more line of the table."""
        self.rows.append(row)
        self._refresh()

    def _refresh(self) -> None:
        self._last = perf_counter()
        if self.live is not None:
            parts = [table(self.rows, self.metric)] if self.rows else []
            self.live.update(Group(*parts, self.progress), refresh=True)
