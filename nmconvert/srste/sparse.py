"""The model under SR-STE, and how an optimiser keeps it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nmconvert import dist
from nmconvert.errors import ModelError, UsageError, check_choice
from nmconvert.model import layers
from nmconvert.pattern import Axis, Pattern
from nmconvert.plan import Plan, make_plan
from nmconvert.rules import output_layers
from nmconvert.srste.masked import SparseWeight, mask_weights, masked_weights, obstacle
from nmconvert.srste.passes import add_pruned
from nmconvert.tensor import TensorInfo, dtype_name

Method = Literal["sr-ste", "ste", "fixed-mask"]
"""``sr-ste``; ``ste``: without the decay; ``fixed-mask``: the first mask stays and pruned weights get no gradient (ASP)."""
METHODS: tuple[Method, ...] = get_args(Method)

Anneal = Literal["constant", "rise", "fall"]
"""λ over the steps: as given, from 0 up to it, or from it down to 0, along half a cosine."""
ANNEALS: tuple[Anneal, ...] = get_args(Anneal)

DECAY = 2e-4  # λ of the paper
DECOUPLED_DECAY = 10.0  # for learning rates like Adam's: 1 % a step at 1e-3
_LIKE_ADAMS = 0.01  # learning rates up to this


@dataclass(frozen=True)
class Statistics:
    """How the masks moved since they were last asked for.

    ``flip_rate``: share of mask entries changed per step, on average. ``sad``: entries that differ between the first and the
    last mask (sparse architecture divergence, of the paper). ``pruned_energy``: Σ((1-mask)·w²) / Σw² now.
    """

    steps: int
    flip_rate: float
    sad: int
    pruned_energy: float


class Sparse:
    """A model under SR-STE. Made by `sparsify`; see the module docstring.

    Attributes:
        weights: the masked weights.
        plan: a row for every weight, with the reason of those that stay dense.
        decay: λ; by default 2e-4 (the paper), or 10 once an optimiser other than SGD with a rate of 0.01 or less is attached.
        steps: optimiser steps taken; where several optimisers are attached, those of the first, or of the last that was
            attached with ``steps`` once there were some.
    """

    def __init__(self, model: nn.Module, plan: Plan, method: Method, decay: float | None) -> None:
        check_choice("method", method, METHODS)
        if decay is not None and not 0 <= decay < float("inf"):
            raise UsageError(f"decay {decay} must be 0 or more")
        self.model, self.plan, self.method = model, plan, method
        self.decay = DECAY if decay is None else decay
        self._decay_is_told = decay is not None
        self.weights = mask_weights(model, plan.pruned)
        self.steps = 0
        self._total_steps: int | None = None
        self._anneal: Anneal = "constant"
        self._freeze_at: float = 0.0 if method == "fixed-mask" else float("inf")
        self._hooks: dict[int, list[Any]] = {}  # of each optimiser
        self._counts: Optimizer | None = None  # whose steps are counted
        self._begin = 0  # how many there were when it was attached
        self._flips: Tensor | int = 0
        self._reset_statistics()
        self._follow_steps()

    # -- training -----------------------------------------------------------------------------------------------------

    def attach(
        self,
        optimizer: Optimizer,
        *,
        decoupled: bool | None = None,
        steps: int | None = None,
        anneal: Anneal = "constant",
        freeze_masks: float = 0.0,
    ) -> Sparse:
        """Have every ``optimizer.step()`` apply the decay and then renew the masks; returns self.

        Attached once more, an optimiser has what is said last. Averages of the weights (`torch.optim.swa_utils`) take
        ``use_buffers=False``: masks are buffers, and no averages of them are masks.

        Args:
            optimizer: any, also as accelerate wraps it; the weights that it does not hold keep their masks.
            decoupled: w ← w - lr·λ·(1-mask)·w before the step, rather than λ·(1-mask)·w in the gradient. Left out: for
                all but SGD.
            steps: how many steps there will be from now on; needed by the two below.
            anneal: how λ goes over the steps.
            freeze_masks: share of the steps, at the end, for which masks stand still and pruned weights rest.

        Raises:
            UsageError: the optimiser holds none of the sparse weights; ``steps`` is missing; ``freeze_masks`` is no share.
        """
        optimizer = _unwrapped(optimizer)
        self._check(optimizer, steps, anneal, freeze_masks)
        if self._counts is None:
            self._counts = optimizer
        elif self.steps and steps is not None:  # a second phase
            self._counts, self._begin = optimizer, self.steps
        adaptive = not isinstance(getattr(optimizer, "optim", optimizer), torch.optim.SGD)  # `optim`: of ZeRO's wrapper
        if adaptive and not self._decay_is_told and max(group["lr"] for group in optimizer.param_groups) <= _LIKE_ADAMS:
            self.decay = DECOUPLED_DECAY
        if steps is not None:
            self._total_steps, self._anneal = steps, anneal
            if self.method != "fixed-mask":
                self._freeze_at = round(steps * (1 - freeze_masks)) if freeze_masks else float("inf")
        in_gradient = not adaptive if decoupled is None else not decoupled

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if in_gradient and closure is not None:
                raise UsageError(
                    "optimizer.step(closure) computes gradients too late for the decay: call backward first, or attach with "
                    "decoupled=True"
                )
            self._apply_decay(optimizer, in_gradient, gradients_to_come=closure is not None)

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.frozen:
                self._renew_masks(optimizer)
            self.steps += optimizer is self._counts
            self._follow_steps()

        for hook in self._hooks.get(id(optimizer), []):
            hook.remove()
        self._hooks[id(optimizer)] = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        self._follow_steps()
        return self

    def _check(self, optimizer: Optimizer, steps: int | None, anneal: Anneal, freeze_masks: float) -> None:
        check_choice("anneal", anneal, ANNEALS)
        if any(group["lr"] is None for group in optimizer.param_groups):
            raise UsageError("the optimizer has no learning rate (lr=None), of which the decay is a multiple: give it one")
        if steps is not None and steps < 1:
            raise UsageError(f"steps {steps} must be 1 or more")
        if not 0 <= freeze_masks <= 1:
            raise UsageError(f"freeze_masks {freeze_masks} must be a share of the training, 0 to 1")
        if steps is None and (anneal != "constant" or freeze_masks):
            raise UsageError("anneal and freeze_masks need steps: how many optimiser steps there will be")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self.weights and not any(id(w.dense) in held for w in self.weights):
            raise UsageError(
                "the optimizer holds none of the sparse weights: was it made for another model, or before fully_shard?"
            )

    @property
    def frozen(self) -> bool:
        """Whether the masks stand still."""
        return self.steps - self._begin >= self._freeze_at

    @property
    def current_decay(self) -> float:
        """λ of the step to come."""
        if self.method != "sr-ste" or self.frozen:
            return 0.0
        if self._anneal == "constant" or not self._total_steps:
            return self.decay
        risen = (1 - cos(pi * min(1.0, (self.steps - self._begin) / self._total_steps))) / 2
        return self.decay * (risen if self._anneal == "rise" else 1 - risen)

    @torch.no_grad()
    def _apply_decay(self, optimizer: Optimizer, in_gradient: bool, *, gradients_to_come: bool) -> None:
        decay = self.current_decay
        if not decay:
            return
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimiser unscales gradients itself, later
        skipped = getattr(optimizer, "found_inf", None)  # and then skips the step itself, too
        for weight, group in self._held(optimizer, gradients_to_come=gradients_to_come):
            w = dist.local(weight.dense)
            mask = dist.local_part(weight.mask.mask, like=weight.dense)
            if in_gradient:
                signed = -decay if group.get("maximize") else decay
                gradient = dist.local(weight.dense.grad)  # type: ignore[arg-type]
                add_pruned(gradient, w, mask, signed if scale is None else scale * signed)
            else:
                rate = group["lr"] * decay
                most = rate.clamp(max=1.0) if isinstance(rate, Tensor) else min(rate, 1.0)  # all of it
                add_pruned(w, w, mask, -most * (1.0 if skipped is None else 1.0 - skipped))

    @torch.no_grad()
    def _renew_masks(self, optimizer: Optimizer) -> None:
        for weight, _ in self._held(optimizer):
            self._flips = self._flips + weight.mask.renew(weight.dense)

    def _follow_steps(self) -> None:
        for weight in self.weights:
            weight.mask.straight_through = not self.frozen

    def _held(self, optimizer: Optimizer, *, gradients_to_come: bool = False) -> Iterator[tuple[SparseWeight, dict[str, Any]]]:
        """The sparse weights that the optimiser is about to change, or has changed, each with its parameter group."""
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for weight in self.weights:
            changes = weight.dense.grad is not None or (gradients_to_come and weight.dense.requires_grad)
            if changes and id(weight.dense) in group_of:
                yield weight, group_of[id(weight.dense)]

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What, besides the model's state_dict (where the masks are), training goes on from."""
        return {
            "steps": self.steps,
            "first_step": self._first_step,
            "flips": int(self._flips),
            "first": {weight.name: first for weight, first in zip(self.weights, self._first, strict=True)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, after `attach` and after the model's state_dict was loaded."""
        self.steps, self._first_step = int(state["steps"]), int(state["first_step"])
        self._flips = int(state["flips"])
        for weight, first in zip(self.weights, self._first, strict=True):
            first.copy_(state["first"][weight.name])
        self._follow_steps()

    @torch.no_grad()
    def statistics(self) -> Statistics:
        """How the masks moved since the last call of this."""
        entries = sum(weight.mask.mask.numel() for weight in self.weights)
        steps = max(1, self.steps - self._first_step)
        sad = sum(int((weight.mask.mask ^ first).sum()) for weight, first in zip(self.weights, self._first, strict=True))
        flips = int(self._flips)
        result = Statistics(self.steps - self._first_step, flips / steps / max(1, entries), sad, self._pruned_energy())
        self._reset_statistics()
        return result

    def _pruned_energy(self) -> float:
        energy = torch.zeros(2, dtype=torch.float64)
        for weight in self.weights:
            squares = dist.local(weight.dense).double().square()
            pruned = squares.masked_fill(dist.local_part(weight.mask.mask, like=weight.dense), 0.0)
            part = torch.stack([pruned.sum(), squares.sum()])
            energy += (dist.total(part) if dist.is_sharded(weight.dense) else part).cpu()
        return float(energy[0] / energy[1]) if energy[1] else 0.0

    def _reset_statistics(self) -> None:
        self._first_step = self.steps
        self._first = [weight.mask.mask.clone() for weight in self.weights]
        self._flips = 0

    def shard_dim(self, parameter: nn.Parameter) -> int:
        """Along which dimension to spread ``parameter`` over processes, so that groups of weights stay on one of them.

        Where no such dimension divides evenly (all but the first have to), 0: masks are then computed from gathered weights.
        """
        mask = next((weight.mask for weight in self.weights if weight.dense is parameter), None)
        free = sorted(set(range(parameter.dim())) - mask.grouped_dims(parameter.dim())) if mask else []
        return next((dim for dim in free if dim == 0 or parameter.shape[dim] % dist.world() == 0), 0)

    def mask_names(self) -> list[str]:
        """The names of the masks among the model's buffers."""
        return [f"{path}parametrizations.{attribute}.0.mask" for path, _, attribute, _ in masked_weights(self.model)]

    def finalize(self) -> nn.Module:
        """Make the model plain again, each weight exactly N:M in the parameter it had; returns the model.

        A mask that is none of its pattern, as where another model's buffers were loaded or averaged, is made anew.

        Raises:
            ModelError: the model is sharded (gather it first); it then is as it was.
        """
        for weight in self.weights:
            if dist.is_sharded(weight.dense):
                raise ModelError(f"'{weight.name}' is sharded over ranks: gather the model before it is finalized")
        for hook in [hook for hooks in self._hooks.values() for hook in hooks]:
            hook.remove()
        for weight in self.weights:
            weight.mask.mask.copy_(weight.mask.checked(weight.mask.mask, weight.dense))
            weight.unmask(masked=True)
        self._hooks, self.weights = {}, []
        return self.model


def sparsify(
    model: nn.Module,
    pattern: str | Pattern = "2:4",
    *,
    axis: Axis = "channel",
    method: Method = "sr-ste",
    decay: float | None = None,
    patterns: Sequence[tuple[str, str | Pattern | None]] | Mapping[str, str | Pattern | None] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Sparse:
    """Put ``model`` under SR-STE, in place: convolutions, linear layers, packed attention and Hugging Face Conv1D.

    Before it is wrapped (DDP, FSDP2). Values that are assigned to a weight meanwhile become its dense ones
    (``module.weight = …``); what changes it in place has to change ``module.parametrizations.weight.original``.

    Args:
        model: its parameters stay the same objects, so an optimiser may be made before or after.
        pattern: n:m, n kept of m.
        axis: along which convolutions are grouped, ``channel`` or ``kernel``.
        method: see `Method`.
        decay: λ; left out: 2e-4, or 10 with other optimisers than SGD, where it is times a learning rate like Adam's.
        patterns: (glob on weight names, pattern or None for dense) for some, or a dict; the last that matches wins.
        include: globs, or one; only these, the first and last layer too where named.
        exclude: globs that stay dense.

    Raises:
        PatternError: ``pattern`` is none.
        UsageError: a glob that matches nothing, an unknown method or axis.
        ModelError: the model is sparse already.
    """
    include, exclude = ([globs] if isinstance(globs, str) else globs for globs in (include, exclude))
    pairs = patterns.items() if isinstance(patterns, Mapping) else patterns
    chosen = [(glob, None if p is None else Pattern.parse(p)) for glob, p in pairs]
    infos = weights_of(model)
    plan = make_plan(infos, Pattern.parse(pattern), axis, layers=chosen, include=include, exclude=exclude)
    return sparsify_plan(model, plan, method=method, decay=decay)


def _unwrapped(optimizer: Any) -> Optimizer:
    """What steps inside, of an optimiser that accelerate has prepared."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: Optimizer = optimizer
    return found


def sparsify_plan(model: nn.Module, plan: Plan, *, method: Method = "sr-ste", decay: float | None = None) -> Sparse:
    """`sparsify` with a plan (of a manifest, say) instead of rules; names are those of the model's parameters.

    Raises:
        ModelError: the model lacks a weight of the plan, or is sparse already.
    """
    return Sparse(model, plan, method, decay)


def weights_of(model: nn.Module) -> list[TensorInfo]:
    """The weights of ``model`` that could be sparse, once each, for `nmconvert.plan.make_plan`."""
    found = layers(model)
    outputs = output_layers([(layer.tensor, layer.weight.shape) for layer in found])
    return [
        TensorInfo(
            layer.tensor,
            tuple(layer.weight.shape),
            dtype_name(layer.weight.dtype),
            kind=layer.kind,
            groups=layer.groups,
            output=layer.tensor in outputs,
            reason=obstacle(layer.module, layer.parameter),
        )
        for layer in found
    ]
