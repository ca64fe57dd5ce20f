"""Two processes on gloo: DDP and FSDP2 train as one process does, resume each other's states, and fail with one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from nmconvert import dist
from nmconvert.pattern import Pattern
from nmconvert.plan import make_plan
from nmconvert.prune import prune
from nmconvert.srste import sparsify, weights_of
from nmconvert.tasks import Classification
from nmconvert.train import Settings, train
from nmconvert.train.loop import Run
from tests.test_train import CLASSES, samples

TASK = Classification(mean=(0.5,), std=(0.25,), flip=False)


class Conv1D(nn.Module):
    """Hugging Face's, whose groups run along the first dimension."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.2)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Blocks(nn.Module):
    """Convolution, transposed convolution, blocks of two kinds of linear layers, tied weights; 13 rows do not divide by 2."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 13), nn.Tanh(), Conv1D(13, 64)) for _ in range(2))
        self.tied = nn.Linear(64, 64, bias=False)
        self.again = nn.Linear(64, 64, bias=False)
        self.again.weight = self.tied.weight
        self.classes = nn.Linear(64, CLASSES)

    def forward(self, x):
        x = self.up(torch.relu(self.stem(x))).flatten(1)
        for block in self.blocks:
            x = x + block(x)
        return self.classes(torch.tanh(self.again(torch.tanh(self.tied(x)))))


def network():
    torch.manual_seed(0)
    return Blocks()


def settings(**changes):
    return Settings(
        **{"epochs": 2, "batch": 32, "lr": 0.02, "decay": 0.05, "clip": 1.0, "freeze_masks": 0.2, "seed": 3, **changes}
    )


def fit(chosen, **more):
    model = network()
    plan = make_plan(weights_of(model), Pattern(2, 4), include=["*"])
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    torch.manual_seed(1)
    teacher[1].reset_parameters()
    return train(model, plan, TASK, samples(augment=True), samples(50, seed=1), chosen, teacher=teacher, **more)


def _rank(rank, world, port, work, out):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with dist.processes(torch.device("cpu")):
        torch.save(work(), out / f"{rank}.pt")


def on_ranks(world, work, out):
    """``work()`` on ``world`` processes; what each returned."""
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (world, port, work, out), nprocs=world, start_method="forkserver")
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module", autouse=True)
def _preload():
    mp.set_forkserver_preload(["tests.test_dist"])


def weights_and_rows(chosen, **more):
    result = fit(chosen, **more)
    return result.weights, [(row.metrics, row.sad, row.flip_rate) for row in result.rows]


def assert_like(result, expected, *, rtol=1e-4, atol=1e-5):
    for name, value in expected[0].items():
        torch.testing.assert_close(result[0][name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    for (metrics, sad, flips), (metrics_of_one, sad_of_one, flips_of_one) in zip(result[1], expected[1], strict=True):
        assert metrics == pytest.approx(metrics_of_one, rel=1e-3)
        assert (sad, flips) == (sad_of_one, pytest.approx(flips_of_one) if flips_of_one is not None else None)


@pytest.fixture(scope="module")
def of_one():
    """What one process makes of it."""
    return weights_and_rows(settings())


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_processes_give_the_weights_of_one(shard, optimizer, of_one, tmp_path):
    chosen = settings(optimizer=optimizer, lr=0.02 if optimizer == "sgd" else 1e-3, shard=shard, accumulate=2)
    expected = of_one if optimizer == "sgd" else weights_and_rows(settings(optimizer="adamw", lr=1e-3))
    results = on_ranks(2, partial(weights_and_rows, chosen), tmp_path)
    for result in results:
        assert_like(result, expected)
    assert expected[1][2][1] > 0, "masks moved"


@pytest.mark.parametrize(("name", "own"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")])
def test_each_process_of_a_machine_has_its_own_gpu(name, own, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.own_device(name) == own


def test_the_gpu_is_chosen_before_the_processes_are_joined(monkeypatch):
    """Otherwise all ranks gather objects through the first GPU."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with dist.processes(torch.device("cuda:1")):
        assert calls == ["cuda:1", "nccl"]


