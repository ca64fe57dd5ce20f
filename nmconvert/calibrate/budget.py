"""Mixed patterns under a budget: which layer bears which pattern, and the choice that costs the least accuracy.

Every layer is pruned alone, to every pattern of a list, and the error of the model's outputs is measured on calibration
data; that error is the layer's *loss* for the pattern. The choice then takes losses to be additive, and minimises their sum
under the budget by dynamic programming (a multiple-choice knapsack). The budget ``top1-drop`` is not additive: there the
smallest size is searched whose choice, pruned as a whole and measured, keeps the drop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nmconvert.calibrate.correct import held_out_error
from nmconvert.calibrate.driver import Recipe, prune_model
from nmconvert.calibrate.moments import Moments, Site, find_sites, inputs_seen, solve_rows
from nmconvert.calibrate.replay import Batch, as_call, call_model, outputs_of
from nmconvert.errors import UsageError
from nmconvert.matrix import MatrixView
from nmconvert.pattern import Axis, Pattern

PATTERNS = tuple(Pattern.parse(text) for text in ("2:4", "1:4", "4:8", "2:8", "1:8", "1:16"))
_STEPS = 4000  # costs are rounded up to this share of the budget
_MEASURED = 4  # batches that losses are measured on
_SEARCHES = 5  # bisections of the size for top1-drop: to 1/32 of the range

Goal = Literal["size", "speedup", "top1-drop"]


@dataclass(frozen=True)
class Budget:
    """``size``: share of the dense bytes of the planned layers; ``speedup``: dense over kept multiplications, in them;
    ``top1-drop``: points of agreement with the dense model's first choice that may be lost (an upper bound of the accuracy
    that may be lost, for which no labels are needed).
    """

    goal: Goal
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``size<=0.35``, ``speedup>=1.5`` or ``top1-drop<=0.5``.

        Raises:
            UsageError: it is none of these, or cannot be met by anything.
        """
        match = re.fullmatch(r"\s*(?:(size|top1-drop)\s*<=|(speedup)\s*>=)\s*(\d+(?:\.\d+)?)\s*", text)
        if match is None:
            raise UsageError(f"'{text}' is no budget: write size<=0.35, speedup>=1.5 or top1-drop<=0.5")
        goal: Any = match[1] or match[2]
        limit = float(match[3])
        if goal == "speedup" and limit < 1:
            raise UsageError(f"'{text}': every model meets a speedup of less than 1")
        return cls(goal, limit)


@dataclass(frozen=True)
class Option:
    """One way to treat one layer: its pattern (None: dense), bytes and multiplications relative to the whole, and loss."""

    pattern: Pattern | None
    size: float
    work: float
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """One layer with its options, the dense one first."""

    name: str
    axis: Axis
    options: tuple[Option, ...]


def packed_share(pattern: Pattern, columns: int, bits: int = 32) -> float:
    """Size of a packed row of ``columns`` weights of ``bits`` each: values, and one mask bit a weight; relative to dense."""
    return pattern.kept(columns) / columns + 1 / bits


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    axes: Mapping[str, Axis],
    patterns: Sequence[Pattern] = PATTERNS,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Sensitivity]:
    """The sensitivities of the parameters ``axes`` of ``model``, each pruned alone by the solver ``exact``.

    The model is as it was when this returns. Losses are relative squared errors of the outputs on the last four batches.
    """
    model.eval()
    sites = find_sites(model, {name: (Pattern(1, 1), axis) for name, axis in axes.items()})
    moments = _moments(model, batches, sites)
    held = [[as_call(batch)] for batch in batches[-_MEASURED:]]
    targets = outputs_of(model, held)
    bytes_dense = {site.name: model.get_parameter(site.name).numel() for site in sites}
    work_dense = _work(model, batches[0], sites)
    found = []
    for site in sites:
        size, work = bytes_dense[site.name] / sum(bytes_dense.values()), work_dense[site.name] / sum(work_dense.values())
        options = [Option(None, size, work, 0.0)]
        for pattern in patterns:
            share, loss = _alone(model, site, moments[site.name], pattern, lambda: held_out_error(model, held, targets))
            options.append(Option(pattern, size * share, work * pattern.density, loss))
        found.append(Sensitivity(site.name, site.axis, tuple(options)))
        progress(f"{site.name}  " + "  ".join(f"{o.pattern} {o.loss:.4f}" for o in options[1:]))
    return found


def _alone(
    model: nn.Module, site: Site, moments: list[Moments], pattern: Pattern, error: Callable[[], float]
) -> tuple[float, float]:
    """Packed share and loss of one layer pruned alone."""
    parameter = model.get_parameter(site.name)
    view = MatrixView.of(site.kind, parameter.shape, site.axis, site.groups)
    dense = parameter.detach().clone()
    solved = solve_rows(view.to_matrix(dense), moments, pattern, "exact", 0.01, centred=False)
    try:
        parameter.data.copy_(view.from_matrix(solved.weight))
        return packed_share(pattern, view.columns, 8 * dense.element_size()), error()
    finally:
        parameter.data.copy_(dense)


