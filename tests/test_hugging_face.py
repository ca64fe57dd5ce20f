"""Folders of Hugging Face transformers from end to end, where version 5 names and merges weights otherwise than their files."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from nmconvert import Pattern, hugging_face
from nmconvert.checkpoint import open_checkpoint
from nmconvert.cli import group
from nmconvert.cli.calibration import CalibrationData
from nmconvert.detect import satisfies
from nmconvert.errors import UsageError
from nmconvert.manifest import Manifest
from nmconvert.model import build, fill, load, matched_names
from nmconvert.prune import plan_for, prune

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "once upon a time there was a little fox that jumped over a lazy dog and ran away from it\n" * 40
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0}


def made(kind: str) -> torch.nn.Module:
    """A small model with random weights."""
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1, num_labels=4)
        return transformers.ViTForImageClassification(config)
    if kind == "swin":
        shape = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
        return transformers.SwinForImageClassification(transformers.SwinConfig(**shape, num_labels=4))
    if kind == "yolos":
        shape = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 5, "num_labels": 4}
        return transformers.YolosForObjectDetection(transformers.YolosConfig(**SMALL, **shape))
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SMALL, **WORDS, num_key_value_heads=2, num_local_experts=4)
        return transformers.MixtralForCausalLM(config)
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **WORDS))


def folder_of(kind: str, place: Path) -> Path:
    """Its folder, with a tokenizer, in which id 0 is for padding."""
    made(kind).save_pretrained(place / kind)
    words = ["<pad>", "<s>", "</s>", *sorted(set(TEXT.split()))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(place / kind / "tokenizer.json"))
    return place / kind


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(group, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def texts(place: Path) -> Path:
    (place / "train.txt").write_text(TEXT)
    (place / "val.txt").write_text(TEXT)
    return place


def pruned(folder: Path) -> list[str]:
    """The sparse weights of a folder, which all keep what they say."""
    checkpoint = open_checkpoint(folder)
    manifest = Manifest.of(checkpoint)
    assert manifest is not None
    for layer in manifest.layers:
        matrix = layer.row.view.to_matrix(checkpoint.read(layer.name).numpy())
        assert satisfies(matrix, layer.pattern)
    return [layer.name for layer in manifest.layers]


@pytest.mark.parametrize("kind", ["vit", "swin", "mixtral", "gpt2", "t5"])
def test_with_its_module_as_much_is_pruned_as_by_names(tmp_path: Path, kind: str) -> None:
    folder = folder_of(kind, tmp_path)
    module, checkpoint = build(str(folder)), open_checkpoint(folder)
    by_names = {row.name for row in plan_for(checkpoint, Pattern(2, 4), "channel").pruned}
    by_module = {row.name for row in plan_for(checkpoint, Pattern(2, 4), "channel", module).pruned}
    assert by_module == by_names
    assert by_module


@pytest.mark.parametrize("kind", ["vit", "swin", "mixtral", "gpt2", "t5"])
def test_a_module_is_filled_from_its_folder(tmp_path: Path, kind: str) -> None:
    folder = folder_of(kind, tmp_path)
    module, whole = build(str(folder)), load(str(folder), folder)
    fill(module, open_checkpoint(folder))
    for name, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["vit", "swin", "gpt2", "t5"])
def test_names_are_those_under_which_transformers_loads(tmp_path: Path, kind: str) -> None:
    """A weight of the file is the parameter that its name is matched with, value by value."""
    folder = folder_of(kind, tmp_path)
    checkpoint, module = open_checkpoint(folder), load(str(folder), folder)
    names = matched_names([info.name for info in checkpoint.tensors()], module)
    for theirs, own in names.items():
        assert torch.equal(checkpoint.read(theirs), module.state_dict()[own]), theirs


def test_a_part_of_a_larger_parameter_keeps_its_name(tmp_path: Path) -> None:
    folder = folder_of("mixtral", tmp_path)
    checkpoint, module = open_checkpoint(folder), load(str(folder), folder)
    names = matched_names([info.name for info in checkpoint.tensors()], module)
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert all(names[name] == name for name in experts)
    assert {own for name, own in names.items() if name not in experts} <= set(module.state_dict())


@pytest.mark.parametrize("kind", ["vit", "mixtral"])
def test_exporting(tmp_path: Path, kind: str) -> None:
    """With a free batch, experts included, and with the plan's reasons for what is dense."""
    folder = folder_of(kind, tmp_path)
    prune(folder, Pattern(2, 4), output=tmp_path / "sparse")
    given = "1,1,8,8" if kind == "vit" else "input_ids=1,8:int64"
    told = " ".join(invoke("export", tmp_path / "sparse", "--onnx", "--input", given, "-o", tmp_path / "a.onnx").split())
    assert f"{'classifier' if kind == 'vit' else 'lm_head'}.weight: dense, the output layer" in told
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(3, 1, 8, 8) if kind == "vit" else torch.randint(0, 64, (3, 8))
    with torch.no_grad():
        expected = load("", tmp_path / "sparse")(x).logits
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], expected, rtol=1e-3, atol=1e-4)