def _masks_on_shards():
    """Masks and dimensions of a sharded model, before and after a step, against those of whole weights."""
    model = network()
    sparse = sparsify(model, "2:4", include=["*"])
    dist.parallelize(model, shard_dim=sparse.shard_dim)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparse.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    model(torch.randn(8, 1, 8, 8, generator=generator)).square().mean().backward()
    optimizer.step()
    dims = {w.name: dist.shard_dims(w.dense) for w in sparse.weights}
    right = [torch.equal(w.mask.mask, w.mask.mask_of(w.dense.full_tensor())) for w in sparse.weights]
    local = [bool(dist.local(w.dense).numel() < w.dense.numel()) for w in sparse.weights]
    return dims, right, local


def test_groups_lie_within_a_shard(tmp_path):
    for dims, right, local in on_ranks(2, _masks_on_shards, tmp_path):
        assert dims == {
            "stem.weight": {0},
            "up.weight": {1},
            "blocks.0.0.weight": {0},
            "blocks.0.2.weight": {1},
            "blocks.1.0.weight": {0},
            "blocks.1.2.weight": {1},
            "tied.weight": {0},
            "classes.weight": {0},
        }
        assert all(right)
        assert all(local)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (4, 2)], ids=["2-to-1", "1-to-2", "4-to-2"])
def test_states_of_some_processes_are_resumed_by_others(first, then, of_one, tmp_path):
    folder = tmp_path / "state"
    on_ranks(first, partial(_until_the_first_epoch, folder), tmp_path / "first")
    assert [state.name for state in folder.iterdir()] == ["step-3"]
    chosen = settings(shard=then > 1)
    for result in on_ranks(then, partial(weights_and_rows, chosen, folder=folder, resume=True), tmp_path / "then"):
        assert_like(result, of_one)


class _Stop(Exception):
    pass


def _until_the_first_epoch(folder):
    save = Run.save

    def save_and_stop(run):
        save(run)
        raise _Stop

    Run.save = save_and_stop
    try:
        fit(settings(shard=dist.world() > 1), folder=folder)
    except _Stop:
        return True
    return False


MODEL = (
    "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))\n"
)


def _command_line(folder, *more):
    """torchrun with two processes; its environment."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nmconvert", "finetune",
        str(folder / "net.nm2-4.pt"), "--data", str(folder / "data.npz"), "--mean", "0.5", "--std", "0.25", "--batch", "16",
        "--task-arg", "flip=false", "--json", *more,
    ]  # fmt: skip
    root = Path(__file__).parent.parent
    return command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}


@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=["ddp", "fsdp2"])
def test_torchrun_trains_and_a_rank_that_dies_ends_the_job(shard, tmp_path):
    (tmp_path / "net.py").write_text(MODEL)
    data = samples(96)
    images = np.stack([data.read(i)[0] for i in range(96)])
    np.savez(tmp_path / "data.npz", images=images, labels=[data.read(i)[1] for i in range(96)])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    prune(tmp_path / "net.pt", Pattern(2, 4), settings={"model": f"{tmp_path / 'net.py'}:net"})

    command, environment = _command_line(tmp_path, "--epochs", "100000", "--save-minutes", "0", "--no-teacher", *shard)
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "net.nm2-4.ft.pt.state"
    deadline = time.monotonic() + 120
    while not any(state.glob("step-*/progress.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    victim = next(pid for pid in _children(job.pid) if "RANK=1" in _environment(pid))
    os.kill(victim, signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "run the same command with --resume" in errors or "Signal 9 (SIGKILL)" in errors
    assert any(state.glob("step-*/progress.json"))
    assert not (tmp_path / "net.nm2-4.ft.pt").exists()

    command, environment = _command_line(tmp_path, "--epochs", "2", "--save-minutes", "0", "--no-teacher", "--resume", *shard)
    resumed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["output"].endswith("net.nm2-4.ft.pt"), "printed once, by the first process"
    weight = torch.load(tmp_path / "net.nm2-4.ft.pt", weights_only=True)["1.weight"]
    assert int((weight.reshape(-1, 4) != 0).sum(1).max()) == 2


def _children(parent):
    found = [int(pid) for path in Path(f"/proc/{parent}/task").glob("*/children") for pid in path.read_text().split()]
    return [*found, *(grandchild for child in found for grandchild in _children(child))]


def _environment(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
