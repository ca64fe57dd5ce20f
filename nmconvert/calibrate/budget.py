"""Mixed patterns under a budget: which layer bears which pattern, and the choice that costs the least accuracy.

Every layer is pruned alone, to every pattern of a list, and the error of the model's outputs is measured on calibration
data; that error is the layer's *loss* for the pattern. The choice then takes losses to be additive, and minimises their sum
under the budget by dynamic programming (a multiple-choice knapsack). The budgets ``top1-drop`` and ``speedup`` are not
additive: there the smallest size, or the longest time of single layers, is searched whose choice, measured as a whole, holds
the budget.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconvert.calibrate.answers import answer_of
from nmconvert.calibrate.correct import held_out_error
from nmconvert.calibrate.driver import Recipe, prune_model
from nmconvert.calibrate.moments import Moments, Site, find_sites, inputs_seen, not_finite, solve_rows
from nmconvert.calibrate.replay import Batch, as_call, call_model, outputs_of
from nmconvert.errors import UsageError, WeightError
from nmconvert.hugging_face import without_caches
from nmconvert.matrix import MatrixView
from nmconvert.model import copied
from nmconvert.packing import coding_for
from nmconvert.pattern import Axis, Pattern

PATTERNS = tuple(Pattern.parse(text) for text in ("2:4", "1:4", "4:8", "2:8", "1:8", "1:16"))
_STEPS = 4000  # costs are rounded up to this share of the budget
_MEASURED = 4  # batches that losses are measured on
_SEARCHES = 5  # bisections for top1-drop and speedup: to 1/32 of the range
_LAYER_BYTES = 1280  # of a compressed ONNX file, beside the weights: a layer's call, its entry in the manifest, its function

Goal = Literal["size", "speedup", "top1-drop"]
Chosen = Mapping[str, tuple[Pattern, Axis]]
"""Parameter → its pattern and axis; what is left out stays dense."""


@dataclass(frozen=True)
class Budget:
    """``size``: bytes of the compressed file over those of the dense weights, all of them; ``speedup``: dense time over time
    on the native kernels, of the whole model on this machine; ``top1-drop``: points of agreement with the dense model's
    first choice that may be lost (an upper bound of the accuracy that may be lost, for which no labels are needed).
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

    def __str__(self) -> str:
        return f"{self.goal}{'>=' if self.goal == 'speedup' else '<='}{self.limit:g}"


@dataclass(frozen=True)
class Met:
    """What meets a budget: parameter → pattern and axis, dense ones left out; and what that comes to, in the budget's unit."""

    plan: dict[str, tuple[Pattern, Axis]]
    reached: float


@dataclass(frozen=True)
class Option:
    """One way to treat one layer: its pattern (None: dense), loss, and bytes relative to the whole model."""

    pattern: Pattern | None
    size: float
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """One layer with its options, the dense one first."""

    name: str
    axis: Axis
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Stored:
    """How a file holds a model: ``whole`` bytes of tensors, and the bytes of one weight by parameter."""

    whole: int
    itemsizes: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Stored:
        """As the module itself holds it."""
        state = model.state_dict()
        return cls(sum(tensor.nbytes for tensor in state.values()), {n: tensor.element_size() for n, tensor in state.items()})


class Clock(Protocol):
    """What measures speed; `nmconvert.pace.Pace` does."""

    def layers(self, plan: Chosen) -> Mapping[str, tuple[float, float]]:
        """Seconds of each planned layer that a pattern can make faster, dense and pruned."""

    def speedup(self, plan: Chosen) -> float:
        """Dense time ÷ pruned time of the whole model."""


