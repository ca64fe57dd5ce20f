"""The commands as a person runs them: what they print, what they return, and errors of one line that can be acted on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from containers import sha256
from onnx_models import conv_net
from strategies import random_weight
from test_export_torch import SPEC, Net, net

from nmconvert.cli import COMMANDS, main

NET = [f"--model={SPEC.format('Net')}"]


class Run:
    """What one call of ``nmconvert`` did."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["nmconvert", *map(str, arguments)])
        capsys.readouterr()
        self.status = 0
        try:
            main()
        except SystemExit as stop:
            self.status = int(stop.code or 0)
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def nm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs ``nmconvert`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: Run(capsys, monkeypatch, *arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a state dict and an ONNX model."""
    torch.save(net().state_dict(), tmp_path / "net.pt")
    onnx.save(conv_net(None), tmp_path / "a.onnx")
    return tmp_path


def test_the_whole_line_without_saying_anything_twice(nm: Any, folder: Path) -> None:
    pruned = nm("prune", "net.pt", "--nm", "2:4", *NET)
    assert pruned.status == 0, pruned.err
    assert "net.nm2-4.pt" in pruned.out
    assert "body.0.weight" in pruned.out
    assert "the output layer; --include prunes it" in pruned.out
    exported = nm("export", "--onnx", "--input", "1,3,8,8")
    assert exported.status == 0, exported.err
    assert "taking net.nm2-4.pt, the newest checkpoint of nmconvert here" in exported.err
    verified = nm("verify")
    assert verified.status == 0, verified.err
    assert "taking net.nm2-4.onnx, the newest ONNX file of nmconvert here" in verified.err
    against = nm("verify", "--against", "net.nm2-4.pt", "--json")
    assert against.status == 0
    assert against.json["verified"] is True
    inspected = nm("inspect", "net.nm2-4.onnx", "--require", "2:4")
    assert inspected.status == 0
    assert "2:4" in inspected.out


def test_only_checkpoints_are_taken_for_results(nm: Any, folder: Path) -> None:
    nm("prune", "net.pt", "--nm", "2:4", *NET)
    nm("export", "--onnx", "--input", "1,3,8,8")
    for number, name in enumerate(("ft.jsonl", "ft.svg", "html", "onnx.data", "txt")):
        (folder / f"net.nm2-4.{name}").write_text("{}")
        os.utime(folder / f"net.nm2-4.{name}", (4e9 + number, 4e9 + number))  # newer than the results
    (folder / "net.nm2-4.ft.pt.state" / "step-1").mkdir(parents=True)
    torch.save(net().state_dict(), folder / "net.nm2-4.pt.calibration")
    assert "taking net.nm2-4.pt, the newest checkpoint" in nm("export").err
    assert "taking net.nm2-4.onnx, the newest ONNX file" in nm("verify").err
    assert "taking net.nm2-4.onnx, the newest result" in nm("eval").err


def test_the_newest_is_told_by_its_bytes(nm: Any, folder: Path) -> None:
    nm("prune", "net.pt", "--nm", "2:4", "--output", "net.nm2-4.tar", *NET)
    nm("prune", "a.onnx", "--nm", "2:4", "--output", "a.nm2-4.bin")
    assert "taking net.nm2-4.tar, the newest checkpoint" in nm("export").err
    assert "taking a.nm2-4.bin, the newest ONNX file" in nm("verify").err
    quiet = nm("verify", "--quiet")
    assert (quiet.status, quiet.out, quiet.err) == (0, "", "")


def test_what_cannot_be_read_is_no_newest_file(nm: Any, folder: Path) -> None:
    nm("prune", "net.pt", "--nm", "2:4")
    os.mkfifo(folder / "pipe.nm2-4.pt")
    (folder / "gone.nm2-4.pt").symlink_to(folder / "nowhere.pt")
    assert "taking net.nm2-4.pt, the newest checkpoint" in nm("export").err


def test_an_onnx_file_needs_no_ending(nm: Any, folder: Path) -> None:
    (folder / "a.onnx").rename(folder / "a.bin")
    images = random_weight((6, 8, 6, 6), 0).numpy()
    np.savez(folder / "data.npz", images=images, labels=np.zeros(6, int))
    for command in (
        "prune a.bin --permute --nm 2:4",
        "sensitivity a.bin --nm 2:4 --calib data.npz",
        "eval a.bin --data data.npz",
    ):
        run = nm(*command.split())
        assert run.status == 0, run.err
    assert "an ONNX file is not trained" in nm("finetune", "a.nm2-4.bin", "--data", "data.npz").err
    exported = nm("export", "a.nm2-4.bin")
    assert exported.status == 0, exported.err
    measured = nm("bench", "a.nm2-4.onnx", "--against", "a.bin", "--rounds", "3", "--seconds", "0.01", "--no-layers")
    assert measured.status == 0 or "no native kernels" in measured.err, measured.err


def test_json_of_every_command(nm: Any, folder: Path) -> None:
    pruned = nm("prune", "a.onnx", "--nm=1:4", "--include=*.weight", "--json").json
    assert {row["name"] for row in pruned["tensors"] if row["pattern"] == "1:4"} == {
        "first.weight",
        "second.weight",
        "head.weight",
    }
    assert all(row["reason"] for row in pruned["tensors"] if row["pattern"] is None)
    exported = nm("export", "a.nm1-4.onnx", "--json").json
    assert exported["packed_weight_bytes"] < 0.3 * exported["dense_weight_bytes"]
    assert Path(exported["output"]).stat().st_size == exported["bytes"]
    assert nm("verify", exported["output"], "--json").json["verified"] is True
    inspected = nm("inspect", exported["output"], "--json").json
    assert {found["patterns"]["channel"] for found in inspected["tensors"]} == {"1:4"}
    assert inspected["manifest"]["format"] == 1


@pytest.mark.parametrize("command", ["prune a.onnx --nm 2:4", "inspect a.onnx", "export a.nm2-4.onnx", "verify a.nm2-4.onnx"])
def test_quiet_prints_nothing(nm: Any, folder: Path, command: str) -> None:
    nm("prune", "a.onnx", "--nm", "2:4")
    run = nm(*command.split(), "--quiet")
    assert (run.status, run.out, run.err) == (0, "", "")


def test_tables_say_what_happened(nm: Any, folder: Path) -> None:
    pruned = nm("prune", "a.onnx", "--nm", "2:4", "--axis", "kernel")
    for text in ("Pruned (N of every M weights are kept)", "first.weight", "8×8×3×3", "kernel", "2:4", "50.0%", "Left dense"):
        assert text in pruned.out
    assert "assumed" not in pruned.out  # ONNX says what everything is
    torch.save({"a.weight": random_weight((8, 8), 0)}, folder / "b.pt")
    assert "? the kind of the layer, and so its axis, was assumed" in nm("prune", "b.pt", "--nm", "2:4").out
    exported = nm("export", "a.nm2-4.onnx")
    for text in ("compressed", "weights packed", "%", "Checked: the ONNX checker, a run in stock onnxruntime"):
        assert text in exported.out
    assert "its sparse weights are zeros in place" in nm("export", "a.nm2-4.onnx", "--flavour", "dense").out
    inspected = nm("inspect", "a.nm2-4.compressed.onnx")
    for text in ("packed", "Manifest: 2 sparse tensors; stages: prune, export."):
        assert text in inspected.out
    assert "No nmconvert manifest in this file." in nm("inspect", "a.onnx").out


# Arguments, exit status, and what the one line says; {…} stands for files of the folder.
ERRORS: list[tuple[str, int, str]] = [
    ("prune net.pt --nm 5:4", 2, "pattern 5:4 is out of range: N:M keeps N of every M weights, with 1 <= N <= M <= 32"),
    ("prune net.pt", 2, "say how much is kept: --nm N:M for all layers, or --budget to choose for each"),
    ("prune net.pt --nm=", 2, "'' is not an N:M pattern"),
    (
        "sensitivity a.onnx --nm 4:4 --calib data.npz",
        2,
        "a.onnx: nothing to prune among its 4 tensors; most often: 4:4 is dense",
    ),
    ("prune net.pt --nm half", 2, "'half' is not an N:M pattern: write how many are kept of how many, for example 2:4"),
    (
        "prune net.pt --nm 2:4 --include x*",
        2,
        "'x*' matches no tensor of the checkpoint; `nmconvert inspect` lists their names",
    ),
    ("prune net.pt --nm 2:4 --layer body=3", 2, "'3' is not an N:M pattern"),
    ("prune net.pt --nm 2:4 --exclude *", 2, "net.pt: nothing to prune among its"),
    ("prune net.pt --nm 2:4 -o net.pt", 2, "net.pt: is read by this run; give another name with --output"),
    (
        "prune net.pt --nm 2:4 -o a.onnx",
        2,
        "a.onnx: net.pt is a PyTorch file, and its copy will be one, not an ONNX file; nmconvert export writes ONNX",
    ),
    ("prune net.pt --nm 2:4 -o a.safetensors", 2, "its copy will be one, not a safetensors file; give a name with the same"),
    ("prune net.pt --nm 2:4 -o no/net.pt", 2, "no: there is no such folder for --output; make it first"),
    ("prune net.pt --nm 2:4 --model nothing", 2, "--model 'nothing' does not say what builds the model; give it as"),
    ("prune net.pt --nm 2:4 --model no_such:Net", 2, "there is no module 'no_such'"),
    ("prune net.pt --nm 2:4 --model no_such.py:Net", 2, "there is no file no_such.py"),
    ("prune net.pt --nm 2:4 --model json:Net", 2, "there is no 'Net' in json"),
    (
        "prune text.txt --nm 2:4",
        1,
        "text.txt: not a checkpoint that nmconvert knows (PyTorch, safetensors, Hugging Face, ONNX)",
    ),
    ("prune empty.pt --nm 2:4", 1, "empty.pt: is empty; copy the file anew"),
    ("prune cut.pt --nm 2:4", 1, "cut.pt: "),
    ("prune cut.onnx --nm 2:4", 1, "cut.onnx: "),
    ("inspect cut.onnx", 1, "cut.onnx: "),
    ("inspect a.onnx --require 2:4", 1, "a.onnx: 1 of 3 tensors fail 2:4: first.weight"),
    ("inspect a.onnx --require 2", 2, "'2' is not an N:M pattern"),
    ("export", 2, "no checkpoint was given, and this folder has none of nmconvert's: run nmconvert prune first"),
    ("export net.pt", 2, "net.pt: holds weights only; name the module with --model package.module:callable"),
    ("export net.pt --static --dynamic 0=n", 2, "--static fixes every dimension, --dynamic leaves some open: give one of them"),
    ("export net.pt --input 1,a", 2, "--input '1,a' is not [NAME=]SHAPE[:DTYPE]"),
    ("export a.onnx", 2, "a.onnx: nothing in it is N:M sparse; run nmconvert prune first, or export with --flavour dense"),
    ("export a.onnx --flavour dense --input z=1,8,6,6", 2, "the model has no input 'z': it takes X"),
    ("verify", 2, "no ONNX file was given, and this folder has none of nmconvert's: run nmconvert export --onnx first"),
    ("verify a.onnx", 1, "a.onnx: 1 of 3 checks fail, among them manifest"),
    ("verify net.pt", 1, "net.pt: 1 of 1 checks fail, among them manifest"),
]


@pytest.mark.parametrize(("arguments", "status", "text"), ERRORS)
def test_errors(nm: Any, folder: Path, arguments: str, status: int, text: str) -> None:
    (folder / "text.txt").write_text("hello, this is a text of some length, and no checkpoint")
    (folder / "empty.pt").write_bytes(b"")
    for name in ("net.pt", "a.onnx"):
        whole = (folder / name).read_bytes()
        (folder / name.replace("net", "cut").replace("a.", "cut.")).write_bytes(whole[: len(whole) * 2 // 3])
    before = {path.name: sha256(path) for path in folder.iterdir()}
    run = nm(*arguments.split())
    assert run.status == status, run.err
    assert text in run.err
    assert run.err.startswith("nmconvert: error: ")
    assert run.err.count("\n") == 1
    assert "Traceback" not in run.err
    assert {path.name: sha256(path) for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("prune", "Missing argument 'CHECKPOINT'"),
        ("prune missing.pt --nm 2:4", "'missing.pt' does not exist"),
        ("prune net.pt --nm 2:4 --axis depth", "'depth' is not one of 'channel', 'kernel'"),
        ("prune net.pt --nm 2:4 --layer body", "is not of the form GLOB=N:M"),
        ("prune net.pt --nm 2:4 --model-arg width", "'width' is not of the form NAME=VALUE"),
        ("export net.pt --dynamic batch", "is not of the form NAME=VALUE"),
        ("export net.pt --dynamic a=batch", "write the number of the dimension and a name for it, for example 0=batch"),
        ("inspect net.pt --no-such-option", "No such option"),
        ("no-such-command", "No such command 'no-such-command'"),
    ],
)
def test_usage(nm: Any, folder: Path, arguments: str, text: str) -> None:
    run = nm(*arguments.split())
    assert run.status == 2
    assert text in run.err
    assert "Traceback" not in run.err


def test_verify_fails_with_a_table_and_valid_json(nm: Any, folder: Path) -> None:
    nm("prune", "a.onnx", "--nm", "2:4")
    model = onnx.load(folder / "a.nm2-4.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "first.weight")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    onnx.save(model, folder / "changed.onnx")
    table = nm("verify", "changed.onnx")
    assert table.status == 1
    assert "FAILS" in table.out
    assert table.err == "nmconvert: error: changed.onnx: 1 of 4 checks fail, among them first.weight\n"
    as_json = nm("verify", "changed.onnx", "--json")
    assert as_json.status == 1
    assert as_json.json["verified"] is False
    against = nm("verify", "changed.onnx", "--against", "a.onnx", "--quiet")
    assert (against.status, against.out) == (1, "")


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from nmconvert.errors import UsageError

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["nmconvert", "prune", "net.pt", "--nm", "2:4", "--exclude", "*", "--debug"])
    with pytest.raises(UsageError):
        main()


@pytest.mark.parametrize("command", ["prune", "sensitivity"])
def test_calibration_data_of_another_shape(nm: Any, folder: Path, command: str) -> None:
    np.savez(folder / "wide.npz", images=np.zeros((64, 5, 8, 8), np.float32), labels=np.zeros(64, int))
    run = nm(command, "net.pt", "--nm", "2:4", "--calib", "wide.npz", *NET)
    assert run.status == 1
    assert "Net cannot take this data: RuntimeError: Given groups=1" in run.err
    assert run.err.count("\n") == 1


def damaged_npz(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "an array":
        np.save(stream, np.zeros(3))
    elif kind == "no arrays":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("images.npy", b"no array")
    elif kind == "a header of brackets":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("images.npy", b"\x93NUMPY\x01\x00\x40\x00" + b"(" * 64)
    elif kind == "another compression":
        np.savez(stream, images=np.zeros((8, 3), np.float32))
        data = bytearray(stream.getvalue())
        data[8] = data[data.index(b"PK\x01\x02") + 10] = 97  # a method that Python's zipfile does not know
        return bytes(data)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["nothing", "an array", "no arrays", "a header of brackets", "another compression"])
@pytest.mark.parametrize("command", [f"prune net.pt --nm 2:4 --calib z.npz {NET[0]}", f"eval net.pt --data z.npz {NET[0]}"])
def test_arrays_that_are_none_are_one_line(nm: Any, folder: Path, kind: str, command: str) -> None:
    (folder / "z.npz").write_bytes(damaged_npz(kind))
    run = nm(*command.split())
    assert run.status == 1, run.err
    assert "z.npz: " in run.err
    assert run.err.count("\n") == 1
    assert "bug" not in run.err
    assert "interrupted" not in run.err


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (
            "export net.pt --onnx --model {net} --input 99999999999,99,99,99",
            2,
            "[99999999999, 99, 99, 99] has more than 4,294,967,296",
        ),
        ("export net.pt --onnx --model {net} --input " + "9" * 5000, 2, "is not [NAME=]SHAPE[:DTYPE]"),
        ("export net.pt --onnx --model {net} --dynamic ²=x", 2, "write the number of the dimension"),
        ("finetune net.pt --data d --workers 9999", 2, "workers cannot be 9999: it has to be from 0 to 256"),
        ("finetune net.pt --data d --lr 1e99", 2, "lr cannot be 1e+99: it has to be above 0, at most 3e+38"),
        ("finetune net.pt --data d --clip inf", 2, "clip cannot be inf"),
        ("finetune net.pt --data d --save-minutes inf", 2, "save-minutes cannot be inf"),
        ("eval net.pt --model {net} --data d --task-arg temperature=1e300", 2, "has to be at most 1,000,000"),
        ("eval net.pt --model leaves.py:leaves --data d.npz", 1, "building it failed with SystemExit: 7"),
    ],
)
def test_numbers_beyond_all_bounds_and_models_that_leave(nm: Any, folder: Path, command: str, status: int, said: str) -> None:
    (folder / "leaves.py").write_text("import sys\ndef leaves():\n    sys.exit(7)\n")
    np.savez(folder / "d.npz", images=np.zeros((8, 3, 8, 8), np.float32), labels=np.zeros(8, int))
    run = nm(*command.format(net=SPEC.format("Net")).split())
    assert (run.status, run.err.count("\n")) == (status, 1), run.err
    assert said in run.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(nm: Any, command: str) -> None:
    run = nm(command, "--help")
    assert run.status == 0
    assert f"nmconvert {command}" in run.out or command in run.out
    for option in ("--json", "--quiet", "--debug"):
        assert option in run.out


def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    """SIGINT while the copy is written: one line, status 130, the folder as it was."""
    torch.save({f"layer{n}.weight": torch.randn(2048, 2048) for n in range(40)}, folder / "large.pt")
    before = {path.name for path in folder.iterdir()}
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", heard]  # what a shell starts with & has SIGINT ignored, and its children, too
    command += [sys.executable, "-m", "nmconvert", "prune", "large.pt", "--nm", "7:32"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while {path.name for path in folder.iterdir()} == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip() == "nmconvert: error: interrupted; no result was left half written"
    assert {path.name for path in folder.iterdir()} == before


def test_the_result_loads_where_the_original_did(nm: Any, folder: Path) -> None:
    nm("prune", "net.pt", "--nm", "2:4")
    pruned = torch.load(folder / "net.nm2-4.pt", weights_only=True)
    loaded = Net()
    loaded.load_state_dict(pruned, strict=True)
    assert all(torch.equal(value, pruned[name]) for name, value in loaded.state_dict().items())


def test_a_page_beside_what_is_printed(nm: Any, folder: Path) -> None:
    printed = nm("prune", "a.onnx", "--nm", "2:4", "--json", "--html", "prune page.html")
    assert printed.status == 0
    text = (folder / "prune page.html").read_text("utf-8")
    assert "<h1><code>nmconvert prune a.onnx --nm 2:4 --json --html &#x27;prune page.html&#x27;</code></h1>" in text
    assert all(tensor["name"] in text for tensor in printed.json["tensors"])


def test_names_are_shown_as_they_are_and_no_terminal_obeys_them(nm: Any, folder: Path) -> None:
    names = ("a[red].weight", "[/].weight", ":smile:.weight", "b\x1b]0;pwn\x07\x9b.weight")
    torch.save({name: random_weight((16, 16), 0) for name in names}, folder / "m.pt")
    for command in ("prune m.pt --nm 2:4", "inspect m.pt", "verify m.nm2-4.pt"):
        run = nm(*command.split())
        assert run.status == 0, run.err
        assert all(name in run.out for name in names[:3])
        assert "b␛]0;pwn" in run.out
        assert not {"\x1b", "\x07", "\x9b"} & set(run.out)
    refused = nm("inspect", "m.pt", "--require", "1:4")
    assert "\x1b" not in refused.err


def test_a_terminal_that_lacks_a_sign_shows_another(folder: Path) -> None:
    command = [sys.executable, "-m", "nmconvert", "prune", "net.pt", "--nm", "2:4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "?3?3" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("inspect net.pt --html net.pt", "net.pt: is read by this run; give another name with --html"),
        ("inspect net.pt --html link.html", "link.html: is read by this run; give another name with --html"),
        ("verify a.onnx --against net.pt --html net.pt", "net.pt: is read by this run; give another name with --html"),
        ("sensitivity a.onnx --calib d --plot d", "d: is read by this run; give another name with --plot"),
        ("bench a.onnx --tuned a.onnx", "a.onnx: is read by this run; give another name with --tuned"),
        ("bench a.onnx --tuned b --html b", "b: is written by this run already; give another name with --tuned"),
        ("prune net.pt --nm 2:4 --calib d --model net.py:net -o d", "d: is read by this run; give another name with --output"),
        ("prune net.pt --nm 2:4 --model net.py:net -o net.py", "net.py: is read by this run; give another name with --output"),
        ("prune net.pt --nm 2:4 --model net:net -o net.py", "net.py: is read by this run; give another name with --output"),
        ("prune net.pt --nm 2:4 --html net.nm2-4.pt", "net.nm2-4.pt: will be a page, and is called a PyTorch file"),
        ("prune net.pt --nm 2:4 -o b.pt --html b.pt", "b.pt: is written by this run already; give another name with --html"),
        ("prune net.pt --nm 2:4 -o b.npz", "b.npz: net.pt is a PyTorch file, and its copy will be one, not a file of arrays"),
        ("prune net.pt --nm 2:4 -o photo.JPG", "photo.JPG: net.pt is a PyTorch file, and its copy will be one, not an image"),
        ("prune net.pt --nm 2:4 --html corpus.txt", "corpus.txt: will be a page, and is called a text"),
        ("sensitivity a.onnx --calib d --plot photo.JPG", "photo.JPG: will be an SVG picture, and is called an image"),
        ("finetune net.pt --data d -o d", "d: is read by this run; give another name with --output"),
        ("export a.onnx --flavour dense -o net.pt", "net.pt: will be an ONNX file, and is called a PyTorch file"),
        ("prune net.pt --nm 2:4 -o pipe", "pipe: is a device or a pipe, which no file can replace"),
        ("prune net.pt --nm 2:4 --html .", "Invalid value for '--html': File '.' is a directory"),
        ("prune net.pt --nm 2:4 -o .", ".: holds net.pt, which is read by this run; give another name with --output"),
    ],
)
def test_what_is_read_is_not_written(nm: Any, folder: Path, arguments: str, said: str) -> None:
    (folder / "d").write_bytes(b"data")
    (folder / "net.py").write_text("net = None")
    (folder / "link.html").symlink_to("net.pt")
    before = {path.name: sha256(path) for path in folder.iterdir()}
    os.mkfifo(folder / "pipe")
    run = nm(*arguments.split())
    assert (run.status, run.out, run.err.count("\n")) == (2, "", 1), run.err
    assert said in run.err
    assert (folder / "pipe").is_fifo()
    (folder / "pipe").unlink()
    assert {path.name: sha256(path) for path in folder.iterdir()} == before


def test_a_file_of_the_data_is_not_replaced(nm: Any, folder: Path) -> None:
    (folder / "d").mkdir()
    (folder / "d" / "labels").write_text("0\n")
    run = nm("prune", "net.pt", "--nm", "2:4", "--calib", "d", "--model", "net.py:net", "-o", "d/labels")
    assert (run.status, run.err) == (
        2, "nmconvert: error: d/labels: is a file of d, which is read by this run; give another name with --output\n"
    )  # fmt: skip
    assert (folder / "d" / "labels").read_text() == "0\n"


def test_a_pipe_is_no_checkpoint(nm: Any, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    run = nm("inspect", "pipe")
    assert (run.status, run.err.count("\n")) == (1, 1)
    assert "pipe: is a pipe or a device, and checkpoints are read in places; write it into a file first" in run.err


def test_a_page_that_has_no_folder(nm: Any, folder: Path) -> None:
    refused = nm("prune", "a.onnx", "--nm", "2:4", "--html", "reports/a.html")
    assert refused.status == 2
    assert refused.err.strip().endswith("make it first")
    assert not list(folder.glob("*.nm*"))


TWO_INPUTS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(10, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.normed = nn.utils.weight_norm(nn.Linear(32, 32))

    def forward(self, x, steps, scale=None):
        y = self.first(x) + self.table(steps)
        return self.normed(torch.relu(self.second(torch.relu(y if scale is None else y * scale))))
"""


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_of_several_inputs_is_calibrated_on_arrays_by_their_names(nm: Any, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_INPUTS)
    scope: dict[str, Any] = {}
    exec(TWO_INPUTS, scope)
    torch.save(scope["Net"]().state_dict(), "two.pt")
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((64, 32)), "steps": rng.integers(0, 10, 64)}  # doubles, as NumPy makes them
    np.savez("two.npz", **arrays)
    how = ("prune", "two.pt", "--nm", "2:4", "--model", "two.py:Net", "--samples", "64", "--batch-size", "8", "-q")
    assert nm(*how, "--calib", "two.npz", "-o", "solved.pt").status == 0
    assert nm(*how, "-o", "magnitude.pt").status == 0
    dense, solved, magnitude = (scope["Net"]() for _ in range(3))
    for model, file in ((dense, "two.pt"), (solved, "solved.pt"), (magnitude, "magnitude.pt")):
        model.load_state_dict(torch.load(file, weights_only=True))
    x, steps = torch.from_numpy(arrays["x"]).float(), torch.from_numpy(arrays["steps"])
    with torch.no_grad():
        errors = [float((model(x, steps) - dense(x, steps)).square().mean()) for model in (solved, magnitude)]
    assert errors[0] < 0.8 * errors[1]
    np.savez("two.npz", **arrays, maks=arrays["x"])
    told = nm(*how, "--calib", "two.npz", "-o", "again.pt")
    assert (told.status, "warning: two.npz: maks not read: the model's inputs are called scale, steps, x" in told.err) == (
        0,
        True,
    )
    np.savez("two.npz", x=np.full(64, "text"), steps=arrays["steps"])
    assert "two.npz: its array 'x' holds <U4, and no numbers" in nm(*how, "--calib", "two.npz").err
    np.savez("two.npz", x=arrays["x"])
    run = nm(*how, "--calib", "two.npz")
    assert (run.status, run.err.count("\n")) == (1, 1)
    assert "two.npz: has arrays for the model's inputs x, and none for steps" in run.err
    np.savez("two.npz", other=arrays["x"])
    assert (
        "has no array 'images' (or 'train_images', …), only other; --calib takes arrays that are"
        in nm(*how, "--calib", "two.npz").err
    )


def test_samples_that_are_no_pairs(nm: Any, folder: Path) -> None:
    (folder / "mydata.py").write_text("def items(split):\n    return [{'x': 1}] * 8\n")
    run = nm("prune", "net.pt", "--nm", "2:4", *NET, "--calib", "mydata:items")
    assert (run.status, run.err.count("\n")) == (1, 1)
    assert "sample" in run.err
    assert "is a dict, and not (image, label)" in run.err
