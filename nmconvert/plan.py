"""The plan: for every tensor of a checkpoint its pattern and axis, or the reason why it stays dense.

A plan is made before anything is written, from what every container gives (:class:`nmconvert.tensor.TensorInfo`), and is
what the manifest of the result records. Nothing is skipped silently: a tensor that stays dense is a row with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from nmconvert.errors import UsageError, check_choice
from nmconvert.pattern import AXES, Axis, Pattern
from nmconvert.rules import COMPUTED, guess_kind, output_layers, parts_of_weights, rule_against
from nmconvert.targets import TARGETS
from nmconvert.tensor import PRUNABLE_DTYPES, Row, TensorInfo

NOT_INCLUDED = "not included"  # the reason where others were asked for


@dataclass(frozen=True)
class Plan:
    """All rows, in the order of the checkpoint."""

    rows: tuple[Row, ...]

    @property
    def pruned(self) -> tuple[Row, ...]:
        """The rows that have a pattern."""
        return tuple(row for row in self.rows if row.pattern is not None)


def make_plan(
    tensors: Sequence[TensorInfo],
    pattern: Pattern,
    axis: Axis = "channel",
    *,
    layers: Sequence[tuple[str, Pattern | None]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    target: str = "generic",
) -> Plan:
    """Decide for every tensor.

    ``layers`` are (glob, pattern) pairs, None for dense; the last that matches wins. ``include`` globs, if any, select what is
    pruned and override the rules about embeddings, first and last layers, as does a pair of ``layers`` that is a tensor's own
    name; ``exclude`` globs leave tensors dense. ``target`` is a key of
    :data:`nmconvert.targets.TARGETS`: layers that it could not use stay dense.

    Raises:
        UsageError: a glob matches no tensor, or there is no such axis or target.
    """
    check_choice("axis", axis, AXES)
    check_choice("target", target, TARGETS)
    names = [info.name for info in tensors]
    for glob in [*(g for g, _ in layers), *include, *exclude]:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(f"'{glob}' matches no tensor of the checkpoint; `nmconvert inspect` lists their names")
    outputs = output_layers([(info.name, info.shape) for info in tensors if not info.secondary and info.reason is None])
    choices = _Choices(pattern, axis, tuple(layers), tuple(include), tuple(exclude), target, outputs, parts_of_weights(names))
    rows: dict[str, Row] = {}
    for info in tensors:
        rows[info.name] = _decide(info, choices, rows)
    return Plan(tuple(rows.values()))


@dataclass(frozen=True)
class _Choices:
    pattern: Pattern
    axis: Axis
    layers: tuple[tuple[str, Pattern | None], ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    target: str
    outputs: frozenset[str]
    parts: frozenset[str]


def _decide(info: TensorInfo, choices: _Choices, decided: dict[str, Row]) -> Row:
    glob, pattern = next(
        ((glob, pattern) for glob, pattern in reversed(choices.layers) if fnmatchcase(info.name, glob)), ("", choices.pattern)
    )
    if pattern is None:
        return Row(info, reason=f"dense, by --layer '{glob}'")
    if info.shared_with is not None and info.shared_with in decided:
        first = decided[info.shared_with]
        return Row(info, reason=f"shares its storage with {first.name}" + (", pruned there" if first.pattern else ""))
    if excluded := _matching(info.name, choices.exclude):
        return Row(info, reason=f"excluded by '{excluded}'")
    included = info.name == glob or _matching(info.name, choices.include) is not None
    if choices.include and not included:
        return Row(info, reason=NOT_INCLUDED)
    if reason := _impossible(info):
        return Row(info, reason=reason)
    assumed = info.kind is None
    against = COMPUTED if info.name in choices.parts else _rule(info, choices)
    if against is not None and not included:
        return Row(info, reason=against)
    known = replace(info, kind=info.kind or guess_kind(info.name, info.shape))
    row = Row(known, pattern, choices.axis, assumed)
    if reason := _too_small(row, explicit=included) or TARGETS[choices.target](row):
        return Row(known, assumed=assumed, reason=reason)
    return row


def _rule(info: TensorInfo, choices: _Choices) -> str | None:
    is_output = info.output or info.own_name in choices.outputs
    return rule_against(info.name, info.shape, info.kind, groups=info.groups, is_output=is_output)


def _matching(name: str, globs: Iterable[str]) -> str | None:
    return next((glob for glob in globs if fnmatchcase(name, glob)), None)


def _impossible(info: TensorInfo) -> str | None:
    if info.reason is not None:
        return info.reason
    if len(info.shape) < 2:
        return "fewer than two dimensions: no weight matrix"
    if info.dtype not in PRUNABLE_DTYPES:
        return f"{info.dtype}: only fp32, fp16, bf16 and fp64 weights are pruned"
    if 0 in info.shape:
        return "empty"
    if info.kind is None and len(info.shape) > 5:
        return f"{len(info.shape)} dimensions: neither a convolution nor a linear layer"
    return None


def _too_small(row: Row, *, explicit: bool) -> str | None:
    assert row.pattern is not None
    view, pattern = row.view, row.pattern
    if pattern.is_dense:
        return f"{pattern} is dense"
    if view.columns <= pattern.n or (view.columns < pattern.m and not explicit):
        return f"{view.columns} weights per output, fewer than a group of {pattern.m}"
    channels = row.info.input_channels
    if row.axis == "channel" and channels < pattern.m and not explicit:
        return f"{channels} input channels, fewer than a group of {pattern.m}"
    return None
