"""Results → rich tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nmconvert.pattern import AXES
from nmconvert.targets import usable_by

if TYPE_CHECKING:
    from nmconvert.bench import BenchResult
    from nmconvert.calibrate.budget import Sensitivity
    from nmconvert.calibrate.permute import Permutation
    from nmconvert.calibrate.stage import Choice
    from nmconvert.evaluate import Evaluation
    from nmconvert.export import ExportResult
    from nmconvert.inspect import Inspection
    from nmconvert.pattern import Pattern
    from nmconvert.plan import Plan
    from nmconvert.prune import PruneResult
    from nmconvert.runtime.choice import Times
    from nmconvert.runtime.doctor import Fact
    from nmconvert.tensor import Row
    from nmconvert.train import FinetuneResult
    from nmconvert.verify import Verification


def new_table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table in the house style; the columns named in ``right`` are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def size(count: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def shape(dims: tuple[int, ...]) -> str:
    """A shape as people write it: 64×32×3×3."""
    return "×".join(map(str, dims)) or "scalar"


def prune_report(result: PruneResult) -> RenderableType:
    """What was pruned, what was not and why, and where the result is."""
    pruned = new_table(
        "Pruned (N of every M weights are kept)",
        *("tensor", "shape", "axis", "pattern", "density", "energy kept", "faster on"),
        right=("density", "energy kept"),
    )
    for row in result.plan.pruned:
        layer = result.layer(row.name)
        pruned.add_row(
            row.name,
            shape(row.info.shape),
            f"{row.axis}{' ?' if row.assumed else ''}",
            str(row.pattern),
            f"{density(row):.1%}",
            "-" if layer.energy is None else f"{layer.energy:.1%}",
            ", ".join(usable_by(row)) or "-",
        )
    parts: list[RenderableType] = [pruned]
    if any(row.assumed for row in result.plan.pruned):
        parts.append(Text("? the kind of the layer, and so its axis, was assumed from name and shape; --model makes it known"))
    if result.permutations:
        parts += [Text(), permutation_table(result.permutations)]
    parts += [Text(), dense_table(result.plan), Text()]
    if result.choice:
        parts.append(Text(f"--budget '{result.choice.budget}' is met: {_reached(result.choice)}"))
    parts.append(Text(summary(result)))
    return Group(*parts)


def _reached(choice: Choice) -> str:
    measured = {
        "size": "of the dense weights' bytes, as compressed",
        "speedup": "times as fast as dense on this machine's kernels",
        "top1-drop": "points of agreement are lost, on a quarter of the calibration data that did not calibrate",
    }
    return f"{choice.reached:.3g} {measured[choice.budget.goal]}"


def permutation_table(permutations: Sequence[Permutation]) -> Table:
    """What the order of the input channels keeps of |w|, before and after, and where it was left alone and why."""
    table = new_table("Order of the input channels", "layers that read them", "kept as it was", "kept now", "why not")
    for done in permutations:
        shares = (f"{done.before:.2%}", f"{done.after:.2%}") if done.reason is None else ("", "")
        table.add_row(", ".join(done.names), *shares, done.reason or "")
    return table


def dense_table(plan: Plan) -> RenderableType:
    """The tensors that stay dense, with the reason; vectors and scalars are counted only."""
    dense = [row for row in plan.rows if row.pattern is None]
    shown = [row for row in dense if len(row.info.shape) > 1]
    table = new_table("Left dense", "tensor", "shape", "why")
    for row in shown:
        table.add_row(row.name, shape(row.info.shape), row.reason or "")
    if len(shown) < len(dense):
        table.add_row(f"{len(dense) - len(shown)} more", "", "fewer than two dimensions: biases, norms, statistics")
    return table


def density(row: Row) -> float:
    """Share of a pruned row's weights that is kept, short last groups included."""
    assert row.pattern is not None
    return row.pattern.kept(row.view.columns) / row.view.columns


