"""Side by side with what one would take instead: the same checkpoint, the same 512 unlabelled images, the same evaluation.

    python benchmarks/data.py cifar10 work/cifar10.npz
    python -m benchmarks.peers work --network resnet20 --nm 2:4

ModelOpt and onnxsim come from PyPI into virtual environments of their own under ``work`` (1.5 GB, with the torch that runs
this) and are called by their public functions: `peer_modelopt.py`, `peer_onnxsim.py`. The reference formula is the
mask of NM-sparsity (Zhou et al. 2021): argsort of |w| in each group. nmconvert is called by its command line. Every result
is a file; of each the table says what `nmconvert eval` measures on the 10,000 test images, along which axis the asked pattern
holds in all tensors that have zeros (found from the file alone), processor seconds (of the whole process: imports, reading and
writing included; one thread where a method heeds OMP_NUM_THREADS), and which weights have no zeros. Printed in Markdown.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import CHECKPOINTS, ROOT
from nmconvert.checkpoint import open_checkpoint
from nmconvert.detect import satisfies
from nmconvert.evaluate import evaluate
from nmconvert.model import build, fill
from nmconvert.pattern import AXES, Pattern
from nmconvert.rules import guess_kind
from nmconvert.tasks import build_task

HERE = Path(__file__).parent
MODELS = HERE.parent / "sample_models" / "resnet.py"
ENVIRONMENTS = {
    "modelopt": (
        f"torch=={torch.__version__.partition('+')[0]}",
        "nvidia-modelopt==0.47.0",
        *("requests", "huggingface_hub"),  # which it imports and does not ask for
    ),
    "onnxsim": ("onnxsim==0.8.1", "onnxruntime"),
}
KEPT = ("conv1.weight", "linear.weight")
"""The stem and the classifier, which nmconvert's rules and ModelOpt's leave dense."""


@dataclass(frozen=True)
class Setting:
    """What all methods are given."""

    work: Path
    network: str
    pattern: Pattern

    @property
    def checkpoint(self) -> Path:
        """The published weights."""
        return ROOT / "checkpoints" / CHECKPOINTS[self.network]

    @property
    def model(self) -> str:
        """As `--model` has it."""
        return f"{MODELS}:{self.network}"

    @property
    def samples(self) -> Path:
        """The images as a network takes them: float32 [512, 3, 32, 32]."""
        return self.work / "samples.npy"

    @property
    def images(self) -> Path:
        """The same images as `--calib` takes them; no labels."""
        return self.work / "samples.npz"

    @property
    def graph(self) -> Path:
        """The dense network as an ONNX file."""
        return self.work / f"{self.network}.onnx"

    def out(self, name: str, suffix: str) -> Path:
        """Where a method writes."""
        return self.work / f"{self.network}.{self.pattern.n}-{self.pattern.m}.{name}.{suffix}"


Method = Callable[[Setting], Path]


def environment(work: Path, name: str) -> Path:
    """The Python of a virtual environment with a peer, made where it is not there yet."""
    folder = work / f"venv-{name}"
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]], check=True)
        (folder / "made").touch()
    return python


def by_nmconvert(setting: Setting, name: str, options: Sequence[str], *, source: str = "checkpoint") -> Path:
    """`nmconvert prune` with other options."""
    file = setting.graph if source == "graph" else setting.checkpoint
    out = setting.out(f"nmconvert.{name}", file.suffix.removeprefix("."))
    model = () if source == "graph" else ("--model", setting.model)
    command: list[str | Path] = [sys.executable, "-m", "nmconvert", "prune", file, "--nm", str(setting.pattern)]
    command += ["--output", out, "--quiet"]
    subprocess.run([*command, *model, *(o.replace("IMAGES", str(setting.images)) for o in options)], check=True)
    return out


def by_modelopt(setting: Setting, mode: str) -> Path:
    """ModelOpt, which knows 2:4 only."""
    out = setting.out(f"modelopt.{mode}", "pt")
    python = environment(setting.work, "modelopt")
    command: list[str | Path] = [python, "-W", "ignore", HERE / "peer_modelopt.py", mode]
    command += [MODELS, setting.network, setting.checkpoint, setting.samples, out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def by_onnxsim(setting: Setting, method: str, kept: Sequence[str] = ()) -> Path:
    """onnxsim, with some weights put back."""
    out = setting.out(f"onnxsim.{method}.{len(kept)}", "onnx")
    python = environment(setting.work, "onnxsim")
    command: list[str | Path] = [python, HERE / "peer_onnxsim.py", method, str(setting.pattern)]
    command += [setting.graph, setting.samples, out, *kept]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def by_formula(setting: Setting) -> Path:
    """The reference's mask: in every group of m along the input channels the m − n lowest |w| of an argsort are zeroed."""
    state = torch.load(setting.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    n, m = setting.pattern.n, setting.pattern.m
    for name, weight in state.items():
        if weight.dim() == 4 and name not in KEPT:
            last = weight.permute(0, 2, 3, 1)
            groups = last.reshape(-1, m)
            mask = torch.ones_like(groups).scatter_(1, groups.abs().argsort(dim=1)[:, : m - n], 0.0)
            state[name] = (groups * mask).reshape(last.shape).permute(0, 3, 1, 2).contiguous()
    out = setting.out("formula", "pt")
    torch.save(state, out)
    return out


METHODS: dict[str, Method] = {
    "dense": lambda setting: setting.checkpoint,
    "dense, ONNX": lambda setting: setting.graph,
    "reference formula": by_formula,
    "ModelOpt sparse_magnitude": partial(by_modelopt, mode="sparse_magnitude"),
    "ModelOpt sparsegpt": partial(by_modelopt, mode="sparsegpt"),
    **{f"onnxsim {m}": partial(by_onnxsim, method=m) for m in ("magnitude", "wanda", "sparsegpt")},
    **{
        f"onnxsim {m}, stem and classifier put back": partial(by_onnxsim, method=m, kept=KEPT)
        for m in ("magnitude", "wanda", "sparsegpt")
    },
    "nmconvert, no data": partial(by_nmconvert, name="magnitude", options=()),
    "nmconvert": partial(by_nmconvert, name="channel", options=("--calib", "IMAGES")),
    "nmconvert, kernel axis": partial(by_nmconvert, name="kernel", options=("--calib", "IMAGES", "--axis", "kernel")),
    "nmconvert, from the ONNX file": partial(by_nmconvert, name="onnx", options=("--calib", "IMAGES"), source="graph"),
}


def prepare(setting: Setting) -> None:
    """Write the samples in both forms, and the dense ONNX file."""
    with np.load(setting.work / "cifar10.npz") as stored:
        images = stored["train_images"][:512]
    np.savez(setting.images, train_images=images)
    task = build_task("classification")
    dataset = task.dataset(str(setting.images), split="train", augment=False)
    samples = task.collate([dataset[i] for i in range(512)]).inputs
    np.save(setting.samples, samples.numpy())
    model = build(setting.model, {}, trust=False)
    fill(model, open_checkpoint(setting.checkpoint))
    batch = torch.export.Dim("batch")
    exported = torch.onnx.export(model.eval(), (samples[:2],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert exported is not None
    exported.save(setting.graph)


def structure(file: Path, pattern: Pattern) -> tuple[str, list[str]]:
    """Along which axes all weights with zeros satisfy ``pattern``, and the weights without."""
    checkpoint, holds, dense = open_checkpoint(file), dict.fromkeys(AXES, True), []
    for info in checkpoint.tensors():
        if len(info.shape) < 2 or (checkpoint.format == "ONNX" and info.kind is None):  # a constant that is no weight
            continue
        known = replace(info, kind=info.kind or guess_kind(info.name, info.shape))
        weight = checkpoint.read(info.name)
        if (weight == 0).float().mean() < 0.05:
            dense.append(info.name)
        else:
            for axis in AXES:
                holds[axis] &= satisfies(known.view(axis).to_matrix(weight).numpy(), pattern)
    return " and ".join(axis for axis in AXES if holds[axis]) or "neither", dense


def row(name: str, setting: Setting) -> list[str]:
    """One line of the table."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    file = METHODS[name](setting)
    after = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    seconds = sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))
    model = None if file.suffix == ".onnx" else setting.model
    data = str(setting.work / "cifar10.npz")
    top1 = evaluate(file, build_task("classification"), data, model=model, batch_size=500).metrics["top1"]
    if name.startswith("dense"):
        return [name, "", f"{top1:.2f}", "", "all"]
    axes, dense = structure(file, setting.pattern)
    return [name, axes, f"{top1:.2f}", f"{seconds:.1f}", ", ".join(dense) or "nothing"]


def main() -> None:
    """Print the table, a line as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder with cifar10.npz; environments and results go there")
    parser.add_argument("--network", choices=CHECKPOINTS, default="resnet20")
    parser.add_argument("--nm", type=Pattern.parse, default=Pattern(2, 4), metavar="N:M")
    parser.add_argument("--only", default="", help="the methods whose names hold this")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    setting = Setting(asked.work.resolve(), asked.network, asked.nm)
    for name in ENVIRONMENTS:
        environment(setting.work, name)
    prepare(setting)
    print(f"| method, {setting.network} {setting.pattern} | holds along | top-1 | cpu s | left dense |\n|---|---|---|---|---|")
    for name in METHODS:
        if asked.only not in name:
            continue
        if name.startswith("ModelOpt") and setting.pattern != Pattern(2, 4):
            print(f"| {name} | | | | does not know {setting.pattern} |", flush=True)
        else:
            print(f"| {' | '.join(row(name, setting))} |", flush=True)


if __name__ == "__main__":
    main()
