"""The fine-tuning stage: a pruned checkpoint → a fine-tuned copy, weights exactly N:M, manifest brought up to date."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nmconvert import dist
from nmconvert.arrays import as_array, digest
from nmconvert.checkpoint import Checkpoint, beside, check_apart, check_copy, has_manifest, is_onnx, open_checkpoint
from nmconvert.errors import UsageError
from nmconvert.hugging_face import is_model
from nmconvert.imports import file_of
from nmconvert.inputs import InputSpec
from nmconvert.manifest import Manifest
from nmconvert.model import load, matched_names
from nmconvert.plan import Plan
from nmconvert.tasks import Task, build_task
from nmconvert.tasks.base import Samples
from nmconvert.tensor import dtype_name
from nmconvert.train.log import row_json
from nmconvert.train.loop import Training, train
from nmconvert.train.settings import Settings
from nmconvert.train.state import latest


@dataclass(frozen=True)
class Said:
    """What is said once: in this command or before, in the manifest."""

    task: str
    task_settings: Mapping[str, str]
    data: str
    model: str
    model_arguments: Mapping[str, str]

    def build_task(self) -> Task:
        """The task with its settings."""
        return build_task(self.task, self.task_settings, folder=Path(self.model))

    def network(self, path: Path, *, trust: bool) -> nn.Module:
        """The model with the weights of ``path``, in fp32 whatever the file has: small steps vanish in half precision."""
        return load(self.model, path, self.model_arguments, trust=trust).float()


@dataclass(frozen=True)
class Files:
    """Where a run writes: the checkpoint, beside it the log, and while it lasts the folder of states.

    The log grows in that folder: a run that fails leaves the checkpoint and the log of the one before as they were.
    """

    output: Path
    log: Path
    states: Path

    @classmethod
    def of(cls, source: Path, output: Path | None) -> Files:
        """Those of a run on ``source``.

        Raises:
            UsageError: the output would replace it, is called what it is not, or has no folder.
        """
        output = output or default_output(source)
        check_copy(source, output, has_manifest)
        stem = output.name if source.is_dir() else output.stem
        return cls(output, output.with_name(f"{stem}.jsonl"), output.with_name(f"{output.name}.state"))

    def check(self, read: Iterable[Path]) -> None:
        """Raise where one of them would replace what is ``read``."""
        check_apart([(path, "--output") for path in (self.output, self.log, self.curves)], read)

    @property
    def curves(self) -> Path:
        """The SVG file with the curves of the run."""
        return self.log.with_suffix(".svg")

    @property
    def growing_log(self) -> Path:
        """The log while the run lasts."""
        return self.states / "log.jsonl"

    @contextmanager
    def used(self) -> Iterator[None]:
        """Where the block fails, the states are kept if the run can go on from one; where it ends, the log gets its place."""
        try:
            yield
        except BaseException:
            if dist.rank() == 0 and latest(self.states) is None:
                shutil.rmtree(self.states, ignore_errors=True)
            raise
        if dist.rank() == 0:
            for growing in self.states.glob("log.*"):  # and its curves
                growing.replace(self.log.with_suffix(growing.suffix))
            shutil.rmtree(self.states)


@dataclass(frozen=True)
class FinetuneResult:
    """What was written, and the run behind it."""

    source: Path
    output: Path
    log: Path
    teacher: Path | None
    metric: str
    training: Training
    higher_is_better: bool = True

    @property
    def worse_by(self) -> float:
        """How much worse the metric is than before the first step; 0 where it is not."""
        start = next((row for row in self.training.rows if row.label == "start"), None)
        if start is None:
            return 0.0
        gained = self.training.rows[-1].metrics[self.metric] - start.metrics[self.metric]
        return max(0.0, -gained if self.higher_is_better else gained)

    @property
    def curves(self) -> Path:
        """The SVG file with the curves of the run."""
        return self.log.with_suffix(".svg")


def finetune(
    source: Path,
    task: str | None,
    data: str | None,
    settings: Settings,
    *,
    task_settings: Mapping[str, str] | None = None,
    model: str | None = None,
    model_arguments: Mapping[str, str] | None = None,
    teacher: Path | None = None,
    learn_alone: bool = False,
    from_dense: bool = False,
    output: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    trust: bool = False,
    display: bool = False,
) -> FinetuneResult:
    """Train the pruned checkpoint ``source`` with SR-STE and write ``output``, by default with ``.ft`` in its name.

    Beside the output stand its log (.jsonl), the curves (.svg) and, while it runs, the folder of states (.state).

    Args:
        source: a checkpoint with a manifest, which says which weights are sparse.
        task: what the model does, a key of `nmconvert.tasks.TASKS`; left out: as the manifest knows it, or classification.
        data: its data, as the task reads it; left out: as the manifest knows it.
        settings: all numbers.
        task_settings: of the task, beside those that the manifest knows.
        model: as in `nmconvert.model.build`; left out: as the manifest knows it.
        model_arguments: for the callable that ``model`` names.
        teacher: a dense checkpoint of the same model; left out: the one that was pruned, if it is still there.
        learn_alone: have no teacher.
        from_dense: start from the teacher's weights, masked, rather than from those of ``source``.
        output: where to write.
        resume: go on with a run that did not end.
        device: left out: the GPU of this process if there is one, else the CPU.
        trust: allow files that execute code when they are loaded.
        display: show the run on the terminal.

    Raises:
        UsageError: ``source`` was not pruned by nmconvert, model or data are neither given nor in the manifest, or ``output``
            is a file that is read, or in no folder.
        NmconvertError: see `nmconvert.train.loop.train`.
    """
    checkpoint = open_checkpoint(source, trust=trust)
    manifest = _manifest_of(checkpoint)
    said = _said(manifest, source, task, task_settings, data, model, model_arguments)
    does, files = said.build_task(), Files.of(source, output)
    settings = settings.for_task(does.name)
    dense = None if learn_alone else teacher or _dense_source(manifest)
    files.check([file_of(said.data), file_of(said.model), *([] if dense is None else [dense])])
    place = dist.device(device)
    with dist.processes(place):
        with files.used():
            network, master = _networks(said, source, dense, from_dense=from_dense, trust=trust)
            names = _names(checkpoint, network)
            validation = does.dataset(said.data, split="val", augment=False)
            training = train(
                network, plan_of(manifest, names, network), does,
                does.dataset(said.data, split="train", augment=settings.augment), validation, settings, teacher=master,
                folder=files.states, log=files.growing_log, resume=resume, device=place, display=display,
            )  # fmt: skip
            if dist.rank() == 0:
                told = {"teacher": None if dense is None else str(dense), "settings": asdict(settings)}
                shape = manifest.settings.get("input") or _input_shape(does, validation)
                _write(checkpoint, names, files.output, training, manifest.with_settings(**asdict(said), input=shape), told)
        dist.barrier()
    return FinetuneResult(source, files.output, files.log, dense, does.metric, training, does.higher_is_better)


def default_output(source: Path) -> Path:
    """``resnet50.nm2-4.pth`` → ``resnet50.nm2-4.ft.pth``; a folder gets the same ending."""
    return beside(source, ".ft")


def plan_of(manifest: Manifest, names: Mapping[str, str], model: nn.Module) -> Plan:
    """The sparse weights of ``manifest`` under ``names``, those that they have in ``model``.

    Raises:
        UsageError: one is only a part of a parameter of the model.
    """
    merged = [name for name in (layer.name for layer in manifest.layers) if names[name] not in model.state_dict()]
    if merged and is_model(model):
        whole = [part for part in merged[0].split(".")[:-2] if not part.isdigit()][-1]  # of experts.0.w1.weight
        raise UsageError(
            f"'{merged[0]}' is part of a larger parameter of {type(model).__name__}, which cannot be trained under a mask: "
            f"prune with --exclude '*{whole}*' to fine-tune the rest"
        )
    rows = (replace(layer.row, info=replace(layer.info, name=names[layer.name])) for layer in manifest.layers)
    return Plan(tuple(rows))


def _write(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    output: Path,
    training: Training,
    manifest: Manifest,
    told: dict[str, Any],
) -> None:
    digests: dict[str, str] = {}

    def replacement(name: str) -> Any:
        def edit(old: Tensor) -> Tensor:
            new = training.weights[names[name]].cpu().to(old.dtype)
            digests[name] = digest(as_array(new))
            return new

        return edit

    changed = [info for info in checkpoint.tensors() if info.name in names and names[info.name] in training.weights]
    edits = {info.name: replacement(info.name) for info in changed if info.shared_with is None}
    rows = [{"label": row.label, **row_json(row)["metrics"]} for row in training.rows]

    def text() -> str:
        layers = tuple(replace(layer, digest=digests.get(layer.name, layer.digest)) for layer in manifest.layers)
        return replace(manifest, layers=layers).after("finetune", rows=rows, steps=training.steps, **told).to_json()

    checkpoint.write_copy(output, edits, text)


def _names(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    return matched_names([info.name for info in checkpoint.tensors() if not info.secondary], model)


def _manifest_of(checkpoint: Checkpoint) -> Manifest:
    if is_onnx(checkpoint.path):
        raise UsageError(f"{checkpoint.path}: an ONNX file is not trained; fine-tune the checkpoint, then export it")
    manifest = Manifest.of(checkpoint) or Manifest()
    if not manifest.layers:
        raise UsageError(
            f"{checkpoint.path}: was not pruned by nmconvert; run nmconvert prune {checkpoint.path} --nm 2:4 first"
        )
    return manifest


def _input_shape(task: Task, samples: Samples) -> list[str] | None:
    """The shape of one sample as ``--input`` takes it, so that export need not ask; of models that take one tensor."""
    batch = task.collate([samples[0]]) if len(samples) else None
    if batch is None or not batch.size or not isinstance(batch.inputs, Tensor):
        return None
    return [str(InputSpec(None, tuple(batch.inputs.shape), dtype_name(batch.inputs.dtype)))]


def _said(
    manifest: Manifest,
    source: Path,
    task: str | None,
    task_settings: Mapping[str, str] | None,
    data: str | None,
    model: str | None,
    model_arguments: Mapping[str, str] | None,
) -> Said:
    name, settings = manifest.said_task(task, task_settings)
    data = data or manifest.settings.get("data")
    if data is None:
        raise UsageError(f"{source}: trained on what? Give --data, a folder or a file of the task '{name}'")
    spec, arguments = manifest.said_model(source, model, model_arguments)
    if spec is None:
        raise UsageError(f"{source}: holds weights only; say what they belong to with --model module:callable")
    return Said(name, settings, data, spec, arguments)


def _networks(
    said: Said, source: Path, dense: Path | None, *, from_dense: bool, trust: bool
) -> tuple[nn.Module, nn.Module | None]:
    """The network to train, and its teacher."""
    network = said.network(source, trust=trust)
    teacher = None if dense is None else said.network(dense, trust=trust)
    if from_dense:
        if teacher is None:
            raise UsageError("--from-dense: there is no dense checkpoint to start from; name it with --teacher")
        network.load_state_dict(teacher.state_dict())
    return network, teacher


def _dense_source(manifest: Manifest) -> Path | None:
    source = manifest.settings.get("source")
    return Path(source) if isinstance(source, str) and Path(source).exists() else None
