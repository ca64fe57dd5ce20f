"""Pruning a model with calibration data: layer after layer on the inputs that the pruned model gives it.

:func:`prune_model` walks over the units of a model (:mod:`nmconvert.calibrate.replay`) in execution order. In each unit every
planned layer is solved (:mod:`nmconvert.solvers.sparsegpt`) on the inputs that it gets from the already pruned layers, against
the outputs that it had in the dense model; then the unit is corrected (:mod:`nmconvert.calibrate.correct`). No labels are read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmconvert.calibrate.answers import Answer, answer_of
from nmconvert.calibrate.correct import (
    Measure,
    held_out_error,
    keep_if_better,
    output_error,
    reconstruct,
    reestimate_norms,
)
from nmconvert.calibrate.distance import Distance, Said
from nmconvert.calibrate.images import augment, image_count, is_images, scenes
from nmconvert.calibrate.moments import (
    Moments,
    Site,
    find_followers,
    find_sites,
    inputs_seen,
    not_finite,
    not_finite_sample,
    solve_rows,
)
from nmconvert.calibrate.replay import Batch, Call, Replay, as_call, find_units, outputs_of, trace
from nmconvert.calibrate.resume import Done, fingerprint, read, write
from nmconvert.calibrate.store import LIMIT, Store
from nmconvert.calibrate.together import Loss
from nmconvert.errors import DataError, ModelError, WeightError
from nmconvert.hugging_face import without_caches
from nmconvert.matrix import MatrixView
from nmconvert.model import copied
from nmconvert.norms import norms
from nmconvert.pattern import Axis, Pattern

_IMAGES = 16  # of a step of reconstruction at least: gradients of few are noisy
_VARIED = 2  # times as many copies of images where a model answers for every place, each another scene
_FEW = 100  # images up to which that is so; of more there are fewer copies, and the model is fitted to all for longer
_LONGER = 10  # times as many steps at most: on 1,000 images what FastestDet lost was still falling after so many
_FINER = 2  # times as many steps of fewer images where a model answers for every place: an image is many answers
_GENTLER = 0.5  # times the rate there: at four times this the fit of FastestDet first lost what layers and blocks had won
_LARGE = 0.08  # relative error of the outputs at which the model is fitted at the full rate


@dataclass(frozen=True)
class LayerReport:
    """One pruned weight: ``error`` is its excess squared output error relative to its output's energy."""

    name: str
    pattern: Pattern
    axis: Axis
    unit: str
    error: float


