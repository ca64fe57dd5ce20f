"""What is done to a pruned block beside its weights: BatchNorm re-estimation and reconstruction against the dense block.

Each is a change of a module in place; :func:`keep_if_better` takes it back where held-out calibration data says that it
does not help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from nmconvert.calibrate.answers import Answer, all_trainable
from nmconvert.calibrate.replay import Call, outputs_of
from nmconvert.calibrate.together import Loss, Together
from nmconvert.norms import estimated_anew, norms

_RISE = 0.1  # of the steps: Adam's first ones are as large as the rate, whatever the gradients are
_USUAL = 0.5  # size of a tensor at which a relative rate is the absolute one; with 0.1 the fit of FastestDet ran away

AGREES = 1e-6  # relative squared error up to which two computations of one model agree; half precision adds its own
AGREES_IN_HALF = 1e-4

Measure = Callable[[Any, Any], Tensor]
"""How far outputs are from targets: a scalar."""


def output_error(outputs: Any, targets: Any) -> Tensor:
    """Mean over the floating tensors of ‖output − target‖² / ‖target‖²; both any nest of tensors of equal shapes."""
    errors = [
        (a - b).square().sum() / b.square().sum().clamp_min(1e-12)
        for a, b in zip(_tensors(outputs), _tensors(targets), strict=True)
    ]
    return torch.stack(errors).mean() if errors else torch.zeros(())


def disagreement(outputs: Any, targets: Any) -> float:
    """:func:`output_error` of two computations of one model; 0 where targets are not finite: that is an error of its own."""
    finite = all(bool(target.isfinite().all()) for target in _tensors(targets))
    return float(output_error(outputs, targets)) if finite else 0.0


def disagreement_of_most(outputs: Any, targets: Any) -> float:
    """:func:`disagreement` without the half of each output's numbers that are furthest apart, for models that choose.

    What they choose among can change places by rounding, and as many results as one computation gives the other need not give:
    then nothing is compared.
    """
    pairs = list(zip(_tensors(outputs), _tensors(targets), strict=False))
    errors = [torch.zeros(())]
    for a, b in pairs:
        if a.shape == b.shape and a.numel() and b.isfinite().all():
            nearest = (a - b).abs().flatten().argsort()[: (a.numel() + 1) // 2]
            errors.append(output_error(a.flatten()[nearest], b.flatten()[nearest]))
    return float(torch.stack(errors).max())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def held_out_error(
    answer: Answer, calls: Sequence[Sequence[Call]], targets: Sequence[Sequence[Any]], distance: Measure = output_error
) -> float:
    """Mean ``distance`` of what ``answer`` gives from ``targets``, over batches of calls."""
    outputs = outputs_of(answer, calls)
    errors = [distance(a, b) for some, wanted in zip(outputs, targets, strict=True) for a, b in zip(some, wanted, strict=True)]
    return float(torch.stack(errors).mean())


def keep_if_better(module: nn.Module, change: Callable[[], None], error: Callable[[], float]) -> tuple[float, float]:
    """Apply ``change``; take it back unless ``error`` fell. Returns the error before, and the one tried."""
    before = error()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    change()
    after = error()
    if not after < before:
        module.load_state_dict(state)
    return before, after


def reestimate_norms(
    module: nn.Module, dense: nn.Module, calls: Sequence[Sequence[Call]], calls_dense: Sequence[Sequence[Call]]
) -> None:
    """Move the running statistics of each batch norm as its batch statistics moved from ``dense`` to ``module``.

    A scale and a shift between the two is undone exactly. The model was trained on other data (more, and augmented), so
    statistics of the calibration data alone would move the norms of a model that was never pruned.
    """
    moved, original = batch_statistics(module, calls), batch_statistics(dense, calls_dense)
    for norm, twin, (mean, variance), (old_mean, old_variance) in zip(
        norms(module), norms(dense), moved, original, strict=True
    ):
        mean_now, variance_now = _running(norm)
        mean_then, variance_then = _running(twin)
        ratio = variance / old_variance.clamp_min(1e-12)
        mean_now.copy_(mean + ratio.sqrt() * (mean_then - old_mean))
        variance_now.copy_(variance_then * ratio)


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def batch_statistics(module: nn.Module, calls: Sequence[Sequence[Call]]) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of what each batch norm of ``module`` gets, each norm using those of its batch on the way."""
    found = norms(module)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with estimated_anew(found):
        for batch in calls:
            outputs_of(module, [batch])
    statistics = [(mean.clone(), variance.clone()) for mean, variance in map(_running, found)]
    module.load_state_dict(state)
    return statistics


def reconstruct(
    module: nn.Module,
    loss: Loss,
    examples: Callable[[int], Any],
    masks: Mapping[str, Tensor],
    *,
    steps: int,
    rate: float,
    together: int = 1,
    relative: bool = False,
    at_once: int = 0,
) -> None:
    """Fit the kept weights, biases and norms of ``module`` to the dense answers: Adam, masks fixed.

    The rate rises for a tenth of the steps, and falls as a cosine.
    ``loss`` says how far the module is from them on an example. ``examples(n)`` gives the nth, of which a step takes the mean
    over ``together``, as many of them at once as hold ``at_once`` bytes (:mod:`nmconvert.calibrate.together`); ``masks`` are by
    parameter name, in the parameter's shape. With ``relative`` a tensor's rate is ``rate`` times its root mean square, over ½.
    The module stays in evaluation mode: norms use their running statistics. (The block reconstruction of BRECQ, Li et
    al. 2021, with N:M masks in place of rounding.)
    """
    losses = Together(loss, at_once)
    with all_trainable(module) as parameters:
        groups = [{"params": [p], "rate": rate * (_size(p) / _USUAL if relative else 1.0)} for p in parameters.values()]
        optimizer = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.99))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min(1.0, (step + 1) / (_RISE * steps)) * 0.5 * (1 + cos(pi * step / steps))
            optimizer.zero_grad(set_to_none=True)
            for part in losses([examples(number) for number in range(step * together, (step + 1) * together)]):
                if not part.requires_grad:
                    return  # onnxruntime computes something behind all of it, without gradients
                (part / together).backward()
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    parameters[name].mul_(mask)


def _size(parameter: Tensor) -> float:
    """The root mean square of what is not zero."""
    values = parameter.detach()[parameter.detach() != 0]
    return float(values.square().mean().sqrt()) if values.numel() else 1e-2