def summary(result: PruneResult) -> str:
    """The last line of a prune: how much of the model is sparse now, and where it lies."""
    pruned = sum(row.info.numel for row in result.plan.pruned)
    every = sum(row.info.numel for row in result.plan.rows if row.info.shared_with is None)
    kept = sum(row.info.numel * density(row) for row in result.plan.pruned)
    return (
        f"{len(result.plan.pruned)} of {len(result.plan.rows)} tensors pruned: {pruned / every:.1%} of {every:,} values, "
        f"{kept:,.0f} of {pruned:,} kept. Written: {result.output} ({result.format})"
    )


def prune_json(result: PruneResult) -> Mapping[str, Any]:
    """The same for machines."""
    return {
        "source": str(result.source),
        "output": str(result.output),
        "format": result.format,
        "tensors": [_row_json(row, result) for row in result.plan.rows],
        "permutations": [asdict(done) for done in result.permutations],
        "budget": None if result.choice is None else {"asked": str(result.choice.budget), "reached": result.choice.reached},
    }


def _row_json(row: Row, result: PruneResult) -> Mapping[str, Any]:
    common = {"name": row.name, "shape": list(row.info.shape), "dtype": row.info.dtype}
    if row.pattern is None:
        return {**common, "pattern": None, "reason": row.reason}
    return {
        **common,
        "pattern": str(row.pattern),
        "kind": row.info.kind,
        "axis": row.axis,
        "assumed": row.assumed,
        "density": density(row),
        "energy_kept": result.layer(row.name).energy,
        "targets": list(usable_by(row)),
    }


def sensitivity_report(found: Sequence[Sensitivity]) -> RenderableType:
    """One row a layer, one column a pattern, and a bar of the first pattern's loss."""
    longest = 24  # characters
    patterns = [str(option.pattern) for option in found[0].options[1:]]
    shown = new_table("Loss of each layer pruned alone", "tensor", "share", *patterns, patterns[0], right=("share", *patterns))
    largest = max(max(layer.options[1].loss for layer in found), 1e-12)
    for layer in found:
        bar = "█" * round(longest * layer.options[1].loss / largest)
        losses = (f"{option.loss:.4f}" for option in layer.options[1:])
        shown.add_row(layer.name, f"{layer.options[0].size:.1%}", *losses, bar)
    return shown


def sensitivity_json(found: Sequence[Sensitivity]) -> Mapping[str, Any]:
    """The same for machines."""

    def losses(layer: Sensitivity) -> Mapping[str, Any]:
        return {str(option.pattern): {"loss": option.loss, "size": option.size} for option in layer.options[1:]}

    return {"layers": [{"name": layer.name, "axis": layer.axis, "patterns": losses(layer)} for layer in found]}


def finetune_report(result: FinetuneResult) -> RenderableType:
    """The models that were validated, and where the last is."""
    from nmconvert.train.log import table

    parts: list[RenderableType] = [table(result.training.rows, result.metric)]
    if result.training.judged_by_teacher:
        parts.append(Text("The data has no labels: agreement with the teacher is what was measured."))
    if result.worse_by:
        parts.append(
            Text(f"{result.metric} is {result.worse_by:.4g} worse than at the start: try a lower --lr, or more epochs.")
        )
    taught = f"taught by {result.teacher.name}" if result.teacher else "without a teacher"
    return Group(*parts, Text(f"Wrote {result.output}, {taught}; curves beside it."))


def finetune_json(result: FinetuneResult) -> Mapping[str, Any]:
    """The same for machines."""
    from nmconvert.train.log import row_json

    return {
        "source": str(result.source),
        "output": str(result.output),
        "log": str(result.log),
        "teacher": None if result.teacher is None else str(result.teacher),
        "metric": result.metric,
        "steps": result.training.steps,
        "stopped_early": result.training.stopped_early,
        "judged_by_teacher": result.training.judged_by_teacher,
        "rows": [row_json(row) for row in result.training.rows],
    }