def test_fine_tuning_a_vision_transformer(tmp_path: Path) -> None:
    folder = folder_of("vit", tmp_path)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (48, 8, 8), dtype=np.uint8), rng.integers(0, 4, 48)
    arrays = {"train_images": images[:32], "train_labels": labels[:32], "val_images": images[32:], "val_labels": labels[32:]}
    np.savez(tmp_path / "data.npz", **arrays)
    prune(folder, Pattern(2, 4), output=tmp_path / "sparse", model=build(str(folder)))
    how = ("--task-arg", "size=8", "--task-arg", "crop=0", "--task-arg", "flip=false", "--mean", "0.5", "--std", "0.5")
    invoke("finetune", tmp_path / "sparse", "--data", tmp_path / "data.npz", "--epochs", 1, "--batch", 16, *how, "--quiet")
    assert pruned(tmp_path / "sparse.ft") == pruned(tmp_path / "sparse")
    before, after = (load(str(f), f).state_dict() for f in (tmp_path / "sparse", tmp_path / "sparse.ft"))
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    own = matched_names([name], load(str(folder), folder))[name]
    assert not torch.equal(before[own], after[own])


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """By magnitude its experts are pruned, too; with calibration they stay dense and say so; trained they cannot be."""
    folder, data = folder_of("mixtral", tmp_path), texts(tmp_path)
    invoke("prune", folder, "--nm", "2:4", "--model", folder, "-o", tmp_path / "magnitude", "--quiet")
    assert len([name for name in pruned(tmp_path / "magnitude") if ".experts." in name]) == 24
    how = ("--task", "language_model", "--task-arg", "block=16")
    told = invoke("prune", folder, "--nm", "2:4", "--calib", data, *how, "--samples", 16, "-o", tmp_path / "solved")
    assert "part of a larger parameter of the model, which is not calibrated; pruned without --calib" in " ".join(told.split())
    assert len(pruned(tmp_path / "solved")) == 8  # of attention
    found = invoke("sensitivity", folder, "--nm", "2:4", "--calib", data, *how, "--samples", 16)
    assert "self_attn.q_proj.weight" in found
    assert ".experts." not in found
    with pytest.raises(UsageError, match=r"experts\.\d\.w\d\.weight' is part of a larger parameter.*--exclude '\*experts\*'"):
        invoke("finetune", tmp_path / "magnitude", "--data", data, *how, "--quiet")


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_calibration_reads_what_the_model_reads(tmp_path: Path, kind: str) -> None:
    """With the folder's tokenizer, without caches, and with what a decoder reads; it ends nearer to dense than magnitude."""
    folder, data = folder_of(kind, tmp_path), texts(tmp_path)
    (tmp_path / "train.en").write_text(TEXT)
    how = ("--task", "language_model", "--task-arg", "block=16") if kind == "gpt2" else ("--task", "translation")
    errors = []
    samples = CalibrationData(str(data), how[1], {"block": "16"} if kind == "gpt2" else {}, 32, 8, seed=0)
    batches = samples.batches(folder, None, lambda: load(str(folder), folder))
    for name, more in (("magnitude", ()), ("solved", ("--calib", data, *how, "--samples", 32, "--batch-size", 8))):
        invoke("prune", folder, "--nm", "1:4", *more, "-o", tmp_path / name, "--quiet")
        dense, sparse = (load(str(f), f) for f in (folder, tmp_path / name))
        with torch.no_grad():
            said = [model(**batches[0]) if kind == "t5" else model(batches[0]) for model in (dense, sparse)]
        errors.append(float((said[0].logits - said[1].logits).square().mean()))
    assert errors[1] < 0.8 * errors[0]
    assert pruned(tmp_path / "solved")


