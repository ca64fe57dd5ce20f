"""Files that are programs: nothing in them runs, with trust or without, and without it one line says what they risk."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from containers import MANIFEST, Tied, edited_copy, halve_largest
from safetensors.torch import save_file
from torch import Tensor, nn

from nmconvert.checkpoint import open_checkpoint
from nmconvert.errors import CheckpointError, NmconvertError, UntrustedFileError
from nmconvert.manifest import Manifest

Maker = Callable[[Path], Path]


class Payload:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def crafted_zip(folder: Path) -> Path:
    torch.save({"state_dict": {"w": torch.ones(4, 4)}, "extra": Payload(folder / "marker")}, folder / "a.pt")
    return folder / "a.pt"


def crafted_legacy(folder: Path) -> Path:
    value = {"w": torch.ones(4, 4), "extra": Payload(folder / "marker")}
    torch.save(value, folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


def crafted_system_info(folder: Path) -> Path:
    """The payload in one of the small pickles before the state dict of the legacy format."""
    torch.save({"w": torch.ones(4, 4)}, folder / "a.pt", _use_new_zipfile_serialization=False)
    data = (folder / "a.pt").read_bytes()
    info = pickle.dumps({"protocol_version": 1001, "little_endian": True, "x": Payload(folder / "marker")}, protocol=2)
    begin = data.index(b"\x80\x02}")
    end = data.index(b"\x80\x02}", begin + 1)
    (folder / "a.pt").write_bytes(data[:begin] + info + data[end:])
    return folder / "a.pt"


def crafted_pickle(folder: Path) -> Path:
    (folder / "a.pt").write_bytes(pickle.dumps(Payload(folder / "marker")))
    return folder / "a.pt"


def crafted_program(folder: Path) -> Path:
    """A .pt2 whose weights are a pickle: torch.export.load runs it."""
    source = exported(folder)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(folder / "b.pt2", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("model_weights_config.json"):
                config = json.loads(data)
                for entry in config["config"].values():
                    entry["use_pickle"] = True
                data = json.dumps(config).encode()
            elif "/weights/weight_" in name or name.endswith("sample_inputs/model.pt"):
                torch.save(Payload(folder / "marker"), folder / "payload.pt")
                data = (folder / "payload.pt").read_bytes()
            new.writestr(name, data)
    return folder / "b.pt2"


def exported(folder: Path) -> Path:
    program = torch.export.export(Tied().eval(), (torch.randn(1, 4, 8, 8),))
    torch.export.save(program, folder / "a.pt2")
    return folder / "a.pt2"


def scripted(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Tied().eval(), torch.randn(1, 4, 8, 8)).save(folder / "a.ts")
    return folder / "a.ts"


def pickled_module(folder: Path) -> Path:
    torch.save(Tied(), folder / "a.pt")
    return folder / "a.pt"


def nested_module(folder: Path) -> Path:
    torch.save({"epoch": 1, "model": Tied(), "ema": None}, folder / "a.pt")
    return folder / "a.pt"


def legacy_module(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(Tied(), folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


CRAFTED = [crafted_zip, crafted_legacy, crafted_system_info, crafted_pickle, crafted_program]


def use_all(source: Path, target: Path, *, trust: bool) -> NmconvertError | None:
    """Read every tensor, and write a copy."""
    try:
        checkpoint = open_checkpoint(source, trust=trust)
        for info in checkpoint.tensors():
            checkpoint.read(info.name)
        checkpoint.write_copy(target, {}, lambda: MANIFEST)
    except NmconvertError as error:
        return error
    return None


@pytest.mark.parametrize("make", CRAFTED)
def test_a_crafted_file_executes_nothing(tmp_path: Path, make: Maker) -> None:
    source = make(tmp_path)
    for trust in (False, True):
        error = use_all(source, tmp_path / "copy", trust=trust)
        assert "\n" not in str(error)
        assert trust or isinstance(error, UntrustedFileError) or make is crafted_system_info
        assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("make", [crafted_zip, crafted_legacy, crafted_program])
def test_the_crafted_files_do_execute_elsewhere(tmp_path: Path, make: Maker) -> None:
    """Else the test above would prove nothing."""
    source = make(tmp_path)
    with contextlib.suppress(Exception):  # what it makes of the payload's result does not matter
        torch.export.load(source) if source.suffix == ".pt2" else torch.load(source, weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (exported, "an exported program"),
        (scripted, "a TorchScript archive"),
        (pickled_module, "pickled Python objects"),
        (nested_module, "pickled Python objects"),
        (legacy_module, "pickled Python objects"),
        (crafted_zip, r"pickled Python objects \(posix.mkdir\)"),
    ],
)
def test_without_trust_one_line_says_what_it_risks(tmp_path: Path, make: Maker, what: str) -> None:
    with pytest.raises(UntrustedFileError, match=f"{what}.*can run any program.*--trust only if") as caught:
        open_checkpoint(make(tmp_path))
    assert "\n" not in str(caught.value)


def load_exported(path: Path) -> dict[str, Tensor]:
    return dict(torch.export.load(path).state_dict)


def load_scripted(path: Path) -> dict[str, Tensor]:
    return dict(torch.jit.load(path).state_dict())


def load_pickled(path: Path) -> dict[str, Tensor]:
    value = torch.load(path, weights_only=False)
    module: nn.Module = value["model"] if isinstance(value, dict) else value
    return dict(module.state_dict())


@pytest.mark.parametrize(
    ("make", "load", "form"),
    [
        (exported, load_exported, "exported program"),
        (scripted, load_scripted, "TorchScript"),
        (pickled_module, load_pickled, "pickled module"),
        (nested_module, load_pickled, "pickled module"),
        (legacy_module, load_pickled, "pickled module"),
    ],
)
def test_trusted_formats_round_trip(tmp_path: Path, make: Maker, load: Callable[[Path], dict[str, Tensor]], form: str) -> None:
    torch.manual_seed(0)
    source = make(tmp_path)
    checkpoint = open_checkpoint(source, trust=True)
    before = load(source)
    assert checkpoint.format == form
    infos = {info.name: info for info in checkpoint.tensors()}
    assert set(infos) == set(before)
    assert infos["second.weight"].shared_with == "first.weight"
    for name, tensor in before.items():
        assert torch.equal(checkpoint.read(name), tensor)
    target = tmp_path / "copy.pt2"  # torch.export.load insists on the suffix
    names = edited_copy(source, target, trust=True)
    assert names == ["conv.weight", "first.weight"]
    after = load(target)
    for name, tensor in before.items():
        expected = halve_largest(tensor) if name in (*names, "second.weight") else tensor
        assert torch.equal(after[name], expected), name
    assert open_checkpoint(target, trust=True).manifest_text() == MANIFEST


def test_exported_program_still_computes(tmp_path: Path) -> None:
    source = exported(tmp_path)
    open_checkpoint(source, trust=True).write_copy(tmp_path / "b.pt2", {"first.bias": torch.zero_}, lambda: MANIFEST)
    x = torch.randn(1, 4, 8, 8)
    before, after = torch.export.load(source), torch.export.load(tmp_path / "b.pt2")
    model = Tied()
    model.load_state_dict(before.state_dict)
    model.first.bias.data.zero_()
    assert torch.equal(after.module()(x), model(x))


def test_exported_program_of_old_torch(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(CheckpointError, match=r"torch 2\.7 or older; export it again"):
        open_checkpoint(tmp_path / "a.pt2", trust=True)


def test_exported_program_with_a_lying_table(tmp_path: Path) -> None:
    source = exported(tmp_path)
    for key, value in (("storage_offset", {"as_int": 10**9}), ("dtype", "x"), ("sizes", [{"as_int": -4}]), ("strides", [])):
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "b.pt2", "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if name.endswith("model_weights_config.json"):
                    config = json.loads(data)
                    config["config"]["conv.weight"]["tensor_meta"][key] = value
                    data = json.dumps(config).encode()
                new.writestr(name, data)
        if key == "dtype":  # a dtype that nmconvert does not know is no tensor that it could prune
            names = {info.name for info in open_checkpoint(tmp_path / "b.pt2", trust=True).tensors()}
            assert "conv.weight" not in names
        else:
            with pytest.raises(CheckpointError, match=r"model_weights_config.json' cannot be read"):
                open_checkpoint(tmp_path / "b.pt2", trust=True)


# ── hostile bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def with_pickle(folder: Path, data: bytes) -> Path:
    torch.save({"w": torch.ones(4, 4)}, folder / "a.pt")
    with zipfile.ZipFile(folder / "a.pt") as old, zipfile.ZipFile(folder / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    return folder / "b.pt"


def tensor_pickle(
    *, numel: int = 16, start: int = 0, shape: tuple[int, ...] = (4, 4), stride: tuple[int, ...] = (4, 1), state: Any = None
) -> bytes:
    """A state dict {"w": tensor} whose numbers may lie, and may be changed by ``state`` once it is made."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(obj, Marker) else None

    class Marker:
        pass

    class Fake:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Marker(), start, shape, stride, False, {}), state

    import io

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"w": Fake()})
    return out.getvalue()