def packed_share(pattern: Pattern, columns: int, bits: int = 32) -> float:
    """Size of a packed row of ``columns`` weights of ``bits`` each: values and mask, relative to dense."""
    coding = coding_for(pattern, columns)
    return pattern.kept(columns) / columns + 8 * coding.parts / coding.width / bits


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    axes: Mapping[str, Axis],
    patterns: Sequence[Pattern] = PATTERNS,
    progress: Callable[[str], None] = lambda line: None,
    stored: Stored | None = None,
) -> list[Sensitivity]:
    """The sensitivities of the parameters ``axes`` of ``model``, each pruned alone by the solver ``exact``.

    The model is as it was when this returns. Losses are relative squared errors of the outputs (of the last layers, where
    :mod:`nmconvert.calibrate.answers` takes these) on the last four batches; sizes are those in the file (``stored``).
    """
    without_caches(model.eval())
    sites = find_sites(model, {name: (Pattern(1, 1), axis) for name, axis in axes.items()})
    moments = _moments(model, batches, sites)
    held = [[as_call(batch)] for batch in batches[-_MEASURED:]]
    answer = answer_of(model, batches[0])
    targets = outputs_of(answer, held)
    stored = stored or Stored.of(model)
    whole, bits = stored.whole, {name: 8 * size for name, size in stored.itemsizes.items()}
    found = []
    for site in sites:
        size = model.get_parameter(site.name).numel() * bits[site.name] / 8 / whole
        options = [Option(None, size, 0.0)]
        for pattern in patterns:
            try:
                loss = _alone(model, site, moments[site.name], pattern, lambda: held_out_error(answer, held, targets))
            except WeightError as error:
                raise not_finite(site.name, model.get_parameter(site.name), batches) from error
            share = packed_share(pattern, _view(model, site).columns, bits[site.name])
            options.append(Option(pattern, size * share + _LAYER_BYTES / whole, loss))
        found.append(Sensitivity(site.name, site.axis, tuple(options)))
        progress(f"{site.name}  " + "  ".join(f"{o.pattern} {o.loss:.4f}" for o in options[1:]))
    return found


def _view(model: nn.Module, site: Site) -> MatrixView:
    return MatrixView.of(site.kind, model.get_parameter(site.name).shape, site.axis, site.groups)


def _alone(model: nn.Module, site: Site, moments: list[Moments], pattern: Pattern, error: Callable[[], float]) -> float:
    """Loss of one layer pruned alone."""
    parameter, view = model.get_parameter(site.name), _view(model, site)
    dense = parameter.detach().clone()
    solved = solve_rows(view.to_matrix(dense), moments, pattern, "exact", 0.01, centred=False)
    try:
        parameter.data.copy_(view.from_matrix(solved.weight))
        return error()
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
    drop: Callable[[Chosen], float],
    clock: Callable[[], Clock],
) -> Met:
    """The plan with the least loss that meets ``budget``.

    ``drop`` measures a plan, in points, and is called for ``top1-drop`` only; ``clock`` is made for ``speedup`` only.

    Raises:
        UsageError: no choice of the options meets it.
    """
    if budget.goal == "speedup":
        return _fast_enough(budget.limit, sensitivities, clock())
    sizes = [[o.size for o in s.options] for s in sensitivities]
    if budget.goal == "top1-drop":
        return _good_enough(budget.limit, sensitivities, sizes, drop)
    others = 1 - sum(s.options[0].size for s in sensitivities)
    least = others + sum(min(layer) for layer in sizes)
    if least > budget.limit:
        raise UsageError(
            f"size<={budget.limit:g} cannot be met: the smallest patterns give {least:.3f}, of which {others:.3f} is not pruned"
        )
    plan = _choice(sensitivities, sizes, budget.limit - others)
    patterns = {name: pattern for name, (pattern, _) in plan.items()}
    return Met(plan, others + sum(next(o.size for o in s.options if o.pattern == patterns.get(s.name)) for s in sensitivities))