@dataclass(frozen=True)
class Correction:
    """One correction of a unit ('' for the whole model): held-out output error before and after, and whether it stays."""

    unit: str
    what: str
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether held-out data said that it helps."""
        return self.after < self.before


@dataclass
class Pruned:
    """What :func:`prune_model` returns: every tensor of the state dict that changed, and what was done."""

    state: dict[str, Tensor]
    layers: list[LayerReport] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """How :func:`prune_model` works: the criterion, and how much correction follows it."""

    criterion: str = "auto"
    damping: float = 0.01
    against_dense: bool = True  # targets are the dense model's outputs, not the layer's own on pruned inputs
    correct_means: bool = True  # what pruning does to a layer's mean output goes into its bias or norm, in closed form
    reestimate: bool = True
    block_steps: int = 60
    block_rate: float = 1e-3
    model_steps: int = 100  # more where a model answers for every place and there are many images
    model_rate: float = 1e-3
    tokens: int = 1 << 17  # positions taken of each layer's inputs, of all batches together
    copies: int = 2  # of image batches, flipped and shifted (the first as it is); twice as many scenes for maps
    relative_rates: bool = False  # each tensor's rate follows its size: for graphs whose norms are folded into the weights
    at_once: int = 0  # bytes of activations that examples of a fit may hold which are computed at once: for graphs (no state)
    held_out: float = 0.125
    memory: int = LIMIT  # bytes of activations between units; more are kept in temporary files
    seed: int = 0


DEFAULT = Recipe()


def prune_model(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: Mapping[str, tuple[Pattern, Axis]],
    recipe: Recipe = DEFAULT,
    progress: Callable[[str], None] = lambda line: None,
    resume: Path | None = None,
    said: Sequence[Said] = (),
) -> Pruned:
    """Prune the parameters of ``plan`` in place of ``model``, with unlabelled ``batches``.

    The corrections also change what stays dense: biases, norms, and (by a little) the layers that are not in the plan.

    Args:
        model: changed in place, left in evaluation mode (of Hugging Face, without caches).
        batches: each as :data:`nmconvert.calibrate.replay.Batch` says; the last eighth is held out to judge corrections.
        plan: parameter name → pattern and axis.
        recipe: criterion and corrections.
        progress: called with one line for each layer.
        resume: a file that keeps what is done after each unit; a run that finds its own goes on there, and ends with the
            same bytes. Left at the end: it is of use until what this returns is in a file.
        said: what each output of the model is. Where some are probabilities, the model as a whole is compared by a
            :class:`~nmconvert.calibrate.distance.Distance`; else by the relative squared error of its outputs.

    Raises:
        DataError: fewer than two batches.
        ModelError: a planned parameter is of a layer that cannot be calibrated, or was not used by the first batch.
        WeightError: a planned parameter, or its inputs, are NaN or infinite.
    """
    batches = list(batches)
    if len(batches) < 2:
        raise DataError(f"calibration needs at least 2 batches, one of them held out; there are {len(batches)}")
    without_caches(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it computes whole transformer layers past their modules
    try:
        return _Run(model.eval(), batches, plan, recipe, progress, said).run(resume)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Run:
    """The state of one walk over a model."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        plan: Mapping[str, tuple[Pattern, Axis]],
        recipe: Recipe,
        progress: Callable[[str], None],
        said: Sequence[Said],
    ):
        self.model, self.recipe, self.progress = model, recipe, progress
        self.dense = copied(model).requires_grad_(False)
        self.answer, self.answer_dense = (answer_of(m, batches[0]) for m in (model, self.dense))
        self.sites = find_sites(model, plan)
        held = max(1, round(len(batches) * recipe.held_out))
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.said = [] if all(one.kind == "value" for one in said) else said
        self.by_place = bool(self.said) and any(output.dim() > 2 for output in self._outputs_dense(batches[0]))
        self.fresh = batches[:-held]
        self.many = max(1.0, sum(map(image_count, self.fresh)) / _FEW) if self.by_place and is_images(batches[0]) else 1.0
        copies = recipe.copies * (_VARIED if self.by_place else 1) if is_images(batches[0]) else 1
        copies = max(1, round(copies / self.many))
        train = [self._changed(b) if copy else b for copy in range(copies) for b in self.fresh]
        self.together = max(1, _IMAGES // image_count(batches[0])) if is_images(batches[0]) else 1
        self.train, self.batches = len(train), train + batches[-held:]
        self.followers = find_followers(model, batches[0], list({site.module for site in self.sites}))
        self.masks: dict[str, Tensor] = {}
        self.result = Pruned({})

    def run(self, resume: Path | None) -> Pruned:
        before = {name: t.clone() for name, t in self.model.state_dict().items()}
        modules = list(dict.fromkeys(site.module for site in self.sites))
        units = find_units(self.model, modules)
        calls = trace(self.model, self.batches[0], units)
        counts = {unit: sum(name == unit for name, _ in calls) for unit in units}
        if unused := [unit for unit, count in counts.items() if not count]:
            raise ModelError(f"'{unused[0]}' was not used by the first batch: exclude its weights")
        key = fingerprint(before, self.batches, self.sites, self.recipe) if resume else ""
        done = self._restore(read(resume, key)) if resume else []
        store = Store(self.recipe.memory)
        pruned, dense = (Replay(model, self.batches, counts, store) for model in (self.model, self.dense))
        for unit in dict.fromkeys(name for name, _ in calls):
            inputs, inputs_dense = pruned.calls(unit), dense.calls(unit)
            targets = outputs_of(self.dense.get_submodule(unit), inputs_dense, store)
            if unit not in done:
                self._unit(unit, inputs, inputs_dense, targets)
                done.append(unit)
                if resume:
                    write(resume, key, self._done(done))
            dense.answer(unit, targets)
            pruned.answer(unit, outputs_of(self.model.get_submodule(unit), inputs, store))
        self._whole()
        after = self.model.state_dict()
        self.result.state = {n: after[n] for n, old in before.items() if not torch.equal(old, after[n])}
        return self.result

    def _done(self, units: list[str]) -> Done:
        return {
            "units": units,
            "state": dict(self.model.state_dict()),
            "masks": self.masks,
            "generator": self.generator.get_state(),
            "layers": [layer.error for layer in self.result.layers],
            "names": [layer.name for layer in self.result.layers],
            "corrections": [(c.unit, c.what, c.before, c.after) for c in self.result.corrections],
        }

    def _restore(self, stored: Done) -> list[str]:
        """Go to where a run was interrupted; the units that it had done."""
        if not stored:
            return []
        self.model.load_state_dict(stored["state"])
        self.generator.set_state(stored["generator"])
        self.masks = stored["masks"]
        sites = {site.name: site for site in self.sites}
        owners = {name: unit for unit in stored["units"] for name in sites if name == unit or name.startswith(f"{unit}.")}
        for name, error in zip(stored["names"], stored["layers"], strict=True):
            site = sites[name]
            self.result.layers.append(LayerReport(name, site.pattern, site.axis, owners.get(name, ""), error))
        self.result.corrections = [Correction(*fields) for fields in stored["corrections"]]
        units: list[str] = stored["units"]
        return units

    # ------------------------------------------------------------------------------------------------- one unit

    def _unit(self, unit: str, inputs: list[list[Call]], inputs_dense: list[list[Call]], targets: list[list[Any]]) -> None:
        module, dense = self.model.get_submodule(unit), self.dense.get_submodule(unit)
        sites = {s.name: s for s in self.sites if s.module == unit or not unit or s.module.startswith(unit + ".")}
        stages, uses = self._stages(unit, list(sites.values()), inputs[0][0])
        for stage in stages:
            moments = self._moments(module, dense, stage, uses, inputs[: self.train], inputs_dense[: self.train])
            for site in stage:
                self._solve(unit, site, moments[site.name])
        if self.recipe.block_steps and any(site.module != unit for site in sites.values()):
            self._reconstruct(unit, inputs, targets)

    def _stages(self, unit: str, sites: Sequence[Site], call: Call) -> tuple[list[list[Site]], dict[str, int]]:
        """The sites of a unit in execution order, those that read the same tensor together; and each module's calls."""
        prefix = unit + "." if unit else ""
        by_module: dict[str, list[Site]] = {}
        for site in sites:
            by_module.setdefault(site.module, []).append(site)
        local = {name.removeprefix(prefix) if name != unit else "": name for name in by_module}
        order = trace(self.model.get_submodule(unit), call, list(local))
        stages: list[tuple[int, list[Site]]] = []
        done: set[str] = set()
        for seen, identity in order:
            name = local[seen]
            if name in done:
                continue
            done.add(name)
            first = [s for s in by_module[name] if s.parameter != "out_proj.weight"]
            if stages and stages[-1][0] == identity and first:
                stages[-1][1].extend(first)
            elif first:
                stages.append((identity, first))
            stages.extend((0, [s]) for s in by_module[name] if s.parameter == "out_proj.weight")
        return [stage for _, stage in stages], Counter(local[seen] for seen, _ in order)

    def _moments(
        self,
        module: nn.Module,
        dense: nn.Module,
        stage: Sequence[Site],
        uses: Mapping[str, int],
        inputs: Sequence[Sequence[Call]],
        inputs_dense: Sequence[Sequence[Call]],
    ) -> dict[str, list[Moments]]:
        limit = -(-self.recipe.tokens // len(inputs))
        moments: dict[str, list[Moments]] = {site.name: [] for site in stage}
        for calls, calls_dense in zip(inputs, inputs_dense, strict=True):
            seen = inputs_seen(self.model, module, stage, calls, limit, uses)
            other = inputs_seen(self.dense, dense, stage, calls_dense, limit, uses) if self.recipe.against_dense else seen
            for site in stage:
                for call, call_dense in zip(seen[site.name], other[site.name], strict=True):
                    if not moments[site.name]:
                        moments[site.name] = [Moments() for _ in call]
                    for block, x, x_dense in zip(moments[site.name], call, call_dense, strict=True):
                        block.add(x, x_dense)
        return moments

    def _solve(self, unit: str, site: Site, moments: list[Moments]) -> None:
        parameter = self.model.get_parameter(site.name)
        view = MatrixView.of(site.kind, parameter.shape, site.axis, site.groups)
        matrix = view.to_matrix(parameter.detach())
        mean = self._mean(site) if self.recipe.correct_means else None
        method, damping = self.recipe.criterion, self.recipe.damping
        try:
            solved = solve_rows(matrix, moments, site.pattern, method, damping, centred=mean is not None)
        except WeightError as error:
            raise not_finite(site.name, matrix, self._given()) from error
        with torch.no_grad():
            parameter.copy_(view.from_matrix(solved.weight).to(parameter.dtype))
            if mean is not None:
                mean[0].add_((solved.shift * mean[1]).to(mean[0].dtype))
        self.masks[site.name] = view.from_matrix(solved.mask)
        self.result.layers.append(LayerReport(site.name, site.pattern, site.axis, unit, solved.error))
        self.progress(f"{site.name}  {site.pattern} {site.axis}  error {solved.error:.4f}")

    def _mean(self, site: Site) -> tuple[Tensor, float] | None:
        """Where a change of the layer's mean output goes: its bias (sign −1) or the next norm's running mean (+1)."""
        owner, _, leaf = site.name.rpartition(".")
        module = self.model.get_submodule(owner)
        bias = getattr(module, "in_proj_bias" if leaf == "in_proj_weight" else "bias", None)
        if isinstance(bias, Tensor) and leaf in ("weight", "in_proj_weight"):
            return bias.data, -1.0
        norm = self.followers.get(site.module)
        return None if norm is None else (self.model.get_buffer(f"{norm}.running_mean"), 1.0)

    # ---------------------------------------------------------------------------------------------- corrections

    def _correct(
        self,
        unit: str,
        what: str,
        change: Callable[[], None],
        inputs: list[list[Call]],
        targets: list[list[Any]],
        distance: Measure = output_error,
    ) -> None:
        def error() -> float:
            return held_out_error(self._answer(unit), inputs, targets, distance)

        before, after = keep_if_better(self.model.get_submodule(unit), change, error)
        if math.isnan(before) and (where := not_finite_sample(self._given())):
            raise WeightError(
                f"{unit or 'model'}: its outputs are NaN for {where}, which holds such values; repair it or leave it out"
            )
        self.result.corrections.append(Correction(unit, what, before, after))
        self.progress(f"{unit or 'model'}: {what}  {before:.4f} -> {after:.4f}")

    def _given(self) -> list[Batch]:
        """The calibration data, in its order."""
        return [*self.fresh, *self.batches[self.train :]]

    def _answer(self, unit: str) -> Answer:
        return self.model.get_submodule(unit) if unit else self.answer

    def _reconstruct(self, unit: str, inputs: list[list[Call]], targets: list[list[Any]]) -> None:
        prefix = unit + "." if unit else ""
        masks = {n.removeprefix(prefix): m for n, m in self.masks.items() if n.startswith(prefix)}
        order, answer = self._shuffled(self.recipe.block_steps * self.together), self._answer(unit)

        def example(number: int) -> Any:
            call = inputs[order[number]][0]
            return call.args, call.kwargs, targets[order[number]][0]

        def loss(example: Any) -> Tensor:
            args, kwargs, target = example
            return output_error(answer(*args, **kwargs), target)

        def change() -> None:
            self._fit(unit, loss, example, masks, self.recipe.block_steps, self.recipe.block_rate, self.together)

        self._correct(unit, "reconstruction", change, inputs[self.train :], targets[self.train :])

    def _whole(self) -> None:
        """The model as a whole, as one more block."""
        held = [[as_call(batch)] for batch in self.batches[self.train :]]
        targets = outputs_of(self.answer_dense, held)
        distance = self._distance()
        if self.recipe.reestimate and norms(self.model):
            train = [[as_call(batch)] for batch in self.fresh]
            self._correct("", "norms", lambda: reestimate_norms(self.model, self.dense, train, train), held, targets, distance)
        if not self.recipe.model_steps:
            return
        finer = min(_FINER, self.together) if self.by_place else 1
        steps, together = round(self.recipe.model_steps * finer * min(self.many, _LONGER)), self.together // finer
        order = self._shuffled(steps * together, len(self.fresh))

        def example(number: int) -> Any:
            call = as_call(self._changed(self.fresh[order[number]]))
            return call.args, call.kwargs

        def loss(example: Any) -> Tensor:
            target = self._outputs_dense(Call(*example))
            return distance(self.answer(*example[0], **example[1]), target)

        error = held_out_error(self.answer, held, targets, distance)
        usual = self.recipe.model_rate * (_GENTLER if self.by_place else 1.0)
        rate = usual * min(1.0, (error / _LARGE) ** 0.5)  # a good model is spoilt by large steps

        def change() -> None:
            self._fit("", loss, example, self.masks, steps, rate, together)

        self._correct("", "reconstruction", change, held, targets, distance)

    def _changed(self, batch: Batch) -> Batch:
        """A batch of images at random: where the model answers for every place, changed more than for one answer."""
        if not is_images(batch):
            return batch
        if not self.by_place or not isinstance(batch, Tensor):
            return augment(batch, self.generator)
        return scenes(batch, [image for other in self.fresh for image in other], self.generator)

    def _distance(self) -> Measure:
        """How far answers of the model as a whole are apart."""
        if not self.said:
            return output_error
        return Distance(self.said, (self._outputs_dense(batch) for batch in self.fresh))

    def _outputs_dense(self, batch: Batch) -> Any:
        return outputs_of(self.answer_dense, [[as_call(batch)]])[0][0]

    def _fit(
        self,
        unit: str,
        loss: Loss,
        examples: Callable[[int], Any],
        masks: Mapping[str, Tensor],
        steps: int,
        rate: float,
        together: int,
    ) -> None:
        module, relative, at_once = self.model.get_submodule(unit), self.recipe.relative_rates, self.recipe.at_once
        reconstruct(
            module, loss, examples, masks, steps=steps, rate=rate, together=together, relative=relative, at_once=at_once
        )

    def _shuffled(self, count: int, among: int | None = None) -> list[int]:
        order: list[int] = []
        while len(order) < count:
            order += torch.randperm(among or self.train, generator=self.generator).tolist()
        return order[:count]
