"""Hugging Face folders: transformers saves them, we copy them, transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from containers import MANIFEST, halve_largest, names, sha256, weights
from safetensors.torch import save_file

from nmconvert.checkpoint import open_checkpoint
from nmconvert.errors import CheckpointError, UntrustedFileError

transformers = pytest.importorskip("transformers")


def tiny(*, tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def sharded(folder: Path) -> Path:
    tiny(tied=False).save_pretrained(folder, max_shard_size="40KB")
    return folder


def single(folder: Path) -> Path:
    tiny().save_pretrained(folder)
    return folder


def pickled(folder: Path) -> Path:
    """pytorch_model.bin with an index, as transformers wrote it before version 5."""
    model = tiny()
    model.config.save_pretrained(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    names = list(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[:10], "pytorch_model-00002-of-00002.bin": names[10:]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("make", [sharded, single, pickled])
def test_round_trip(tmp_path: Path, make: Any) -> None:
    source, target = make(tmp_path / "a") if make is not pickled else make_folder(tmp_path / "a"), tmp_path / "b"
    (source / "tokenizer.json").write_text("{}")
    (source / "nested").mkdir()
    (source / "nested" / "config.json").write_text("[]")
    checkpoint = open_checkpoint(source)
    assert checkpoint.format == "Hugging Face folder"
    before = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    chosen = weights(checkpoint)
    assert len(chosen) >= 10
    for name in chosen:
        assert torch.equal(checkpoint.read(name), before[name])
    checkpoint.write_copy(target, dict.fromkeys(chosen, halve_largest), lambda: MANIFEST)
    files = {str(path.relative_to(source)) for path in source.rglob("*")}
    ours = {str(path.relative_to(target)) for path in target.rglob("*")}
    assert ours - files == (set() if make is single else {"nmconvert.json"})
    assert files <= ours
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in loaded.state_dict().items():
        origin = "transformer.wte.weight" if name == "lm_head.weight" and make is not sharded else name
        assert torch.equal(tensor, halve_largest(before[name]) if origin in chosen else before[name]), name
    assert open_checkpoint(target).manifest_text() == MANIFEST
    assert checkpoint.manifest_text() is None


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return pickled(folder)


def test_manifest_is_replaced_by_the_next_copy(tmp_path: Path) -> None:
    for make in (sharded, single):
        first, second = tmp_path / f"{make.__name__}1", tmp_path / f"{make.__name__}2"
        open_checkpoint(make(tmp_path / make.__name__)).write_copy(first, {}, lambda: "old")
        open_checkpoint(first).write_copy(second, {}, lambda: MANIFEST)
        assert open_checkpoint(second).manifest_text() == MANIFEST


def test_weights_of_other_frameworks_stay_behind(tmp_path: Path) -> None:
    source = single(tmp_path / "a")
    (source / "onnx").mkdir()
    kept = ("README.md", "1_Dense.safetensors.txt", "training_args.bin", "onnx/config.json")
    dropped = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "model.fp16.safetensors")
    for name in (*kept, *dropped):
        (source / name).write_text("x")
    open_checkpoint(source).write_copy(tmp_path / "b", {}, lambda: MANIFEST)
    assert [name for name in kept if not (tmp_path / "b" / name).is_file()] == []
    assert [name for name in dropped if (tmp_path / "b" / name).exists()] == []


def test_folder_of_the_hub_cache_is_made_of_links(tmp_path: Path) -> None:
    real = single(tmp_path / "blobs")
    source = tmp_path / "snapshot"
    source.mkdir()
    for file in real.iterdir():
        (source / file.name).symlink_to(file)
    open_checkpoint(source).write_copy(tmp_path / "b", {}, lambda: MANIFEST)
    assert not any(path.is_symlink() for path in (tmp_path / "b").iterdir())
    assert (tmp_path / "b" / "config.json").read_bytes() == (real / "config.json").read_bytes()


def test_an_earlier_result_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    source = sharded(tmp_path / "a")
    checkpoint = open_checkpoint(source)
    (tmp_path / "empty").mkdir()
    checkpoint.write_copy(tmp_path / "empty", {}, lambda: "1")
    checkpoint.write_copy(tmp_path / "empty", {}, lambda: "2")
    assert open_checkpoint(tmp_path / "empty").manifest_text() == "2"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for taken in (tmp_path / "home", source):
        with pytest.raises(CheckpointError, match="exists and was not written by nmconvert; give another name"):
            checkpoint.write_copy(taken, {}, lambda: "3")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == ["a", "empty", "home"]


def test_an_edit_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = sharded(tmp_path / "a")
    digests = {path: sha256(path) for path in source.iterdir()}
    checkpoint = open_checkpoint(source)

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_copy(tmp_path / "b", {weights(checkpoint)[-1]: fail}, lambda: MANIFEST)
    assert names(tmp_path) == ["a"]
    assert {path: sha256(path) for path in source.iterdir()} == digests


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a folder without model.safetensors.*name the weight file itself"):
        open_checkpoint(tmp_path)


def test_shards_without_their_index(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"w{number}": torch.zeros(2)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has shards \(model-00001-of-00002.safetensors …\), and no model.safetensors.index"
    ):
        open_checkpoint(tmp_path)


def index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../a/secret.safetensors", "/etc/passwd", "missing.safetensors", "", 3])
def test_index_that_leads_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    source = sharded(tmp_path / "a")
    table = json.loads(index(source).read_text())
    first = next(iter(table["weight_map"]))
    table["weight_map"][first] = name
    (source / "secret.safetensors").write_bytes(b"x")
    index(source).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="is not in the folder; copy it there"):
        open_checkpoint(source)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"w": null}}', "{" * 50000])
def test_broken_index(tmp_path: Path, text: str) -> None:
    source = sharded(tmp_path / "a")
    index(source).write_text(text)
    with pytest.raises(CheckpointError):
        open_checkpoint(source)


def test_index_that_names_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    source = sharded(tmp_path / "a")
    table = json.loads(index(source).read_text())
    table["weight_map"]["ghost"] = next(iter(table["weight_map"].values()))
    index(source).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="'ghost' is not in model-"):
        open_checkpoint(source)


def test_pickled_shard_needs_trust(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "a")
    (source / "pytorch_model.bin.index.json").unlink()
    torch.save(torch.nn.Linear(2, 2), source / "pytorch_model.bin")
    with pytest.raises(UntrustedFileError, match=r"pytorch_model.bin: holds pickled Python objects"):
        open_checkpoint(source)