def inspect_report(result: Inspection, required: Pattern | None) -> RenderableType:
    """What pattern each tensor satisfies, and what the manifest says."""
    table = new_table(
        f"{result.path} ({result.format})",
        *(
            "tensor",
            "shape",
            "dtype",
            "density",
            "size",
            "channel axis",
            "kernel axis",
            "manifest",
            *(["meets"] if required else []),
        ),
        right=("density", "size"),
    )
    for found in result.tensors:
        promised = f"{found.promised.pattern} {found.promised.axis}" if found.promised else "-"
        table.add_row(
            found.name,
            shape(found.shape),
            found.dtype,
            f"{found.density:.1%}",
            size(found.nbytes) + (" packed" if found.packed else ""),
            *(str(found.patterns[axis] or "dense") if axis in found.patterns else "-" for axis in AXES),
            promised,
            *([("yes" if found.meets else "no")] if required else []),
        )
    others = f"{result.others} more tensors have fewer than two dimensions or are no floats."
    lines: list[RenderableType] = [table, Text(), Text(others)]
    if result.manifest is None:
        lines.append(Text("No nmconvert manifest in this file."))
    else:
        stages = ", ".join(str(stage.get("stage")) for stage in result.manifest.history)
        lines.append(Text(f"Manifest: {len(result.manifest.layers)} sparse tensors; stages: {stages}."))
    return Group(*lines)


def inspect_json(result: Inspection) -> Mapping[str, Any]:
    """The same for machines."""
    return {
        "file": str(result.path),
        "format": result.format,
        "tensors": [
            {
                "name": found.name,
                "shape": list(found.shape),
                "dtype": found.dtype,
                "density": found.density,
                "bytes": found.nbytes,
                "packed": found.packed,
                "patterns": {axis: None if p is None else str(p) for axis, p in found.patterns.items()},
                "promised": str(found.promised.pattern) if found.promised else None,
                "meets": found.meets,
            }
            for found in result.tensors
        ],
        "manifest": json.loads(result.manifest.to_json()) if result.manifest else None,
    }


def export_report(result: ExportResult) -> RenderableType:
    """What was packed, what it saved, and what was checked."""
    packed = result.compressed
    table = new_table(f"{result.output} ({result.flavour})", "packed weight", "shape", "pattern", "axis")
    for layer in packed.layers:
        table.add_row(layer.name, shape(layer.info.shape), str(layer.pattern), layer.axis)
    lines = [f"{name}: dense, {reason}" for name, reason in packed.dense.items()]
    lines += [f"note: {note}" for note in result.notes]
    if packed.dense_bytes:
        share = packed.packed_bytes / packed.dense_bytes
        saved = f"{size(packed.dense_bytes)} of sparse weights take {size(packed.packed_bytes)} ({share:.1%})"
        lines.append(f"{len(packed.layers)} weights packed: {saved}; the file has {size(result.nbytes)}.")
    else:
        lines.append(f"The file has {size(result.nbytes)}; its sparse weights are zeros in place.")
    graph = ", the folded graph" if result.folded else ""
    lines.append(
        f"Checked: the ONNX checker, a run in stock onnxruntime, every weight bit for bit{graph}; "
        f"outputs within {result.difference.relative:.1e} of the model's."
    )
    parts: list[RenderableType] = [table, Text()] if packed.layers else []
    return Group(*parts, *(Text(line) for line in lines))


def export_json(result: ExportResult) -> Mapping[str, Any]:
    """The same for machines."""
    return {
        "source": str(result.source),
        "output": str(result.output),
        "flavour": result.flavour,
        "bytes": result.nbytes,
        "dense_weight_bytes": result.compressed.dense_bytes,
        "packed_weight_bytes": result.compressed.packed_bytes,
        "packed": [
            {"name": layer.name, "pattern": str(layer.pattern), "axis": layer.axis} for layer in result.compressed.layers
        ],
        "dense": dict(result.compressed.dense),
        "max_output_difference": result.difference.absolute,
        "notes": list(result.notes),
        "folded": result.folded,
    }


def verify_report(result: Verification) -> RenderableType:
    """Every check, those that fail first."""
    title = f"{result.path}" + (f" against {result.against}" if result.against else "")
    table = new_table(title, "", "check", "seen")
    for check in sorted(result.checks, key=lambda check: check.holds):
        mark = Text("ok", style="green") if check.holds else Text("FAILS", style="bold red")
        table.add_row(mark, check.what, check.seen)
    return Group(table, Text(), Text(f"{len(result.checks) - len(result.failed)} of {len(result.checks)} checks hold."))