def test_honest_numbers_are_read(tmp_path: Path) -> None:
    assert torch.equal(open_checkpoint(with_pickle(tmp_path, tensor_pickle())).read("w"), torch.ones(4, 4))


@pytest.mark.parametrize(
    "numbers",
    [
        {"numel": 10**15},
        {"numel": -16},
        {"numel": 15},
        {"start": 1},
        {"start": -1},
        {"shape": (5, 4)},
        {"shape": (4, -4)},
        {"stride": (4, 2)},
        {"stride": (-4, 1)},
        {"stride": (4,)},
        {"shape": (2**40, 2**40)},
    ],
    ids=str,
)
def test_lying_tensors(tmp_path: Path, numbers: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(with_pickle(tmp_path, tensor_pickle(**numbers)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}q\x00.",  # an empty dict
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # memo index of 2 billion
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2**63
        b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00aR.",  # REDUCE with no tuple
        b"\x80\x02\x82\x01.",  # extension registry
        b"(" * 10000 + b".",
        b"\x80\x02" + b"]" * 2000 + b"a" * 1999 + b".",  # nested 2,000 deep
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",  # not UTF-8
    ],
    ids=range(10),
)
def test_hostile_pickles(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(with_pickle(tmp_path, data))
    assert "\n" not in str(caught.value)


def holds_itself(folder: Path) -> Path:
    value: dict[str, Any] = {"epoch": 1, "model": {"w": torch.ones(4, 4)}}
    value["model"]["all"] = value["self"] = value
    torch.save(value, folder / "a.pt")
    return folder / "a.pt"


def holds_its_owner(folder: Path) -> Path:
    """An object among whose attributes is the one that holds it, as a dataset's settings or a trainer's are."""
    owner, held = argparse.Namespace(w=torch.ones(4, 4)), argparse.Namespace(bias=torch.ones(4))
    owner.held, held.owner = held, owner
    torch.save(owner, folder / "a.pt")
    return folder / "a.pt"


@pytest.mark.parametrize(("make", "names"), [(holds_itself, ["w"]), (holds_its_owner, ["w", "held.bias"])])
def test_what_holds_itself_is_read_once(tmp_path: Path, make: Maker, names: list[str]) -> None:
    checkpoint = open_checkpoint(make(tmp_path))
    assert [info.name for info in checkpoint.tensors()] == names
    assert torch.equal(checkpoint.read("w"), torch.ones(4, 4))


def test_a_pickle_of_few_bytes_that_is_large(tmp_path: Path) -> None:
    """Each dict holds the one before it twice."""
    value: dict[str, Any] = {"w": torch.ones(4, 4)}
    for _ in range(60):
        value = {"a": value, "b": value}
    torch.save(value, tmp_path / "a.pt")
    assert [info.name for info in open_checkpoint(tmp_path / "a.pt").tensors()] == ["w"]


def test_objects_of_few_bytes_that_have_many_names(tmp_path: Path) -> None:
    """A module that is there twice has two names, of which each holds the one before it twice."""
    value = argparse.Namespace(w=torch.ones(4, 4))
    for _ in range(60):
        value = argparse.Namespace(a=value, b=value)
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: its objects are nested too deeply"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("state", [{"start": 1_000_000}, {"shape": (2**40, 2**40)}, {"shape": "abc"}, {"storage": None}])
def test_a_tensor_is_not_changed_once_it_is_checked(tmp_path: Path, state: dict[str, Any]) -> None:
    """By BUILD it got a place that no edit reaches: a copy that was dense, and said to be pruned."""
    with pytest.raises(CheckpointError, match=r"its pickle cannot be read \(a tensor that is given another state\)"):
        open_checkpoint(with_pickle(tmp_path, tensor_pickle(state=state)))


def test_dicts_within_dicts(tmp_path: Path) -> None:
    deep = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 5000 + b"N" + b"s" * 5000 + b"."
    with pytest.raises(CheckpointError, match=r"nested too deeply; save the model's state_dict\(\) alone"):
        open_checkpoint(with_pickle(tmp_path, deep))


def zip_with_bytes(folder: Path) -> Path:
    source = with_pickle(folder, tensor_pickle())
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("a/nmconvert.json", b"\xff")
    return source


def legacy_with_bytes(folder: Path) -> Path:
    torch.save({"w": torch.ones(4, 4)}, folder / "a.pt", _use_new_zipfile_serialization=False)
    with (folder / "a.pt").open("ab") as file:
        file.write(b"nmconvert.json" + struct.pack("<Q", 1) + b"\xff")
    return folder / "a.pt"


def program_with_bytes(folder: Path) -> Path:
    source = exported(folder)
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/nmconvert.json", b"\xff")
    return source


def folder_with_bytes(folder: Path) -> Path:
    save_file({"w": torch.ones(4, 4)}, folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "one.safetensors"}}')
    (folder / "nmconvert.json").write_bytes(b"\xff")
    return folder


