"""Models from import paths, files and folders; strict loading; which weights are layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from containers import Tied
from safetensors.torch import save_file
from torch import nn

from nmconvert.checkpoint import open_checkpoint
from nmconvert.errors import ModelError, UntrustedFileError, UsageError
from nmconvert.model import build, copied, fill, layers, literal, load

SOURCE = """
from dataclasses import dataclass
from torch import nn
import beside

@dataclass
class Size:
    width: int

class Net(nn.Module):
    def __init__(self, width=4, bias=True, name="x"):
        super().__init__()
        self.size = Size(width)
        self.name = name
        self.linear = nn.Linear(width, width, bias=bias)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.linear(x))

class Zoo:
    @staticmethod
    def small():
        return Net(2)

def wide(width):
    return Net(width)

def any_argument(**options):
    return Net(**options)

def broken():
    raise RuntimeError("no\\nGPU")

def not_a_module():
    return [1]

ready = Net(3)
number = 7
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(SOURCE)
    (tmp_path / "beside.py").write_text("")
    return str(tmp_path / "net.py")


def test_import_path() -> None:
    assert isinstance(build("torch.nn:Linear", {"in_features": "3", "out_features": "2", "bias": "false"}), nn.Linear)
    assert build("torch.nn:Linear", {"in_features": "3", "out_features": "2", "bias": "False"}).bias is None


def test_nested_attribute_and_file(source: str) -> None:
    assert build(f"{source}:Zoo.small").linear.in_features == 2
    assert build(f"{source}:wide", {"width": "5"}).size.width == 5
    assert build(f"{source}:any_argument", {"width": "6", "name": "abc"}).name == "abc"
    assert build(f"{source}:ready").linear.in_features == 3


def test_module_of_the_current_folder(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(source).parent)
    (Path(source).parent / "made_here.py").write_text(SOURCE)
    assert build("made_here:Net").linear.in_features == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10), ("0.5", 0.5), ("1e-3", 1e-3), ("true", True), ("False", False), ("none", None), ("relu", "relu"),
        ("[1, 2]", [1, 2]), ("(3,)", (3,)), ("{'a': 1}", {"a": 1}), ("'10'", "10"), ("", ""),
        ("__import__('os')", "__import__('os')"),
    ],
)  # fmt: skip
def test_literal(text: str, value: Any) -> None:
    assert literal(text) == value


@pytest.mark.parametrize(
    ("spec", "arguments", "error", "message"),
    [
        ("nothing", {}, UsageError, "does not say what builds the model; give it as package.module:callable"),
        ("module:", {}, UsageError, "does not say what builds the model"),
        (":callable", {}, UsageError, "does not say what builds the model"),
        ("no_such_package.sub:f", {}, UsageError, "there is no module 'no_such_package'; install it, run from the folder"),
        ("torch.nothing:f", {}, UsageError, r"there is no module 'torch\.nothing'"),
        ("torch.nn:Linera", {}, UsageError, r"there is no 'Linera' in torch\.nn; did you mean 'Linear'\?"),
        ("torch.nn:Linear", {}, UsageError, "needs in_features, out_features; give --model-arg in_features=VALUE"),
        ("torch.nn:ReLU", {"slope": "1"}, UsageError, "takes no argument 'slope'; its arguments: inplace"),
        ("missing.py:f", {}, UsageError, r"there is no file missing\.py"),
        ("{}:number", {}, ModelError, "is a int, which cannot be called"),
        ("{}:broken", {}, ModelError, "building it failed with RuntimeError: no GPU; --debug"),
        ("{}:not_a_module", {}, ModelError, r"returned a list, not a torch\.nn\.Module"),
        ("{}:ready", {"width": "3"}, UsageError, "is not a callable and takes no arguments"),
        ("{}:Zoo.large", {}, UsageError, "there is no 'large' in Zoo"),
        ("json:loads", {"s": "x"}, ModelError, "building it failed with JSONDecodeError"),
    ],
)
def test_errors_say_what_to_do(source: str, spec: str, arguments: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        build(spec.format(source), arguments)
    assert "\n" not in str(caught.value)


def test_a_file_that_needs_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import torchvision_of_old")
    (tmp_path / "b.py").write_text("1 +")
    with pytest.raises(
        ModelError, match="imports 'torchvision_of_old', which is not installed: pip install torchvision_of_old"
    ):
        build(f"{tmp_path}/a.py:f")
    with pytest.raises(ModelError, match="importing it failed with SyntaxError"):
        build(f"{tmp_path}/b.py:f")


# ── loading ───────────────────────────────────────────────────────────────────────────────────────────────────────────

HERE = f"{Path(__file__).parent / 'containers.py'}:Tied"


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict"])
def test_load(tmp_path: Path, prefix: str, key: str | None) -> None:
    model = Tied()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "a.pt")
    loaded = load(HERE, tmp_path / "a.pt")
    assert same(loaded, model)
    assert not loaded.training
    assert loaded.second.weight is loaded.first.weight