def _good_enough(
    limit: float, sensitivities: Sequence[Sensitivity], sizes: Sequence[Sequence[float]], drop: Callable[[Chosen], float]
) -> Met:
    """The smallest plan whose ``drop`` is at most ``limit``."""
    low, high = sum(min(layer) for layer in sizes), sum(max(layer) for layer in sizes)
    best = Met({}, 0.0)
    for _ in range(_SEARCHES):
        middle = (low + high) / 2
        plan = _choice(sensitivities, sizes, middle)
        if (dropped := drop(plan)) <= limit:
            best, high = Met(plan, dropped), middle
        else:
            low = middle
    return best


def _fast_enough(limit: float, sensitivities: Sequence[Sensitivity], clock: Clock) -> Met:
    """The plan that leaves its layers the most time and is ``limit`` times faster as a whole."""
    seconds = _seconds(sensitivities, clock)
    low, high = sum(min(layer) for layer in seconds), sum(layer[0] for layer in seconds)
    fastest = _choice(sensitivities, seconds, low) if high else {}
    best = Met(fastest, clock.speedup(fastest))
    if best.reached < limit:
        raise UsageError(f"speedup>={limit:g} cannot be met: the fastest patterns give {best.reached:.2f} on this machine")
    if not high:  # no pattern makes any layer faster, and none has to
        return best
    for _ in range(_SEARCHES):
        middle = (low + high) / 2
        plan = _choice(sensitivities, seconds, middle)
        if (speedup := clock.speedup(plan)) >= limit:
            best, low = Met(plan, speedup), middle
        else:
            high = middle
    return best


def _seconds(sensitivities: Sequence[Sensitivity], clock: Clock) -> list[list[float]]:
    """Of each layer's options; all 0 where no pattern makes a layer faster, so that it stays dense."""
    patterns = {option.pattern for s in sensitivities for option in s.options if option.pattern is not None}
    times = {p: clock.layers({s.name: (p, s.axis) for s in sensitivities}) for p in sorted(patterns)}
    table = []
    for s in sensitivities:
        pruned = [times[o.pattern].get(s.name, (0.0, 0.0)) for o in s.options if o.pattern is not None]
        dense = max(seconds for seconds, _ in pruned)
        table.append([dense, *(min(fast, dense) for _, fast in pruned)])
    return table


def _choice(
    sensitivities: Sequence[Sensitivity], costs: Sequence[Sequence[float]], limit: float
) -> dict[str, tuple[Pattern, Axis]]:
    picks = choose(costs, [[o.loss for o in s.options] for s in sensitivities], limit)
    chosen = ((s, s.options[pick].pattern) for s, pick in zip(sensitivities, picks, strict=True))
    return {s.name: (pattern, s.axis) for s, pattern in chosen if pattern is not None}


def top1_drop(model: nn.Module, batches: Sequence[Batch], recipe: Recipe) -> Callable[[Chosen], float]:
    """Measures plans: prune a copy on all but the last quarter of ``batches``; in points, how often its first choice on
    that quarter is not the dense model's.
    """
    cut = len(batches) - max(1, len(batches) // 4)

    def drop(plan: Chosen) -> float:
        dense = [_first(model, batch) for batch in batches[cut:]]
        copy = copied(model)
        if plan:
            prune_model(copy, batches[:cut], plan, recipe)
        same = [(_first(copy, b) == d).float().mean() for b, d in zip(batches[cut:], dense, strict=True)]
        return 100 * (1 - float(torch.stack(same).mean()))

    return drop


def _first(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        output = call_model(model, batch)
    if isinstance(output, list | tuple) and len(output) == 1:
        output = output[0]
    if not isinstance(output, Tensor):
        raise UsageError("top1-drop needs a model that returns one tensor of logits; use size<=… or speedup>=…")
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    reads_tokens = bool(leaves) and not any(leaf.is_floating_point() for leaf in leaves)
    if output.dim() == 3 and not reads_tokens:
        raise UsageError(
            f"top1-drop: which dimension of an output {list(output.shape)} are classes is not known; use size<=… or speedup>=…"
        )
    return output.argmax(1 if output.dim() > 3 else -1)