def verify_json(result: Verification) -> Mapping[str, Any]:
    """The same for machines."""
    return {
        "file": str(result.path),
        "against": str(result.against) if result.against else None,
        "verified": not result.failed,
        "checks": [{"what": check.what, "holds": check.holds, "seen": check.seen} for check in result.checks],
    }


def eval_json(result: Evaluation) -> dict[str, Any]:
    """For machines; JSON has no NaN, so that a metric that is none is null."""
    finite = {name: value if isfinite(value) else None for name, value in result.metrics.items()}
    return {**asdict(result), "metrics": finite}


def eval_report(result: Evaluation) -> RenderableType:
    """The metrics of a file, the one that decides first."""
    title = Text(f"{result.file}: {result.task.replace('_', ' ')}", style="bold")
    table = new_table("", "metric", "value", right=("value",))
    for name in sorted(result.metrics, key=lambda name: name != result.metric):
        digits = 4 if name in ("loss", "bits_per_byte") else 2
        style = "bold" if name == result.metric else ""
        table.add_row(name.replace("_", " "), f"{result.metrics[name]:.{digits}f}", style=style)
    return Group(title, table, Text(f"{result.samples} samples of {result.data} in {result.seconds:.1f} s"))


def bench_report(result: BenchResult) -> RenderableType:
    """Whole model and layers, with a warning where the machine was too noisy."""
    right = ("threads", "batch", "dense ms", "sparse ms", "ratio", "spread")
    whole = new_table(
        f"{result.model.name}: dense ÷ sparse ({result.isa}, onnxruntime {result.onnxruntime})", *right, right=right
    )
    for row in result.models:
        whole.add_row(str(row.threads), str(row.batch), *_times(row.times), _spread(row.times))
    numbers = ("calls", "dense ms", "sparse ms", "ratio", "of m/n", "spread")
    layers = new_table("Distinct layers, alone", "function", "weight", "input", "pattern", *numbers, right=numbers)
    for layer in result.layers:
        names = (layer.function, shape(layer.weight), shape(layer.shape), str(layer.pattern), str(layer.count))
        layers.add_row(*names, *_times(layer.times), f"{layer.share:.0%}", _spread(layer.times))
    parts: list[RenderableType] = [whole]
    if result.layers:
        parts += [Text(), layers]
    if result.noisy:
        parts.append(Text("Ratios with a yellow spread say nothing: other programs are using this machine.", style="yellow"))
    if result.tuned is not None:
        parts.append(Text(f"{result.tuned}: {result.sparse_layers} layers on the kernels, the others unpacked, for this CPU."))
    return Group(*parts)


def _spread(times: Times) -> Text:
    return Text(f"{times.spread:.0%}", style="yellow" if times.noisy else "")


def _times(times: Times) -> tuple[str, str, str]:
    return f"{median(times.dense) * 1e3:.3f}", f"{median(times.sparse) * 1e3:.3f}", f"{times.ratio:.2f}"


def bench_json(result: BenchResult) -> Mapping[str, Any]:
    """The same, with every round in seconds."""
    return {
        "model": str(result.model),
        "against": str(result.against),
        "isa": result.isa,
        "onnxruntime": result.onnxruntime,
        "noisy": result.noisy,
        "models": [{"threads": row.threads, "batch": row.batch, **_times_json(row.times)} for row in result.models],
        "layers": [
            {
                "function": layer.function,
                "weight": layer.weight,
                "input": layer.shape,
                "pattern": str(layer.pattern),
                "calls": layer.count,
                "share": layer.share,
                **_times_json(layer.times),
            }
            for layer in result.layers
        ],
        "tuned": None if result.tuned is None else str(result.tuned),
        "tuned_sparse_layers": result.sparse_layers,
    }


def _times_json(times: Times) -> Mapping[str, Any]:
    rounds = {"dense": times.dense, "sparse": times.sparse}
    return {"ratio": times.ratio, "best": times.best, "spread": times.spread, "noisy": times.noisy, **rounds}


def doctor_report(facts: Sequence[Fact]) -> RenderableType:
    """One line a fact, and the remedies."""
    table = new_table("This installation", "", "found", "what to do")
    for fact in facts:
        table.add_row(fact.name, Text(fact.found, style="" if fact.fine else "yellow"), fact.remedy)
    return table
