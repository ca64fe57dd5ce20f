"""A weight under its N:M mask: the parametrization that the forward pass sees, and models that have some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmconvert import dist
from nmconvert.detect import most_in_a_group
from nmconvert.errors import ModelError
from nmconvert.masks import magnitude_mask, update_magnitude_mask
from nmconvert.matrix import Kind, MatrixView
from nmconvert.pattern import Axis, Pattern
from nmconvert.srste.passes import Spare, masked
from nmconvert.tensor import Row


class _Masked(torch.autograd.Function):
    """mask ⊙ w forward; backward the identity where the gradient goes straight through, else mask ⊙ gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, straight_through: bool, spare: Spare) -> Tensor:
        if not straight_through:
            ctx.save_for_backward(mask)
        return masked(weight, mask, spare)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (grad * ctx.saved_tensors[0] if ctx.saved_tensors else grad), None, None, None


class WeightMask(nn.Module):
    """The parametrization of one weight: its N:M mask, a bool buffer of the weight's shape.

    With ``straight_through`` the gradient passes unchanged; without, that of pruned weights is zero.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, kind: Kind, groups: int, pattern: Pattern, axis: Axis) -> None:
        super().__init__()
        self.kind, self.groups, self.pattern, self.axis = kind, groups, pattern, axis
        self.straight_through = True
        self._spare = Spare()
        self.register_buffer("mask", self.mask_of(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        masked: Tensor = _Masked.apply(weight, self.mask, self.straight_through, self._spare)  # type: ignore[no-untyped-call]
        return masked

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the weight becomes the dense weight."""
        return weight

    @torch.no_grad()
    def renew(self, weight: Tensor) -> Tensor | int:
        """Make the mask that of ``weight``; how many entries changed. Every rank of a sharded weight has to call this."""
        if not dist.is_sharded(weight):
            return update_magnitude_mask(self.mask, weight, self._view(weight), self.pattern)
        mask = self.mask_of(weight)
        flips = torch.count_nonzero(mask ^ self.mask)
        self.mask.copy_(mask)
        return flips

    def _view(self, weight: Tensor) -> MatrixView:
        return MatrixView.of(self.kind, weight.shape, self.axis, self.groups)

    @torch.no_grad()
    def mask_of(self, weight: Tensor) -> Tensor:
        """The mask, bool [*weight.shape], that keeps the largest of each group of ``weight``.

        Of a sharded weight each rank computes its part, unless groups cross the ranks; the result is whole on each.
        """
        crosses = dist.shard_dims(weight) & self.grouped_dims(weight.dim())
        part = dist.whole(weight) if crosses else dist.local(weight)
        if part.numel():
            mask = magnitude_mask(part, self._view(part), self.pattern)
        else:
            mask = torch.empty(part.shape, dtype=torch.bool, device=part.device)
        mask = mask if crosses else dist.assemble(mask, like=weight)
        return mask.contiguous() if dist.is_sharded(weight) else mask

    def checked(self, mask: Tensor, weight: Tensor) -> Tensor:
        """``mask``, if it keeps at most n of every m, else that of ``weight``."""
        matrix = self._view(mask).to_matrix(mask).cpu().numpy()
        return mask if most_in_a_group(matrix, self.pattern.m) <= self.pattern.n else self.mask_of(weight)

    def grouped_dims(self, rank: int) -> set[int]:
        """The dimensions of the weight that its groups run along: it must not be sharded along these."""
        if self.kind == "conv_transpose":
            return {0} if self.axis == "channel" else {0, *range(2, rank)}
        if self.kind == "conv":
            return {1} if self.axis == "channel" else set(range(1, rank))
        return {rank - 1} if self.kind == "linear" else {rank - 2}

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.pattern}, axis={self.axis}"


@dataclass(frozen=True)
class SparseWeight:
    """One masked weight of a model, under its plain name; ``owners`` are all (module, attribute) that share it, ``orders`` the
    names of each module's own parameters as they were.
    """

    name: str
    owners: tuple[tuple[nn.Module, str], ...]
    orders: tuple[tuple[str, ...], ...]
    mask: WeightMask

    @property
    def dense(self) -> nn.Parameter:
        """The dense weight, the parameter that is trained (looked up each time: FSDP2 replaces it)."""
        module, attribute = self.owners[0]
        parameter: nn.Parameter = module.parametrizations[attribute].original  # type: ignore[index, union-attr]
        return parameter

    def unmask(self, *, masked: bool) -> None:
        """Make it a plain parameter again, in the place that it had, ``masked`` or dense."""
        for (module, attribute), order in zip(self.owners, self.orders, strict=True):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=masked)
            for name in order[order.index(attribute) + 1 :]:  # optimisers number parameters
                if name in module._parameters:
                    module._parameters[name] = module._parameters.pop(name)


