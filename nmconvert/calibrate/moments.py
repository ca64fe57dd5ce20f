"""What calibration looks at: where the planned weights are, and the second moments of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from nmconvert.calibrate.replay import Batch, Call, Reached, as_call, call_model, outputs_of
from nmconvert.calibrate.unfold import columns
from nmconvert.errors import ModelError, WeightError
from nmconvert.matrix import Kind
from nmconvert.model import layers
from nmconvert.pattern import Axis, Pattern
from nmconvert.solvers.sparsegpt import solve

_ENTRIES = 1 << 24  # of one part of the inputs: 64 MiB in float32


@dataclass(frozen=True)
class Site:
    """One planned weight: parameter ``name`` of the model is ``parameter`` of ``module``, whose calls show its inputs."""

    name: str
    module: str
    parameter: str
    pattern: Pattern
    axis: Axis
    kind: Kind
    groups: int


def find_sites(model: nn.Module, plan: Mapping[str, tuple[Pattern, Axis]]) -> list[Site]:
    """The sites of the planned parameters.

    Raises:
        ModelError: a parameter is not of a layer that can be calibrated.
    """
    found = {layer.tensor: layer for layer in layers(model)}
    sites = []
    for name, (pattern, axis) in plan.items():
        if name not in found:
            raise ModelError(f"'{name}' is no weight of a convolution, linear layer or attention of the model: exclude it")
        layer = found[name]
        owner, parameter = layer.name, layer.parameter
        parent = owner.rpartition(".")[0]
        if owner.endswith("out_proj") and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
            owner, parameter = parent, "out_proj.weight"  # it is never called itself
        sites.append(Site(name, owner, parameter, pattern, axis, layer.kind, layer.groups))
    return sites


class Moments:
    """Means over tokens of x, x_dense, x xᵀ and x_dense xᵀ, in float64; filled part by part."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._paired = True

    def add(self, x: Tensor, dense: Tensor) -> None:
        """Take in tokens ``x`` and ``dense`` [tokens, K] that belong together; one tensor twice saves half of the work.

        Tokens of another number were routed otherwise: which belong together is not known, and x stands for both from then on.
        """
        self._paired &= len(x) == len(dense)
        if not self._paired:
            dense = x
        step = max(1, _ENTRIES // x.shape[1])
        for part, other in zip(x.split(step), dense.split(step), strict=True):
            a = part.float()
            self._add("mean", a.sum(0, dtype=torch.float64))
            self._add("hessian", a.T @ a)
            if dense is not x:
                b = other.float()
                self._add("mean_dense", b.sum(0, dtype=torch.float64))
                self._add("cross", b.T @ a)
        self.count += len(x)

    def _add(self, name: str, part: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += part  # in place: of a wide layer these are large, and there are many parts
        else:
            self._sums[name] = part.double()

    @property
    def mean(self) -> Tensor:
        """Of x: [K]."""
        return self._sums["mean"] / self.count

    @property
    def mean_dense(self) -> Tensor:
        """Of x_dense: [K]."""
        return self._sums["mean_dense" if "mean_dense" in self._sums and self._paired else "mean"] / self.count

    @property
    def hessian(self) -> Tensor:
        """Of x xᵀ: [K, K]."""
        return self._sums["hessian"] / self.count

    @property
    def cross(self) -> Tensor:
        """Of x_dense xᵀ: [K, K]."""
        return self._sums["cross" if "cross" in self._sums and self._paired else "hessian"] / self.count

    def centred(self) -> tuple[Tensor, Tensor]:
        """The two products about the means: what is left for the weights where a bias takes care of the means."""
        mean, dense = self.mean, self.mean_dense
        return self.hessian - mean[:, None] * mean, self.cross - dense[:, None] * mean


@dataclass(frozen=True)
class SolvedRows:
    """``weight`` and ``mask`` [rows, K]; ``shift`` [rows], how the mean output moved; and the relative excess ``error``."""

    weight: Tensor
    mask: Tensor
    shift: Tensor
    error: float


def solve_rows(
    matrix: Tensor, moments: Sequence[Moments], pattern: Pattern, method: str, damping: float, *, centred: bool
) -> SolvedRows:
    """Prune ``matrix`` [rows, K], whose rows fall into equal blocks with one of ``moments`` each.

    With ``centred``, the caller takes ``shift`` off a bias, and the weights need not care for the means.

    Raises:
        WeightError: ``matrix`` or a moment is NaN or infinite; :func:`not_finite` says why.
    """
    rows, masks, shifts, error, signal = [], [], [], 0.0, 0.0
    for dense, block in zip(matrix.chunk(len(moments)), moments, strict=True):
        hessian, cross = block.centred() if centred else (block.hessian, block.cross)
        solution = solve(dense, hessian, pattern, method=method, cross=cross, damping=damping)
        rows.append(solution.weight)
        masks.append(solution.mask)
        shifts.append(solution.weight @ block.mean - dense.double() @ block.mean_dense)
        error += float(solution.error.sum())
        signal += solution.signal
    return SolvedRows(torch.cat(rows), torch.cat(masks), torch.cat(shifts), error / signal)


def not_finite(name: str, weight: Tensor, batches: Sequence[Batch]) -> WeightError:
    """What to say, and where to look, when the weight ``name`` cannot be solved on ``batches``."""
    if not weight.isfinite().all():
        return WeightError(f"{name}: holds NaN or infinite weights; repair the checkpoint or --exclude the tensor")
    if where := not_finite_sample(batches):
        return WeightError(f"{name}: its inputs hold NaN or infinite values, as {where} does; repair it or leave it out")
    made = "its inputs hold NaN or infinite values, which no calibration sample does"
    return WeightError(f"{name}: {made}; look for what makes them in the layers before, or --exclude the tensor")


def not_finite_sample(batches: Sequence[Batch]) -> str | None:
    """The first sample that holds NaN or infinite values, in words."""
    for number, batch in enumerate(batches, 1):
        if (sample := next((n for n, values in _samples(batch) if not values.isfinite().all()), None)) is not None:
            return f"sample {sample} of calibration batch {number}"
    return None


def _samples(batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """The tensors of a batch with the number of their sample: the entries of a list, the rows of another tensor."""
    call = as_call(batch)
    for argument in (*call.args, *call.kwargs.values()):
        for leaf in [argument] if isinstance(argument, list) else tree_leaves(argument):
            samples = torch.atleast_1d(leaf) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, list) else []
            yield from ((n, x) for n, sample in enumerate(samples, 1) for x in tree_leaves(sample) if isinstance(x, Tensor))


def inputs_seen(
    model: nn.Module,
    unit: nn.Module,
    stage: Sequence[Site],
    calls: Sequence[Call],
    limit: int,
    uses: Mapping[str, int] | None = None,
) -> dict[str, list[list[Tensor]]]:
    """The unfolded inputs of the sites of ``stage`` while ``unit`` answers ``calls``: per call and block of rows.

    ``uses`` says how often a call of ``unit`` uses each of their modules: it is left off once they all were.
    """
    seen: dict[str, list[list[Tensor]]] = {site.name: [] for site in stage}
    last = dict.fromkeys(seen, 0)

    def note(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            handles[site.name].remove()  # the inputs of out_proj are found by calling the module again
            seen[site.name].append(columns(module, site.parameter, args, kwargs, site.axis, limit))
            attach(site)
            if uses and all(len(seen[s.name]) - last[s.name] >= uses[s.module] for s in stage):
                raise Reached

        return hook

    def attach(site: Site) -> None:
        module = model.get_submodule(site.module)
        handles[site.name] = module.register_forward_pre_hook(note(site), with_kwargs=True)

    handles: dict[str, Any] = {}
    for site in stage:
        attach(site)
    try:
        for call in calls:
            last = {name: len(inputs) for name, inputs in seen.items()}
            with suppress(Reached):
                outputs_of(unit, [[call]])
    finally:
        for handle in handles.values():
            handle.remove()
    return seen


def _version(output: Any) -> int:
    """How often what a module gave has been changed in place; of anything but a tensor 0."""
    return output._version if isinstance(output, Tensor) else 0


def find_followers(model: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, str]:
    """For each of the modules ``names`` whose output goes straight into a batch norm: the name of that norm."""
    made: dict[int, tuple[str, int]] = {}  # with the version: what works in place gives the same object
    followers: dict[str, str] = {}
    alive: list[Any] = []

    def made_by(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            alive.append(output)
            made[id(output)] = name, _version(output)

        return hook

    def taken_by(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            taken = args[0] if args else kwargs["input"]
            maker, version = made.get(id(taken), (None, -1))
            if maker is not None and _version(taken) == version:
                followers[maker] = name

        return hook

    handles = [model.get_submodule(name).register_forward_hook(made_by(name)) for name in names]
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(taken_by(name), with_kwargs=True))
    try:
        with torch.no_grad():
            call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return followers