def test_load_takes_the_checkpoints_dtype(tmp_path: Path) -> None:
    model = Tied().half()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded = load(HERE, tmp_path / "a.pt")
    assert same(loaded, model)
    assert loaded.conv.weight.dtype == torch.float16
    assert loaded.seen.dtype == torch.int64


def test_load_of_an_ema_takes_the_model(tmp_path: Path) -> None:
    model = Tied()
    torch.save({"ema": Tied().state_dict(), "model": model.state_dict()}, tmp_path / "a.pt")
    assert same(load(HERE, tmp_path / "a.pt"), model)


def test_a_tied_weight_may_be_there_once(tmp_path: Path) -> None:
    model = Tied()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "second.weight"}
    save_file(state, tmp_path / "a.safetensors")
    assert same(load(HERE, tmp_path / "a.safetensors"), model)


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    state = Tied().state_dict()
    state["convolution.weight"] = state.pop("conv.weight")
    state["a"] = state["b"] = state["c"] = torch.ones(1)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ModelError) as caught:
        load(HERE, tmp_path / "a.pt")
    message = str(caught.value)
    assert "1 missing (conv.weight, nearest convolution.weight)" in message
    assert "4 too many (convolution.weight; a; b, …)" in message
    assert "\n" not in message


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    state = Tied().state_dict()
    state["first.bias"] = torch.ones(9)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"'first.bias' is \[9\], and \[8\] in the model; .* --model-arg"):
        load(HERE, tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "spec"),
    [("resnet20-12fca82f.th", "resnet20"), ("resnet32-d509ac18.th", "resnet32"), ("resnet56-4bfd9763.th", "resnet56")],
)
def test_real_checkpoints(data_dir: Path, sample_models: Path, name: str, spec: str) -> None:
    loaded = load(f"{sample_models / 'resnet.py'}:{spec}", data_dir / "checkpoints" / name)
    theirs = torch.load(data_dir / "checkpoints" / name, map_location="cpu", weights_only=True)["state_dict"]
    assert len(layers(loaded)) == int(spec.removeprefix("resnet"))  # every layer that gave the net its number
    ours = loaded.state_dict()
    for key, tensor in theirs.items():  # of a torch that had no num_batches_tracked yet
        assert torch.equal(tensor, ours[key.removeprefix("module.")])