@pytest.mark.parametrize("make", [zip_with_bytes, legacy_with_bytes, program_with_bytes, folder_with_bytes])
def test_a_manifest_that_is_no_text(tmp_path: Path, make: Maker) -> None:
    with pytest.raises(
        CheckpointError, match=r"its nmconvert manifest is damaged .*start from the file that it was made from"
    ) as caught:
        Manifest.of(open_checkpoint(make(tmp_path), trust=True))
    assert "\n" not in str(caught.value)


def test_zip_names_that_lead_elsewhere(tmp_path: Path) -> None:
    source = with_pickle(tmp_path, tensor_pickle())
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("../../escaped", b"x")
        archive.writestr("/etc/escaped", b"x")
    (tmp_path / "inner").mkdir()
    edited_copy(source, tmp_path / "inner" / "c.pt")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.pt", "b.pt", "c.pt", "inner"]


def test_storage_key_that_leads_elsewhere(tmp_path: Path) -> None:
    data = tensor_pickle().replace(b"X\x01\x00\x00\x000", b"X\x05\x00\x00\x00../..")
    with pytest.raises(CheckpointError, match=r"storage \.\./\.\. should be 64 bytes and is missing"):
        open_checkpoint(with_pickle(tmp_path, data))


def test_two_records_of_one_name(tmp_path: Path) -> None:
    source = with_pickle(tmp_path, tensor_pickle())
    with zipfile.ZipFile(source, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("a/data/0", b"x" * 64)
    with pytest.raises(CheckpointError, match="two records are called 'a/data/0'"):
        open_checkpoint(source)


def test_records_that_overlap(tmp_path: Path) -> None:
    source = with_pickle(tmp_path, tensor_pickle())
    data = bytearray(source.read_bytes())
    entry = data.index(b"PK\x01\x02")
    struct.pack_into("<II", data, entry + 20, 5000, 5000)
    source.write_bytes(data)
    with pytest.raises(CheckpointError, match="lies over the record that follows"):
        open_checkpoint(source)


def test_zip_bomb(tmp_path: Path) -> None:
    source = tmp_path / "bomb.pt"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    data = bytearray(source.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 100)  # it says that it unpacks to 100 bytes
    source.write_bytes(data)
    with pytest.raises(CheckpointError, match="not the size it should be"):
        open_checkpoint(source)


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path, "x")
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote"):
        open_checkpoint(tmp_path / "a.zip")