def obstacle(module: nn.Module, attribute: str) -> str | None:
    """Why a weight cannot be put under a mask: it is computed from other parameters, or is none."""
    if parametrize.is_parametrized(module, attribute):
        others = [type(step).__name__.lstrip("_") for step in module.parametrizations[attribute]]  # type: ignore[index]
        if not all(name == WeightMask.__name__ for name in others):
            return f"under {others[0]}: fold it in first, by torch.nn.utils.parametrize.remove_parametrizations"
    elif attribute not in module._parameters:
        return "computed from other tensors (weight_norm, spectral_norm, prune) or a buffer: make it a parameter first"
    return None


def mask_weights(model: nn.Module, rows: Sequence[Row]) -> list[SparseWeight]:
    """Put the weights of ``rows`` under their masks: all, or where that fails none.

    Raises:
        ModelError: as `mask_weight`.
    """
    made: list[SparseWeight] = []
    try:
        for row in rows:
            made.append(mask_weight(model, row))
    except BaseException:
        for weight in made:
            weight.unmask(masked=False)
        raise
    return made


def mask_weight(model: nn.Module, row: Row) -> SparseWeight:
    """Put the weight of a pruned ``row`` under its mask, in every module that shares it.

    Raises:
        ModelError: the model has no such weight of that shape, or it is parametrized already.
    """
    assert row.pattern is not None
    assert row.axis is not None
    assert row.info.kind is not None
    path, _, attribute = row.name.rpartition(".")
    try:
        module = model.get_submodule(path)
        if parametrize.is_parametrized(module, attribute):
            why = obstacle(module, attribute) or "parametrized already: finalize the model first"
            raise ModelError(f"'{row.name}' is {why}")
        parameter = getattr(module, attribute)
    except AttributeError as error:
        raise ModelError(f"the model has no weight '{row.name}': was it pruned from another model?") from error
    if tuple(parameter.shape) != row.info.shape:
        raise ModelError(f"'{row.name}' has shape {list(parameter.shape)} in the model, {list(row.info.shape)} in the plan")
    mask = WeightMask(parameter, row.info.kind, row.info.groups, row.pattern, row.axis)
    owners = tuple(_owners(model.modules(), parameter))
    orders = tuple(tuple(owner._parameters) for owner, _ in owners)
    for owner, name in owners:
        parametrize.register_parametrization(owner, name, mask)
    return SparseWeight(row.name, owners, orders, mask)


def _owners(modules: Iterable[nn.Module], parameter: Tensor) -> list[tuple[nn.Module, str]]:
    return [
        (module, name)
        for module in modules
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False)
        if value is parameter
    ]


@torch.no_grad()
def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict that ``model``, or a copy of it, would have once finalized: plain names, weights exactly N:M.

    Sharded tensors are gathered: every process has to call this, and gets all of them.
    """
    found = list(masked_weights(model))
    prefixes = {f"{path}parametrizations.{attribute}.": f"{path}{attribute}" for path, _, attribute, _ in found}
    masks = {f"{path}parametrizations.{attribute}.": mask for path, _, attribute, mask in found}
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    plain = {}
    for name, value in state.items():
        value = dist.whole(value)
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            plain[name] = value.detach().clone(memory_format=torch.contiguous_format)
        elif name == f"{prefix}original":
            mask = masks[prefix].checked(state[f"{prefix}0.mask"], value)
            plain[prefixes[prefix]] = value.masked_fill(~mask, 0.0).contiguous()
    return plain


def masked_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, WeightMask]]:
    """Every (prefix of its names, module, attribute, mask) in ``model``; a shared mask comes once for each owner."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, steps in module.parametrizations.items():
                if isinstance(steps[0], WeightMask):
                    yield (f"{path}." if path else ""), module, attribute, steps[0]
