"""The checkpoints that other people published, through the whole line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from onnx_models import op_types, random_input, session
from PIL import Image

from nmconvert.checkpoint import open_checkpoint
from nmconvert.evaluate import evaluate
from nmconvert.export import export
from nmconvert.inputs import InputSpec
from nmconvert.inspect import inspect
from nmconvert.pattern import AXES, Axis, Pattern
from nmconvert.prune import prune
from nmconvert.tasks import build_task
from nmconvert.verify import verify

# Name → tensors that 2:4 along the channels prunes, and one that stays dense with the start of its reason.
CHECKPOINTS: dict[str, tuple[int, str, str]] = {
    "resnet20-12fca82f.th": (18, "linear.weight", "the output layer"),
    "resnet32-d509ac18.th": (30, "linear.weight", "the output layer"),
    "resnet56-4bfd9763.th": (54, "linear.weight", "the output layer"),
    "fastestdet_coco_ap05_0.2532.pth": (39, "backbone.stage2.0.branch_main.3.weight", "depthwise"),
    "fastestdet_coco.onnx": (39, "", ""),
    "stories260K.pt": (35, "tok_embeddings.weight", "an embedding"),
}
RESNET = f"{ROOT}/sample_models/resnet.py:resnet20"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prune_and_inspect(name: str, data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "checkpoints" / name
    expected, dense, why = CHECKPOINTS[name]
    result = prune(source, Pattern(2, 4), output=tmp_path / name)
    reasons = {row.name: row.reason for row in result.plan.rows}
    assert len(result.plan.pruned) == expected, [row.name for row in result.plan.pruned]
    assert (reasons.get(dense) or "").startswith(why)
    inspection = inspect(result.output, require=Pattern(2, 4))
    assert not inspection.failing
    promised = {found.name for found in inspection.tensors if found.promised}
    assert promised == {row.name for row in result.plan.pruned}
    assert not verify(result.output).failed
    before, after = open_checkpoint(source), open_checkpoint(result.output)
    assert [info.name for info in before.tensors()] == [info.name for info in after.tensors()]
    for info in before.tensors():
        old, new = before.read(info.name), after.read(info.name)
        kept = new != 0 if info.name in promised else torch.ones_like(new, dtype=torch.bool)
        assert torch.equal(old[kept], new[kept])
    if not name.endswith(".onnx"):
        torch.load(result.output, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("axis", AXES)
def test_fastestdet_packed_gives_the_outputs_of_the_zeros_bit_for_bit(
    pattern: str, axis: Axis, data_dir: Path, tmp_path: Path
) -> None:
    source = data_dir / "checkpoints" / "fastestdet_coco.onnx"
    pruned = prune(source, Pattern.parse(pattern), axis, output=tmp_path / "pruned.onnx")
    packed = export(pruned.output, output=tmp_path / "packed.onnx")
    assert len(packed.compressed.layers) == len(pruned.plan.pruned)
    x = np.abs(random_input((1, 3, 352, 352)))
    files: dict[str, Any] = {}
    for path in (pruned.output, packed.output):
        opened = session(path, optimized=tmp_path / "optimized.onnx")
        files[path.name] = opened.run(None, {opened.get_inputs()[0].name: x}), op_types(tmp_path / "optimized.onnx")
    for dense, found in zip(files["pruned.onnx"][0], files["packed.onnx"][0], strict=True):
        assert found.tobytes() == dense.tobytes()
    # At the higher opset onnxruntime fuses pairs of Gather into Split; all else is the same.
    operators = [[op for op in found if op not in ("Gather", "Split", "Squeeze", "Transpose")] for _, found in files.values()]
    assert operators[0] == operators[1]
    assert not verify(packed.output, pruned.output).failed


def _cifar10_test(data_dir: Path, out: Path) -> None:
    """The 10,000 test images: lossless tiles of 25 × 25 images, in the order of the labels."""
    files = sorted((data_dir / "cifar10" / "test").glob("*.webp"))
    tiles = [np.asarray(Image.open(file).convert("RGB")).reshape(25, 32, 25, 32, 3) for file in files]
    images = np.concatenate([tile.swapaxes(1, 2).reshape(-1, 32, 32, 3) for tile in tiles])
    np.savez(out, val_images=images, val_labels=np.load(data_dir / "cifar10" / "labels_test.npy"))


@pytest.mark.timeout(900)  # a minute on an idle core, and five nets on 10,000 images on a busy one
def test_resnet20_top1_of_the_checkpoint_the_pruned_one_and_the_onnx_file(data_dir: Path, tmp_path: Path) -> None:
    """The dense net as published (91.73); 2:4 without fine-tuning as plain code gave it; the ONNX file like its checkpoint."""
    source = data_dir / "checkpoints" / "resnet20-12fca82f.th"
    _cifar10_test(data_dir, tmp_path / "cifar10.npz")
    task = build_task("classification", {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"})

    def top1(file: Path) -> float:
        measured = evaluate(file, task, str(tmp_path / "cifar10.npz"), model=RESNET, batch_size=250)
        assert measured.samples == 10_000
        return measured.metrics["top1"]

    assert top1(source) == pytest.approx(91.73, abs=0.005)
    for axis, expected in (("channel", 71.23), ("kernel", 46.76)):
        pruned = prune(source, Pattern(2, 4), axis, output=tmp_path / f"{axis}.th", settings={"model": RESNET})
        found = top1(pruned.output)
        assert found == pytest.approx(expected, abs=0.005)
        packed = export(pruned.output, inputs=[InputSpec(None, (1, 3, 32, 32))])
        assert top1(packed.output) == found


def test_fastestdet_onnx_is_opened_as_what_it_is(data_dir: Path) -> None:
    path = data_dir / "checkpoints" / "fastestdet_coco.onnx"
    assert open_checkpoint(path).format == "ONNX"
    convolutions = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    kinds = [info.kind for info in open_checkpoint(path).tensors() if info.kind]
    assert kinds == ["conv"] * len(convolutions) == ["conv"] * 70
