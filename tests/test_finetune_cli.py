"""``nmconvert finetune`` from checkpoint to checkpoint."""

import dataclasses
import json
import resource
import shutil
from xml.etree import ElementTree

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nmconvert.checkpoint import open_checkpoint
from nmconvert.cli import group, main
from nmconvert.cli.finetune import SETTINGS
from nmconvert.errors import CheckpointError, DataError, ModelError, NmconvertError, UsageError
from nmconvert.manifest import Manifest
from nmconvert.tasks import Classification
from nmconvert.train import Settings, finetune, state

MODEL = """
from torch import nn

def net(width: int = 8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 4),
    )
"""
TASK = ["--mean", "0.5", "--std", "0.25", "--task-arg", "flip=false", "--task-arg", "crop=1"]


def invoke(*arguments):
    result = CliRunner().invoke(group, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, its data, a dense checkpoint with DataParallel's prefix, and what prune made of it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 192)
    images = rng.integers(0, 120, (192, 8, 8)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = divmod(int(label), 2)
        image[4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 60
    np.savez(
        folder / "data.npz",
        **{"train_images": images[:128], "train_labels": labels[:128], "val_images": images[128:], "val_labels": labels[128:]},
    )
    scope = {}
    exec(MODEL, scope)
    torch.manual_seed(0)
    model = scope["net"]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.from_numpy(images[:128, None] / 255).float().sub(0.5).div(0.25), torch.from_numpy(labels[:128])
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 60}, folder / "net.pt")
    invoke("prune", folder / "net.pt", "--nm", "1:4", "--model", f"{folder / 'net.py'}:net", "--quiet")
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it, for one test. The manifest still names the dense checkpoint of the original."""
    shutil.copytree(trained, tmp_path / "work")
    return tmp_path / "work"


def finetune_it(folder, *more):
    return invoke(
        "finetune",
        folder / "net.nm1-4.pt",
        "--data",
        folder / "data.npz",
        *TASK,
        "--batch",
        16,
        "--epochs",
        3,
        "--lr",
        0.02,
        *more,
    )


def test_a_checkpoint_becomes_better_and_stays_exactly_nm(folder):
    result = json.loads(finetune_it(folder, "--json"))
    tops = {row["label"]: row["metrics"]["top1"] for row in result["rows"]}
    assert list(tops) == ["dense", "start", "1", "2", "3"]
    assert tops["dense"] > 95
    assert tops["3"] > max(90, tops["start"])
    assert result["output"] == str(folder / "net.nm1-4.ft.pt")
    assert "checks hold" in invoke("verify", result["output"])
    measured = json.loads(
        invoke("eval", result["output"], "--model", f"{folder / 'net.py'}:net", "--data", folder / "data.npz", *TASK, "--json")
    )
    assert measured["metrics"]["top1"] == pytest.approx(tops["3"])

    whole = torch.load(result["output"], weights_only=True)
    assert whole["epoch"] == 60, "what is no weight stays as it was"
    weight = whole["state_dict"]["module.3.weight"]
    assert int((weight.permute(0, 2, 3, 1).reshape(-1, 4) != 0).sum(1).max()) == 1
    manifest = Manifest.from_json(open_checkpoint(result["output"]).manifest_text(), "it")
    assert [stage["stage"] for stage in manifest.history] == ["prune", "finetune"]
    assert manifest.history[1]["rows"][-1]["top1"] == tops["3"]
    assert manifest.settings["input"] == ["1,1,8,8:float32"], "as the data has it, so that export need not be told"
    assert sorted(p.name for p in folder.iterdir() if ".ft" in p.name) == [
        "net.nm1-4.ft.jsonl", "net.nm1-4.ft.pt", "net.nm1-4.ft.svg",
    ]  # fmt: skip
    again = json.loads(invoke("finetune", result["output"], "--epochs", 1, "--batch", 32, "--json"))
    assert again["output"] == str(folder / "net.nm1-4.ft.ft.pt"), "data, model and task were said before"
    ElementTree.parse(folder / "net.nm1-4.ft.svg")
    assert "Checked: the ONNX checker" in invoke("export", result["output"], "--onnx")


def test_the_newest_result_is_taken_and_the_table_shown(folder, monkeypatch):
    monkeypatch.chdir(folder)
    shown = invoke(
        "finetune",
        "--data",
        "data.npz",
        *TASK,
        "--batch",
        32,
        "--epochs",
        1,
        "--no-teacher",
        "--html",
        "run.html",
    )
    assert "epoch 1" in shown
    assert (folder / "net.nm1-4.ft.svg").read_text() in (folder / "run.html").read_text("utf-8")
    assert "without a teacher" in shown
    assert "dense" not in shown


def test_every_training_option_sets_what_its_help_says():
    """The defaults in the help are those of the dataclass; no setting is forgotten."""

    @click.command()
    def probe(**numbers):
        """Nothing."""

    for option in SETTINGS:
        probe = option(probe)
    options = {p.name: p for p in probe.params}
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert options.keys() == fields.keys()
    for name, default in fields.items():
        text = options[name].help.partition("[default: ")[2].rstrip("]")
        if default is None or default is False:
            continue
        said = text.split(",")[0]
        assert float(said) == default if isinstance(default, float | int) and default is not True else said in (default, name)


def test_an_interrupted_run_is_resumed_or_refused(folder, monkeypatch):
    calls = 0
    original = Classification.distill

    def interrupted(self, model, teacher, batch):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return original(self, model, teacher, batch)

    whole = json.loads(finetune_it(folder, "--json", "--output", folder / "whole.ft.pt"))
    monkeypatch.setattr(Classification, "distill", interrupted)
    with pytest.raises((KeyboardInterrupt, click.exceptions.Abort)):
        finetune_it(folder, "--json")
    assert not (folder / "net.nm1-4.ft.pt").exists()
    with pytest.raises(UsageError, match="go on with --resume"):
        finetune_it(folder)
    resumed = json.loads(finetune_it(folder, "--json", "--resume"))
    assert [row["metrics"] for row in resumed["rows"]] == [row["metrics"] for row in whole["rows"]]
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (resumed["output"], whole["output"])]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.parametrize("fault", ["step", "state"])
def test_a_run_that_fails_leaves_what_the_last_good_one_wrote(folder, monkeypatch, fault):
    finetune_it(folder, "--json")
    before = {path.name: path.read_bytes() for path in folder.glob("*.ft.*")}
    assert len(before) == 3
    if fault == "step":
        with pytest.raises(NmconvertError, match="the loss is"):
            finetune_it(folder, "--lr", 1e30)
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def on_a_full_disk(*arguments, **named):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
            save_tensors(*arguments, **named)

        save_tensors = state.save_tensors
        monkeypatch.setattr(state, "save_tensors", on_a_full_disk)
        try:
            with pytest.raises(CheckpointError, match=r"state of step \d+ cannot be written: .*File too large"):
                finetune_it(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.glob("*.ft.*")} == before


def test_half_precision_checkpoints_stay_half(folder):
    state = torch.load(folder / "net.pt", weights_only=True)
    state["state_dict"] = {n: v.half() if v.is_floating_point() else v for n, v in state["state_dict"].items()}
    torch.save(state, folder / "half.pt")
    invoke("prune", folder / "half.pt", "--nm", "2:4", "--model", f"{folder / 'net.py'}:net", "--quiet")
    arguments = ("--data", folder / "data.npz", *TASK, "--batch", 32, "--epochs", 1, "--from-dense", "--json")
    result = json.loads(invoke("finetune", folder / "half.nm2-4.pt", *arguments))
    assert result["rows"][-1]["metrics"]["top1"] > 90
    assert torch.load(result["output"], weights_only=True)["state_dict"]["module.3.weight"].dtype == torch.float16
    assert "checks hold" in invoke("verify", result["output"])


def test_what_is_wrong_is_named(folder):
    data = ["--data", folder / "data.npz", *TASK]
    with pytest.raises(UsageError, match="run nmconvert prune"):
        invoke("finetune", folder / "net.pt", *data, "--model", f"{folder / 'net.py'}:net")
    with pytest.raises(ModelError, match="--model-arg"):
        finetune_it(folder, "--model-arg", "width=12")
    with pytest.raises(DataError, match="no such"):
        invoke("finetune", folder / "net.nm1-4.pt", "--data", folder / "nothing", *TASK)
    for command in ("finetune", "eval"):
        with pytest.raises(UsageError, match=r"--device abacus: cannot be used here \(.*--device cpu"):
            invoke(command, folder / "net.nm1-4.pt", *data, "--device", "abacus")
        with pytest.raises(UsageError, match=r"--device meta: cannot be used here"):
            invoke(command, folder / "net.nm1-4.pt", *data, "--device", "meta")
    with pytest.raises(UsageError, match=r"lr cannot be -1.*: it has to be above 0"):
        finetune_it(folder, "--lr", -1)
    for output in (folder / "net.nm1-4.pt", folder / "net.pt"):
        before = output.read_bytes()
        with pytest.raises(UsageError, match="is read by this run; give another name"):
            finetune_it(folder, "--teacher", folder / "net.pt", "--output", output)
        assert output.read_bytes() == before
    with pytest.raises(UsageError, match=r"net.onnx: net.nm1-4.pt is a PyTorch file, and its copy will be one"):
        finetune_it(folder, "--output", folder / "net.onnx")
    with pytest.raises(UsageError, match="missing: there is no such folder"):
        finetune_it(folder, "--output", folder / "missing" / "net.pt")
    (folder / "broken.pt").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(CheckpointError, match=r"broken\.pt"):
        finetune_it(folder, "--teacher", folder / "broken.pt")
    with pytest.raises(UsageError, match="no dense checkpoint"):
        finetune(folder / "net.nm1-4.pt", None, str(folder / "data.npz"), Settings(), learn_alone=True, from_dense=True)
    assert not list(folder.glob("*.ft*"))


BAD = {
    "no data": ("finetune net.nm1-4.pt", 2, "trained on what? Give --data"),
    "data that is not there": ("finetune net.nm1-4.pt --data no.npz", 1, "no.npz: there is no such data"),
    "a folder without images": ("finetune net.nm1-4.pt --data empty", 1, "empty: no images in it"),
    "data of another task": ("finetune net.nm1-4.pt --data data.npz --task detection", 1, "detection and segmentation take"),
    "no such setting": (
        "finetune net.nm1-4.pt --data data.npz --task-arg flop=1",
        2,
        "has no setting 'flop': it has mean, std",
    ),
    "a label too high": ("finetune net.nm1-4.pt --data high.npz --no-teacher", 1, "label 9 is out of range: the model has 4"),
    "a bad image": ("finetune net.nm1-4.pt --data images --batch 8", 1, "bad.png: is no readable image; --skip-bad leaves out"),
    "an argument that is missing": ("finetune net.nm1-4.pt --data data.npz --model net.py:sized", 2, "--model-arg width=VALUE"),
    "an argument too many": ("finetune net.nm1-4.pt --data data.npz --model-arg depth=3", 2, "its arguments: width"),
    "names that differ": ("finetune typo.nm1-4.pt --data data.npz --no-teacher", 1, "missing (3.weight, nearest 3.wieght)"),
    "a rate too high": ("finetune net.nm1-4.pt --data data.npz --lr 1e30", 1, "is the first layer whose output holds NaN"),
    "a batch too large": ("finetune net.nm1-4.pt --data data.npz --batch 999", 1, "fewer than a batch of 999"),
    "parts that do not divide": ("finetune net.nm1-4.pt --data data.npz --accumulate 3", 2, "give a multiple of 3"),
    "a share of no teacher": (
        "finetune net.nm1-4.pt --data data.npz --no-teacher --distill 0.5",
        2,
        "--distill needs the teacher",
    ),
    "no teacher and a teacher": ("finetune net.nm1-4.pt --data data.npz --no-teacher --teacher net.pt", 2, "leave out one"),
    "not pruned": ("finetune net.pt --data data.npz", 2, "run nmconvert prune net.pt --nm 2:4 first"),
}


@pytest.fixture
def bad(folder, monkeypatch):
    """The folder with all kinds of bad input, as the current one."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(folder)
    (folder / "net.py").write_text(MODEL + "def sized(width):\n    return net(width)\n")
    arrays = dict(np.load("data.npz"))
    np.savez("high.npz", **{**arrays, "train_labels": arrays["train_labels"] + 6})
    (folder / "empty").mkdir()
    for part in ("train", "val"):
        for label in range(4):
            (folder / "images" / part / str(label)).mkdir(parents=True)
            for number in range(4):
                image.fromarray(arrays["train_images"][number]).save(f"images/{part}/{label}/{number}.png")
    (folder / "images" / "train" / "2" / "bad.png").write_bytes(b"none")
    state = torch.load("net.pt", weights_only=True)["state_dict"]
    state = {name.removeprefix("module.").replace("3.weight", "3.wieght"): value for name, value in state.items()}
    torch.save(state, "typo.pt")
    invoke("prune", "typo.pt", "--nm", "1:4", "--quiet", "--model", "net.py:net")
    return folder


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_an_exit_status(kind, bad, monkeypatch, capsys):
    arguments, status, said = BAD[kind]
    more = ["--epochs", "1", *(TASK if "detection" not in arguments else [])]
    monkeypatch.setattr("sys.argv", ["nmconvert", *arguments.split(), *more, "--quiet"])
    with pytest.raises(SystemExit) as stop:
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert (stop.value.code, len(errors)) == (status, 1), errors
    assert errors[0].startswith("nmconvert: error: ")
    assert said in errors[0]
    assert not list(bad.glob("*.ft.pt"))


def test_bad_images_can_be_left_out(bad, monkeypatch, capsys):
    arguments = [
        "finetune",
        "net.nm1-4.pt",
        "--data",
        "images",
        *TASK,
        "--epochs",
        "1",
        "--batch",
        "8",
        "--skip-bad",
        "--quiet",
    ]
    monkeypatch.setattr("sys.argv", ["nmconvert", *arguments])
    main()
    assert "nmconvert: warning: skipped: images/train/2/bad.png: is no readable image" in capsys.readouterr().err
    assert (bad / "net.nm1-4.ft.pt").exists()
