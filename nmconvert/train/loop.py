"""One loop for all tasks: SR-STE fine-tuning, with or without labels, on one process or many; read it from top to bottom."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from math import isfinite
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from nmconvert import dist
from nmconvert.errors import DataError, NmconvertError, UsageError
from nmconvert.model import copied
from nmconvert.norms import estimated_anew, norms
from nmconvert.plan import Plan
from nmconvert.srste import plain_state_dict, sparsify_plan
from nmconvert.tasks import Batch, Predict, Task, misfits_named
from nmconvert.train import state
from nmconvert.train.batches import Batches, validation_loader
from nmconvert.train.diagnose import first_bad_layer, not_finite, out_of_memory_named, slow_in
from nmconvert.train.log import Display, Log, Reporter, Row
from nmconvert.train.settings import Settings, seed_step

MAY_CHANGE = {"epochs", "workers", "save_minutes", "shard", "accumulate", "patience"}
"""Settings that a resumed run may give anew. Others would make it another run."""
_NORM_STEPS = 32  # whose batches the norms of averaged weights are estimated on


@dataclass(frozen=True)
class Training:
    """What a run has come to: its table, and the weights, exactly N:M, under the model's plain names."""

    rows: tuple[Row, ...]
    steps: int
    weights: dict[str, Tensor]
    stopped_early: bool
    judged_by_teacher: bool = False
    """The validation data has no labels: the metrics say how far the model agrees with its teacher."""