def test_calibrating_a_detector(tmp_path: Path) -> None:
    """Its images are one tensor, normalised, with a mask, and not a list as torchvision's take them."""
    folder, rng = folder_of("yolos", tmp_path), np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images = []
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 32, "height": 32})
    (tmp_path / "train.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]})
    )
    model = build(str(folder))
    samples = CalibrationData(str(tmp_path), "detection", {}, 4, 2, seed=0)
    batch = samples.batches(folder, model, lambda: pytest.fail("not asked"))[0]
    assert {name: list(value.shape) for name, value in batch.items()} == {
        "pixel_values": [2, 3, 32, 32], "pixel_mask": [2, 32, 32]
    }  # fmt: skip
    invoke("prune", folder, "--nm", "2:4", "--calib", tmp_path, "--task", "detection", "-o", tmp_path / "solved", "--quiet")
    assert len(pruned(tmp_path / "solved")) == 2 * 6 + 6  # of attention and MLPs, and in the two heads


def test_batches_are_of_the_folders_tokenizer_and_its_decoder(tmp_path: Path) -> None:
    folder, data = folder_of("t5", tmp_path), texts(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"decoder_start_token_id": 0', '"decoder_start_token_id": 5'))
    (tmp_path / "train.en").write_text("a fox ran\n" * 9)
    (tmp_path / "train.de").write_text("a dog\n" * 9)

    def batches(count: int) -> list[dict[str, torch.Tensor]]:
        samples = CalibrationData(str(data), "translation", {}, count, 4, seed=0)
        return samples.batches(folder, None, lambda: pytest.fail("not asked"))

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("a dog").ids
    assert batches(9)[0]["decoder_input_ids"].tolist() == [[5, *ids]] * 4
    assert batches(9)[0]["input_ids"].tolist() == [[*tokenizer.encode("a fox ran").ids, 2]] * 4
    assert [len(batch["input_ids"]) for batch in batches(9)] == [4, 4, 1]
    assert [len(batch["input_ids"]) for batch in batches(3)] == [1, 1, 1]  # one batch would leave none to hold out
    (tmp_path / "train.de").unlink()
    asked = []

    def dense() -> torch.nn.Module:
        asked.append(load(str(folder), folder))
        return asked[-1]

    found = CalibrationData(str(data), "translation", {"max_length": "6"}, 4, 2, seed=0).batches(folder, None, dense)
    assert asked
    assert found[0]["decoder_input_ids"][0, 0] == 5


def test_caches_are_left_out() -> None:
    model = made("gpt2").eval()
    ids = torch.ones(1, 4, dtype=torch.long)
    assert model(ids).past_key_values is not None
    hugging_face.without_caches(model)
    assert model(ids).past_key_values is None
    plain = torch.nn.Linear(2, 2)
    hugging_face.without_caches(plain)
    assert not hugging_face.is_model(plain)
    assert hugging_face.is_model(model)
