"""The sample models of detection, segmentation, translation and language modelling are what they say, and pruning hurts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nmconvert.errors import DataError
from nmconvert.evaluate import evaluate
from nmconvert.export import export
from nmconvert.inputs import InputSpec
from nmconvert.model import build, load
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.tasks import Task, build_task

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("pycocotools")
pytest.importorskip("tokenizers")
pytest.importorskip("sacrebleu")

from sample_models import digit_scenes, sentences, stdlib_text
from sample_models.train_text import tokenizer

ROOT = Path(__file__).parent.parent / "sample_models"
TASKS = {"detector": "detection", "segmenter": "segmentation", "translator": "translation", "gpt": "language_model"}
SETTINGS = {"translator": {"tokenizer": str(ROOT / "tokenizer.json"), "max_length": "63"}, "gpt": {"block": "128"}}
LIMIT = 40  # samples: enough to see the difference, and soon done
AT_LEAST = {"detector": 65.0, "segmenter": 55.0, "translator": 95.0}
AT_MOST = {"gpt": 9.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    digit_scenes.write(folder / "scenes")
    sentences.write(folder / "sentences")
    stdlib_text.write(folder / "text")
    return {
        "detector": folder / "scenes",
        "segmenter": folder / "scenes",
        "translator": folder / "sentences",
        "gpt": folder / "text",
    }


def task_of(name: str) -> Task:
    return build_task(TASKS[name], SETTINGS.get(name, {}))


def spec(name: str) -> str:
    return f"{ROOT / name}.py:{name}"


def measured(name: str, file: Path, data: dict[str, Path], limit: int = LIMIT) -> float:
    task = task_of(name)
    return evaluate(file, task, str(data[name]), model=spec(name), limit=limit, batch_size=20).metrics[task.metric]


@pytest.mark.parametrize("name", TASKS)
def test_the_checkpoint_is_good_small_and_hurt_by_pruning(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    file = ROOT / f"{name}.pt"
    assert file.stat().st_size < 2_000_000
    dense = measured(name, file, data)
    said = torch.load(file, weights_only=True)[task_of(name).metric]
    assert dense == pytest.approx(said, rel=0.15)  # said of all samples, measured on some
    pruned = prune(file, Pattern(1, 4), "channel", output=tmp_path / "p.pt", model=build(spec(name)))
    after = measured(name, pruned.output, data)
    if task_of(name).higher_is_better:
        assert dense > AT_LEAST[name]
        assert after < 0.5 * dense
    else:
        assert dense < AT_MOST[name]
        assert after > 1.5 * dense


INPUTS = {  # the detector's are the segmenter's
    "segmenter": (["images=2,3,64,64"], {0: "batch"}),
    "translator": (
        ["input_ids=2,9:int64", "attention_mask=2,9:int64", "decoder_input_ids=2,7:int64"],
        {0: "batch", 1: "length"},
    ),
    "gpt": (["input_ids=2,16:int64"], {0: "batch", 1: "length"}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_its_onnx_file_is_measured_alike(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    pruned = prune(ROOT / f"{name}.pt", Pattern(2, 4), "channel", output=tmp_path / "p.pt", model=build(spec(name)))
    inputs, dynamic = INPUTS[name]
    written = export(
        pruned.output,
        output=tmp_path / "p.onnx",
        model=spec(name),
        inputs=[InputSpec.parse(i) for i in inputs],
        dynamic=dynamic,
    )
    module, graph = (measured(name, file, data, 12) for file in (pruned.output, written.output))
    assert graph == pytest.approx(module, rel=1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_loss_and_distillation_lead_back(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    """A few steps of each on one batch, from the pruned model, make that very loss smaller."""
    task, file = task_of(name), ROOT / f"{name}.pt"
    pruned = prune(file, Pattern(1, 4), "channel", output=tmp_path / "p.pt", model=build(spec(name)))
    teacher = load(spec(name), file)
    samples = task.dataset(str(data[name]), split="train", augment=True)
    batch = task.collate([samples[i] for i in range(4)])
    for loss_of in (task.loss, lambda model, batch: task.distill(model, teacher, batch)):
        model = load(spec(name), pruned.output).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            losses.append(loss_of(model, batch))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]


def test_the_scenes_show_their_digits_within_their_masks(data: dict[str, Path]) -> None:
    scenes = build_task("segmentation").dataset(str(data["segmenter"]), split="val", augment=False)
    for number in range(20):
        scene = scenes[number]
        for box, mask in zip(scene.boxes.astype(int), scene.masks, strict=True):
            inside = mask[box[1] : box[3], box[0] : box[2]]
            assert inside.sum() == mask.sum()
            assert inside.any(0).all() or inside.any(1).all()
            ground = np.median(scene.image[scene.masks.max(0) == 0])
            assert scene.image[mask > 0].mean() > ground + 20


def test_german_has_its_cases_and_its_order() -> None:
    said = dict(sentences.pairs("train"))
    words = [german.split() for german in said.values()]
    assert all("weil" not in w or w[-2] in {"hat", *(v.split()[1] for v in sentences.VERBS.values())} for w in words)
    assert any("den Hund" in " ".join(w) for w in words)
    assert not any("der Hund hat der" in " ".join(w) for w in words)
    assert not set(said) & set(dict(sentences.pairs("val")))


def test_the_tokenizer_is_that_of_the_sentences() -> None:
    assert tokenizer().to_str(pretty=True).strip() == (ROOT / "tokenizer.json").read_text("utf-8").strip()


def test_data_of_another_task_is_said(data: dict[str, Path]) -> None:
    for name, other in (("detector", "gpt"), ("gpt", "detector"), ("translator", "gpt"), ("segmenter", "translator")):
        with pytest.raises(DataError, match=str(data[other])):
            measured(name, ROOT / f"{name}.pt", {name: data[other]})
    with pytest.raises(DataError, match="no images"):
        build_task("classification").dataset(str(data["gpt"]), split="test", augment=False)