def train(
    model: nn.Module,
    plan: Plan,
    task: Task,
    data: Any,
    validation: Any,
    settings: Settings,
    *,
    teacher: nn.Module | None = None,
    folder: Path | None = None,
    log: Path | None = None,
    resume: bool = False,
    device: torch.device | None = None,
    display: bool = False,
) -> Training:
    """Fine-tune ``model`` in place until the weights of ``plan`` are N:M.

    Args:
        model: the network; its parameters are trained, and at the end hold the result (unless they are sharded).
        plan: which weights, with which pattern and axis, under the model's names.
        task: batches, losses and metric.
        data: training samples, a dataset that the task can collate.
        validation: samples to measure on, before the first step and after each epoch.
        settings: all numbers.
        teacher: a dense model to learn from, and to measure first.
        folder: where states are saved; left out: none are.
        log: the JSONL file; the curves stand beside it, with suffix .svg.
        resume: go on from the last state in ``folder``, if there is one.
        device: where to train; left out: the CPU.
        display: show the table and a bar while it runs.

    Raises:
        DataError: too little data, or data of another task.
        UsageError: settings that contradict each other, or those of the run that is resumed.
        NmconvertError: the loss is no longer finite, or there is too little memory; the last good state is kept.
    """
    settings = settings.for_task(task.name)
    _check_folder(settings, folder, resume)
    run = Run(model, plan, task, data, validation, settings, teacher, folder, device or torch.device("cpu"))
    resumed_at = run.resume() if resume else None
    if resume and resumed_at is None and dist.rank() == 0:
        warnings.warn(f"--resume: there is no state in {folder} to go on from; this run begins anew", stacklevel=2)
    with run.reporter(log, resumed_at, display) as report:
        if resumed_at is None:
            report.rows(0, run.validate_before())
        for epoch in range(run.step // run.batches.steps, settings.epochs):
            if run.stopped_early:
                break
            first = run.step % run.batches.steps
            report.epoch(epoch, settings.epochs, run.batches.steps, first)
            for parts in run.batches.epoch(epoch, first):
                report.step(run.step + 1, run.train_step(parts))
                if run.save_is_due:
                    run.save()
            report.rows(run.step, [run.validate_epoch(epoch + 1)])
            run.save()
    return run.finish()


def _check_folder(settings: Settings, folder: Path | None, resume: bool) -> None:
    if settings.patience is not None and folder is None:
        raise UsageError("patience needs a folder for states, to come back to the best epoch")
    if folder is not None:
        state.check_folder(folder)
    left = None if folder is None or resume else state.latest(folder)
    if left is not None:
        raise UsageError(f"{left}: a run that did not end left this; go on with --resume, or remove the folder to start anew")


class Run:
    """The parts of a run, and what one step, one validation and one save do with them."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        task: Task,
        data: Any,
        validation: Any,
        settings: Settings,
        teacher: nn.Module | None,
        folder: Path | None,
        device: torch.device,
    ) -> None:
        self.task, self.validation, self.settings, self.folder, self.device = task, validation, settings, folder, device
        if slow := slow_in(settings.precision, device):
            warnings.warn(slow, stacklevel=3)
        self.model = _placed(model, device, shard=settings.shard).train()
        self.teacher = teacher
        if teacher is not None:
            self.teacher = _placed(teacher, device, shard=settings.shard).eval().requires_grad_(False)
        self.batches = Batches(data, task, settings, device)
        self.steps = settings.epochs * self.batches.steps
        self.sparse = sparsify_plan(self.model, plan, method=settings.method, decay=settings.decay)
        shard_dim = self.sparse.shard_dim if settings.shard else None
        self.parallel = dist.parallelize(self.model, shard_dim=shard_dim, not_shared=self.sparse.mask_names())
        if self.teacher is not None and settings.shard:
            dist.parallelize(self.teacher, shard_dim=lambda parameter: 0)
        self.average = copied(self.model).requires_grad_(False) if settings.ema is not None else None
        self.optimizer = settings.make_optimizer(self.model)
        self.sparse.attach(self.optimizer, steps=self.steps, anneal=settings.anneal, freeze_masks=settings.freeze_masks)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.step = 0
        self.rows: list[Row] = []
        self.loss_sum = self.seconds = 0.0  # of the epoch so far
        self.judged_by_teacher = False
        self.best_step: int | None = None
        self.best = 0.0
        self.waited = 0  # epochs since the best
        self._saved_at = monotonic()
        self._due = False

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, parts: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step from this process's share of a batch; what to log of it."""
        began = perf_counter()
        seed_step(self.settings.seed, self.step, dist.rank())
        lr = self.settings.lr_at(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        wants_save = (monotonic() - self._saved_at) / 60 >= self.settings.save_minutes
        sizes = dist.total(torch.tensor([float(sum(b.size for b in parts)), float(wants_save)], device=self.device))
        size, self._due = float(sizes[0]), bool(sizes[1] > 0)
        if not all(batch.size for batch in parts):
            raise DataError(f"step {self.step + 1}: every sample of a batch was skipped, nothing is left to learn from")

        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        with out_of_memory_named(self.settings.batch, self.settings.accumulate), misfits_named(self.model, self.task.misfit):
            for index, batch in enumerate(parts):
                # Processes average their gradients; a sum of shares of the whole batch is what is wanted.
                share = batch.size / size
                with dist.sync_gradients(self.parallel, index == len(parts) - 1):
                    with self._autocast():
                        part = self.loss(batch) * share
                    loss += part.detach()
                    self.scaler.scale(part * dist.world()).backward()
            value = float(dist.total(loss))
            if not isfinite(value):
                self._stop_not_finite(value, parts)
            self._update()
        self.step += 1
        self.loss_sum += value
        seconds = perf_counter() - began
        self.seconds += seconds
        return {"loss": value, "lr": lr, "decay": self.sparse.current_decay, "seconds": seconds}

    def loss(self, batch: Batch) -> Tensor:
        """The task's loss, the distance from the teacher, or a mix."""
        weight = self.settings.distill if self.teacher is not None else 0.0
        if weight == 1:
            return self.task.distill(self.parallel, self.teacher, batch)
        loss = self.task.loss(self.parallel, batch)
        return loss if not weight else (1 - weight) * loss + weight * self.task.distill(self.parallel, self.teacher, batch)

    def _stop_not_finite(self, loss: float, parts: Sequence[Batch]) -> None:
        if any(not_finite(batch.inputs) for batch in parts):
            raise DataError(
                f"a sample of step {self.step + 1} holds NaN or infinity: repair the data, or leave that sample out"
            )
        where = first_bad_layer(self.model, lambda: [self.loss(batch) for batch in parts])
        good = None if self.folder is None else state.latest(self.folder)
        kept = "nothing was saved yet" if good is None else f"{good} is the last good state"
        raise NmconvertError(
            f"the loss is {loss} at step {self.step + 1} (epoch {self.step // self.batches.steps + 1}): {where}; {kept}. "
            f"Try a lower --lr than {self.settings.peak_lr:g}, or --clip 1"
        )

    def _update(self) -> None:
        if self.settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            assert self.settings.ema is not None
            weight = 1 - min(self.settings.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for mean, trained in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(trained, weight)
                for ours, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
                    ours.copy_(buffer)

    def _autocast(self) -> Any:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.settings.precision == "bf16" else torch.float16)

    # -- validation ---------------------------------------------------------------------------------------------------

    def validate_before(self) -> list[Row]:
        """The dense model, if there is one, and the sparse one as it starts."""
        if self.teacher is not None:
            self.rows.append(Row("dense", self._metrics(self.teacher)))
        start = self.average or self.model
        self.rows.append(Row("start", self._metrics(start), pruned_energy=self.sparse.statistics().pruned_energy))
        return list(self.rows)

    def validate_epoch(self, epoch: int) -> Row:
        """The row of an epoch that ends."""
        if self.average is not None:
            self._renew_norms(self.average)
        statistics = self.sparse.statistics()
        row = Row(
            str(epoch),
            self._metrics(self.average or self.model),
            loss=self.loss_sum / self.batches.steps,
            flip_rate=statistics.flip_rate,
            sad=statistics.sad,
            pruned_energy=statistics.pruned_energy,
            seconds=round(self.seconds, 1),
        )
        self.rows.append(row)
        self.loss_sum = self.seconds = 0.0
        value = row.metrics[self.task.metric] * (1 if self.task.higher_is_better else -1)
        if self.best_step is None or value > self.best:
            self.best, self.best_step, self.waited = value, self.step, 0
        else:
            self.waited += 1
        return row

    @torch.no_grad()
    def _renew_norms(self, average: nn.Module) -> None:
        """Averaged weights have norms of their own: those that the last weights leave are of weights that spread further.

        Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, section 3.2.
        """
        found = norms(average)
        predict = self.task.predictor(average.eval())
        with estimated_anew(found):
            for parts in islice(self.batches.epoch(0), _NORM_STEPS if found else 0):
                for batch in parts:
                    if batch.size:
                        predict(batch.inputs)

    def _metrics(self, model: nn.Module) -> dict[str, float]:
        dist.broadcast_buffers(model)
        was_training = model.training
        model.eval()
        loader = self._labelled(validation_loader(self.validation, self.task, self.settings, self.device))
        predict = self.task.predictor(model)
        with misfits_named(model, self.task.misfit):
            if self.settings.shard:
                metrics = self.task.evaluate(_without_inference_mode(predict), loader)
            else:
                metrics = self.task.evaluate(predict, loader, gather=dist.gather)
        model.train(was_training)
        return {name: float(value) for name, value in metrics.items()}

    def _labelled(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Where the data has no labels, those of the teacher."""
        for batch in loader:
            if batch.size and not batch.labelled and self.teacher is not None:
                self.judged_by_teacher = True
                batch = self.task.taught(self.teacher, batch)
            yield batch

    @property
    def stopped_early(self) -> bool:
        """Whether the metric has not become better for ``patience`` epochs."""
        return self.settings.patience is not None and self.waited >= self.settings.patience

    # -- states -------------------------------------------------------------------------------------------------------

    @property
    def save_is_due(self) -> bool:
        """Whether a state should be saved now; the end of an epoch saves anyway."""
        return self._due and self.step % self.batches.steps != 0

    def save(self) -> None:
        """Save everything that the rest of the run depends on."""
        self._saved_at = monotonic()
        if self.folder is None:
            return
        dist.broadcast_buffers(self.model)
        sparse = {key: value for key, value in self.sparse.state_dict().items() if key != "first"}
        progress = {
            "settings": asdict(self.settings),
            "samples": len(self.batches.dataset),
            "step": self.step,
            "rows": [asdict(row) for row in self.rows],
            "sparse": sparse,
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
            "judged_by_teacher": self.judged_by_teacher,
        }
        keep = self.best_step if self.settings.patience is not None else None
        state.save(self.folder, self.step, self._tensors(), progress, keep=keep)

    def resume(self) -> int | None:
        """Go on from the last state, if there is one; returns its step."""
        found = None if self.folder is None else state.latest(self.folder)
        if found is None:
            return None
        progress = state.read_progress(found)
        self._check_same_run(progress)
        state.prepare_optimizer(self.model, self.optimizer, found)
        tensors = self._tensors()
        state.load(found, tensors)
        first = {name.removeprefix("first."): mask for name, mask in tensors.items() if name.startswith("first.")}
        self.sparse.load_state_dict({**progress["sparse"], "first": first})
        self.scaler.load_state_dict(progress["scaler"])
        self.step = progress["step"]
        self.rows = [Row(**row) for row in progress["rows"]]
        self.loss_sum, self.seconds = progress["loss_sum"], progress["seconds"]
        self.best, self.best_step, self.waited = progress["best"], progress["best_step"], progress["waited"]
        if not found.with_name(f"step-{self.best_step}").is_dir():
            self.best_step, self.waited = None, 0  # only runs with patience keep it: the best is sought among epochs to come
        self.judged_by_teacher = progress["judged_by_teacher"]
        return self.step

    def _check_same_run(self, progress: dict[str, Any]) -> None:
        now = {**asdict(self.settings), "samples": len(self.batches.dataset)}
        then = {**progress["settings"], "samples": progress["samples"]}
        for name, value in now.items():
            if name not in MAY_CHANGE and then.get(name) != value:
                raise UsageError(
                    f"--resume: {name.replace('_', '-')} was {then.get(name)} and is {value} now: "
                    "give what was given before, or start anew without --resume"
                )

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of the state; they share memory with the run."""
        tensors = {f"model.{name}": value for name, value in _tensors_of(self.model)}
        tensors |= state.optimizer_tensors(self.model, self.optimizer)
        tensors |= {f"first.{name}": mask for name, mask in self.sparse.state_dict()["first"].items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in _tensors_of(self.average)}
        return tensors

    def reporter(self, log: Path | None, resumed_at: int | None, display: bool) -> Reporter:
        """What tells of the run, on the first process only."""
        first = dist.rank() == 0
        journal = Log(log if first else None, self.task.metric, self.batches.steps, resumed_at)
        return Reporter(journal, Display(self.task.metric, self.rows, show=display and first))

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> Training:
        """The weights to keep: the best epoch's where ``patience`` was given, else the last; the model holds them."""
        if self.settings.patience is not None and self.folder is not None and self.best_step not in (None, self.step):
            best = self.folder / f"step-{self.best_step}"
            state.load(best, {n: t for n, t in self._tensors().items() if n.startswith(("model.", "average."))})
        if self.average is not None:
            self.model.load_state_dict(self.average.state_dict())
        dist.broadcast_buffers(self.model)
        weights = plain_state_dict(self.model)
        if not self.settings.shard:
            self.sparse.finalize()
        return Training(tuple(self.rows), self.step, weights, self.stopped_early, self.judged_by_teacher)


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor))


def _placed(model: nn.Module, device: torch.device, *, shard: bool) -> nn.Module:
    """On the device; filters with channels last, which is faster on CPUs and in half precision (FSDP2 cannot)."""
    placed = model.to(device)
    ranks = {parameter.dim() for parameter in model.parameters()}
    if shard or 4 not in ranks or 5 in ranks:
        return placed
    return placed.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _without_inference_mode(predict: Predict) -> Predict:
    """FSDP2 counts versions of tensors, which those of inference mode do not have."""

    def call(inputs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return predict(inputs)

    return call