def _moments(model: nn.Module, batches: Sequence[Batch], sites: Sequence[Site]) -> dict[str, list[Moments]]:
    moments: dict[str, list[Moments]] = {site.name: [] for site in sites}
    for batch in batches:
        seen = inputs_seen(model, model, sites, [as_call(batch)], Recipe.tokens // len(batches))
        for name, calls in seen.items():
            for blocks in calls:
                moments[name] = moments[name] or [Moments() for _ in blocks]
                for block, x in zip(moments[name], blocks, strict=True):
                    block.add(x, x)
    if unused := [name for name, blocks in moments.items() if not blocks]:
        raise UsageError(f"'{unused[0]}' was not used by the calibration data: exclude it")
    return moments


def _work(model: nn.Module, batch: Batch, sites: Sequence[Site]) -> dict[str, int]:
    """Multiplications of each site on one batch."""
    seen = inputs_seen(model, model, sites, [as_call(batch)], 1 << 40)
    work = {}
    for site in sites:
        rows = model.get_parameter(site.name).numel()
        work[site.name] = sum(len(x) * rows // len(blocks) for blocks in seen[site.name] for x in blocks)
    return work


# ── the choice ────────────────────────────────────────────────────────────────────────────────────────────────────────


def choose(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], limit: float) -> list[int]:
    """One option of each layer so that the costs add up to at most ``limit`` and the losses to the least.

    ``costs[i][j]`` and ``losses[i][j]`` are those of option j of layer i. Exact up to the rounding of costs, which is upwards
    in steps of a 4000th of ``limit``, so that the limit is held.

    Raises:
        UsageError: even the cheapest options exceed the limit.
    """
    least = sum(min(layer) for layer in costs)
    if least > limit:
        raise UsageError(f"the budget of {limit:.3g} cannot be met: the smallest patterns give {least:.3g}; allow smaller ones")
    steps = [[int(np.ceil(cost / limit * _STEPS - 1e-9)) for cost in layer] for layer in costs]
    slack = max(_STEPS, sum(min(layer) for layer in steps))  # where rounding alone would exceed it
    best = np.zeros(slack + 1)
    picks = []
    for layer, loss in zip(steps, losses, strict=True):
        table = np.full((len(layer), slack + 1), np.inf)
        for option, (cost, value) in enumerate(zip(layer, loss, strict=True)):
            if cost <= slack:
                table[option, cost:] = best[: slack + 1 - cost] + value
        picks.append(table.argmin(0))
        best = table.min(0)
    chosen, left = [], slack
    for layer, pick in zip(reversed(steps), reversed(picks), strict=True):
        chosen.append(int(pick[left]))
        left -= layer[chosen[-1]]
    return chosen[::-1]


def meet(
    budget: Budget,
    sensitivities: Sequence[Sensitivity],
    drop: Callable[[Mapping[str, tuple[Pattern, Axis]]], float],
) -> dict[str, tuple[Pattern, Axis]]:
    """The plan with the least loss that meets ``budget``: parameter → pattern and axis; dense layers are left out.

    ``drop`` measures a plan, in points; only ``top1-drop`` calls it.

    Raises:
        UsageError: no choice of the options meets it.
    """
    if budget.goal == "speedup":
        return _choice(sensitivities, [[o.work for o in s.options] for s in sensitivities], 1 / budget.limit)
    sizes = [[o.size for o in s.options] for s in sensitivities]
    if budget.goal == "size":
        return _choice(sensitivities, sizes, budget.limit)
    low, high = sum(min(layer) for layer in sizes), 1.0
    best: dict[str, tuple[Pattern, Axis]] = {}
    for _ in range(_SEARCHES):
        middle = (low + high) / 2
        plan = _choice(sensitivities, sizes, middle)
        if drop(plan) <= budget.limit:
            best, high = plan, middle
        else:
            low = middle
    return best


def _choice(
    sensitivities: Sequence[Sensitivity], costs: Sequence[Sequence[float]], limit: float
) -> dict[str, tuple[Pattern, Axis]]:
    picks = choose(costs, [[o.loss for o in s.options] for s in sensitivities], limit)
    chosen = ((s, s.options[pick].pattern) for s, pick in zip(sensitivities, picks, strict=True))
    return {s.name: (pattern, s.axis) for s, pattern in chosen if pattern is not None}


def top1_drop(
    model: nn.Module, batches: Sequence[Batch], recipe: Recipe
) -> Callable[[Mapping[str, tuple[Pattern, Axis]]], float]:
    """Measures plans: prune a copy on all but the last quarter of ``batches``; in points, how often its first choice on
    that quarter is not the dense model's.
    """
    cut = len(batches) - max(1, len(batches) // 4)

    def drop(plan: Mapping[str, tuple[Pattern, Axis]]) -> float:
        dense = [_first(model, batch) for batch in batches[cut:]]
        copy = deepcopy(model)
        if plan:
            prune_model(copy, batches[:cut], plan, recipe)
        same = [(_first(copy, b) == d).float().mean() for b, d in zip(batches[cut:], dense, strict=True)]
        return 100 * (1 - float(torch.stack(same).mean()))

    return drop


def _first(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        output = call_model(model, batch)
    if not isinstance(output, Tensor):
        raise UsageError("top1-drop needs a model that returns one tensor of logits; use size<=… or speedup>=…")
    return output.argmax(-1)