# ── programs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_programs_need_trust(tmp_path: Path) -> None:
    model, x = Tied().eval(), torch.randn(1, 4, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "a.pt2")
    torch.save(model, tmp_path / "b.pt")
    torch.save({"model": model}, tmp_path / "c.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, x).save(tmp_path / "d.ts")
        for name in ("a.pt2", "b.pt", "c.pt", "d.ts"):
            path = tmp_path / name
            with pytest.raises(UntrustedFileError, match="--trust"):
                build(str(path))
            torch.testing.assert_close(build(str(path), trust=True)(x), model(x))
            torch.testing.assert_close(load(str(path), path, trust=True)(x), model(x))


def test_a_state_dict_is_no_model(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"a checkpoint \(torch zip\) holds weights and no model"):
        build(str(tmp_path / "a.pt"))


def test_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "a")
    assert type(build(str(tmp_path / "a"))) is type(model)
    assert same(load(str(tmp_path / "a"), tmp_path / "a"), model)
    assert same(load(str(tmp_path / "a"), tmp_path / "a" / "model.safetensors"), model)
    found = {layer.tensor: layer.kind for layer in layers(model)}
    assert found["transformer.h.0.attn.c_attn.weight"] == "matmul"
    assert found["lm_head.weight"] == "linear"
    (tmp_path / "a" / "config.json").write_text('{"model_type": "gpt2", "architectures": ["Unheard"]}')
    with pytest.raises(ModelError, match="its architecture Unheard is not in transformers"):
        build(str(tmp_path / "a"))
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="transformers cannot build it"):
        build(str(tmp_path / "a"))
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"a folder without config.json"):
        build(str(tmp_path / "a"))


def test_hugging_face_folder_with_missing_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "a")
    save_file({"transformer.wte.weight": torch.zeros(64, 32)}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"its weights do not fit its config.json: [0-9]+ missing"):
        load(str(tmp_path / "a"), tmp_path / "a")


# ── layers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(4, 8, 3, groups=2)
        self.c2 = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.c3 = nn.Conv3d(4, 8, 3)
        self.t1 = nn.ConvTranspose1d(4, 8, 3)
        self.t2 = nn.ConvTranspose2d(4, 8, 3, groups=4)
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.across = nn.MultiheadAttention(4, 2, kdim=6, vdim=8)
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.again = self.linear
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.table = nn.Parameter(torch.ones(4, 4))


def test_layers() -> None:
    model = Everything()
    assert [(layer.tensor, layer.kind, layer.groups) for layer in layers(model)] == [
        ("c1.weight", "conv", 2),
        ("c2.0.weight", "conv", 1),
        ("c3.weight", "conv", 1),
        ("t1.weight", "conv_transpose", 1),
        ("t2.weight", "conv_transpose", 4),
        ("linear.weight", "linear", 1),
        ("attention.in_proj_weight", "linear", 1),
        ("attention.out_proj.weight", "linear", 1),
        ("across.q_proj_weight", "linear", 1),
        ("across.k_proj_weight", "linear", 1),
        ("across.v_proj_weight", "linear", 1),
        ("across.out_proj.weight", "linear", 1),
    ]
    parameters = dict(model.named_parameters())
    for layer in layers(model):
        assert layer.weight is parameters[layer.tensor] is getattr(layer.module, layer.parameter)


def test_a_layer_alone() -> None:
    (layer,) = layers(nn.Linear(3, 2))
    assert (layer.name, layer.tensor) == ("", "weight")


class Rotary(nn.Module):
    """Llama's rotation of positions, a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("turns", torch.polar(torch.ones(2), torch.tensor([0.5, 1.5])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(self.linear(x).reshape(-1, 2, 2)) * self.turns
        return torch.view_as_real(pairs).flatten(1)


def test_complex_tensors_stay_complex(tmp_path: Path) -> None:
    made = Rotary()
    torch.save({"linear.weight": made.linear.weight, "linear.bias": made.linear.bias, "turns": made.turns}, tmp_path / "a.pt")
    other = Rotary()
    fill(other, open_checkpoint(tmp_path / "a.pt"))
    x = torch.randn(3, 4)
    assert torch.equal(other(x), made(x))
    assert torch.equal(other.turns, made.turns)


def test_lazy_layers_take_their_shapes_from_the_checkpoint(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(8, 4)).state_dict(), tmp_path / "a.pt")
    lazy = nn.Sequential(nn.LazyLinear(4))
    fill(lazy, open_checkpoint(tmp_path / "a.pt"))
    assert lazy(torch.ones(2, 8)).shape == (2, 4)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_copy_of_what_hooks_compute() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    x = torch.ones(2, 4)
    expected = model(x)
    assert torch.equal(copied(model)(x), expected)
