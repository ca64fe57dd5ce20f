"""The modules of the published checkpoints, and the real data in our formats: they have the figures that its README gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nmconvert.evaluate import evaluate
from nmconvert.model import load
from nmconvert.onnx_model import OnnxModel
from nmconvert.tasks import build_task

pytest.importorskip("PIL")
from benchmarks import data as real
from benchmarks.models.fastestdet import suppressed
from benchmarks.models.g2p import edits, g2p, measure
from benchmarks.models.llama import Past, stories260k

MODELS = Path(__file__).parent.parent / "benchmarks" / "models"


@pytest.fixture
def folder(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(real, "ROOT", data_dir)
    return tmp_path


def test_fastestdet_is_its_onnx_file(data_dir: Path) -> None:
    file = data_dir / "checkpoints" / "fastestdet_coco_ap05_0.2532.pth"
    model = load(f"{MODELS / 'fastestdet.py'}:fastestdet", file)
    pixels = torch.rand(1, 3, 352, 352, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model.maps(pixels)
    ours = torch.cat([maps["logits"].sigmoid(), maps["box"], maps["classes"].softmax(1)], 1)
    theirs = OnnxModel(data_dir / "checkpoints" / "fastestdet_coco.onnx")(pixels)
    assert (ours - theirs).abs().max() < 5e-5


def test_suppression_keeps_the_best_of_each_label() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 9, 9]])
    scores, labels = torch.tensor([0.8, 0.9, 0.7, 0.2, 0.0005]), torch.tensor([1, 1, 2, 1, 3])
    assert suppressed(boxes, scores, labels).tolist() == [1, 2, 3]


def test_stories260k_has_its_loss(folder: Path, data_dir: Path) -> None:
    real.tinystories(folder / "tinystories")
    task = build_task("language_model", {"block": "512"})
    model = f"{MODELS / 'llama.py'}:stories260k"
    file = data_dir / "checkpoints" / "stories260K.pt"
    result = evaluate(file, task, str(folder / "tinystories" / "test.npz"), model=model, batch_size=16)
    assert result.metrics["loss"] == pytest.approx(1.461, abs=1e-3)


def test_stories_are_told_token_by_token_as_at_once() -> None:
    model = stories260k().eval()
    ids = torch.randint(512, (2, 70), generator=torch.Generator().manual_seed(0))
    past = [Past() for _ in model.layers]
    with torch.no_grad():
        one_by_one = torch.cat([model(ids[:, i : i + 1], past) for i in range(70)], 1)
        torch.testing.assert_close(one_by_one, model(ids))


def test_g2p_has_its_accuracy(folder: Path) -> None:
    real.g2p(folder)
    model = g2p()
    model.load_state_dict(torch.load(folder / "g2p.pt", weights_only=True))
    assert measure(model.eval(), folder) == pytest.approx({"word_accuracy": 68.0, "phoneme_error_rate": 9.62}, abs=0.006)


def test_edits_are_levenshteins() -> None:
    assert edits([*"kitten"], [*"sitting"]) == 3
    assert edits([], ["a", "b"]) == edits(["a", "b"], []) == 2


def test_boxes_and_masks_are_all_there(folder: Path) -> None:
    counts = {}
    for make, parts in ((real.coco128, ("val", "val_masks")), (real.bccd, ("train", "val", "test"))):
        make(folder / make.__name__)
        for part in parts:
            content = json.loads((folder / make.__name__ / f"{part}.json").read_text())
            counts[make.__name__, part] = (len(content["images"]), len(content["annotations"]))
    assert counts["coco128", "val"] == (128, 898)
    assert counts["coco128", "val_masks"][0] == 100
    assert [counts["bccd", part][0] for part in ("train", "val", "test")] == [205, 87, 72]
    assert sum(counts["bccd", part][1] for part in ("train", "val", "test")) == 4886
