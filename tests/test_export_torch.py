"""Checkpoints with a model made ONNX files: state dicts, Hugging Face folders, exported programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_models import session
from torch import Tensor, nn
from torch.nn import functional as F

from nmconvert.checkpoint import open_checkpoint
from nmconvert.errors import ExportError, UntrustedFileError, UsageError
from nmconvert.export import ExportResult, export
from nmconvert.export.trace import trace
from nmconvert.inputs import InputSpec
from nmconvert.manifest import Manifest
from nmconvert.model import forward_inputs
from nmconvert.onnx_graph import DOMAIN
from nmconvert.pattern import Pattern
from nmconvert.prune import prune

HERE = Path(__file__).name


class Decoder(nn.Module):
    """Transposed convolutions that no name tells, and a weight that nothing reads."""

    def __init__(self, unread: bool = False) -> None:
        super().__init__()
        self.d1 = nn.ConvTranspose2d(16, 32, 3)
        self.d2 = nn.ConvTranspose2d(32, 16, 3)
        self.extra = nn.Linear(32, 32) if unread else None
        self.tail = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.tail(self.d2(self.d1(x).relu()).relu())
        return z


class Wavering(nn.Module):
    """Its dropout is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), training=True)


def test_models_that_are_random_or_compiled_are_said_to_be(tmp_path: Path) -> None:
    torch.save(Wavering().state_dict(), tmp_path / "a.pt")
    pruned = prune(tmp_path / "a.pt", Pattern(2, 4), include=["fc.weight"]).output
    with pytest.raises(ExportError, match=r"two runs of the model differ by .* it is random in evaluation mode, too"):
        export(pruned, model=SPEC.format("Wavering"), inputs=[InputSpec.parse("2,32")])
    torch.jit.trace(nn.Sequential(nn.Linear(32, 32)), torch.zeros(1, 32)).save(tmp_path / "a.ts")
    torch.save(nn.Sequential(nn.Linear(32, 32)).state_dict(), tmp_path / "b.pt")
    pruned = prune(tmp_path / "b.pt", Pattern(2, 4), include=["0.weight"]).output
    with pytest.raises(ExportError, match="a TorchScript module cannot be exported: name the Python module"):
        export(pruned, model=str(tmp_path / "a.ts"), inputs=[InputSpec.parse("2,32")], trust=True)


def unread() -> Decoder:
    return Decoder(unread=True)


def test_a_model_that_returns_another_number_of_tensors_is_said(tmp_path: Path) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(8, 8), 0

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            self.calls += 1
            return [self.layer(x)] * self.calls

    with pytest.raises(ExportError, match="returned 1 tensors, and 2 when it ran again"):
        trace(Growing(), [InputSpec.parse("2,8")], {})


def test_inputs_are_told_by_their_kind_and_not_their_name() -> None:
    class Named(nn.Module):
        def forward(self, args: torch.Tensor, *more: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return args * scale

    assert forward_inputs(Named()) == (["args", "scale"], False)


def test_pruned_layers_that_are_not_packed_are_told_with_the_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(unread().state_dict(), tmp_path / "a.pt")
    pruned = prune(tmp_path / "a.pt", Pattern(2, 4)).output
    result = export(pruned, model=SPEC.format("unread"), inputs=[InputSpec.parse("1,16,4,4")])
    assert [layer.name for layer in result.compressed.layers] == ["tail.weight"]
    why = "pruned as conv, by its name and shape, which it is not: prune again with --model"
    assert result.compressed.dense == {
        "d1.weight": why,
        "d2.weight": why,
        "extra.weight": "pruned, but the graph has no weight of that name: computed with before it is used, or not used",
    }
    torch.save(Decoder().state_dict(), tmp_path / "b.pt")
    pruned = prune(tmp_path / "b.pt", Pattern(2, 4), exclude=["tail*"]).output
    with pytest.raises(UsageError, match=r"none of its pruned weights can be packed: 'd1\.weight' was pruned as conv, "):
        export(pruned, model=SPEC.format("Decoder"), inputs=[InputSpec.parse("1,16,4,4")])


class Net(nn.Module):
    """Convolutions with BatchNorm, grouped and depthwise, a transposed one, and a classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.deconv = nn.ConvTranspose2d(width, 12, 2, stride=2)
        self.fc = nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deconv(self.depthwise(self.grouped(self.body(self.stem(x)))))
        z: Tensor = self.head(F.gelu(self.fc(y.mean((2, 3)))))
        return z


class Tokens(nn.Module):
    """Two inputs, an embedding whose weight is the output layer's too, attention, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids) * weights
        y = self.attention(x, x, x, need_weights=False)[0]
        y = self.conv(y.transpose(1, 2)).transpose(1, 2)
        return self.head(y), y


def net() -> Net:
    torch.manual_seed(0)
    return _settled(Net())


def tokens() -> Tokens:
    torch.manual_seed(0)
    return Tokens()


def _settled(model: Net) -> Net:
    """With statistics in its BatchNorms that are not those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) / 4
            module.running_var = torch.rand(module.num_features) + 0.5
    return model.eval()


IMAGE = [InputSpec(None, (1, 3, 8, 8))]
SPEC = f"{__file__}:{{}}"


def saved(model: nn.Module, folder: Path, pattern: str = "2:4", dtype: torch.dtype = torch.float32) -> Path:
    """A pruned checkpoint of a model."""
    torch.save({"state_dict": model.to(dtype).state_dict()}, folder / "a.pt")
    return prune(folder / "a.pt", Pattern.parse(pattern), model=model).output


def pruned_outputs(module: nn.Module, checkpoint: Path, *inputs: Tensor) -> Any:
    """What the pruned model gives in torch, in float32."""
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=True)
    with torch.no_grad():
        return module.float().eval()(*inputs)


def packed_names(result: ExportResult) -> set[str]:
    return {layer.name for layer in result.compressed.layers}


@pytest.fixture(scope="module")
def exported_net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportResult]:
    folder = tmp_path_factory.mktemp("net")
    checkpoint = saved(net(), folder)
    return checkpoint, export(checkpoint, model=SPEC.format("net"), inputs=IMAGE)


def test_a_state_dict_with_its_model(exported_net: tuple[Path, ExportResult]) -> None:
    checkpoint, result = exported_net
    assert result.output == checkpoint.with_suffix(".onnx")
    model = onnx.load(result.output)
    operators = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in operators
    calls = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    assert sorted(calls) == ["SparseConv", "SparseConvRelu", "SparseConvTranspose", "SparseGemmGelu"]
    assert result.notes == ()
    assert result.compressed.packed_bytes <= 0.532 * result.compressed.dense_bytes
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 8, 8)
        found = session(result.output).run(None, {model.graph.input[0].name: x.numpy()})[0]
        np.testing.assert_allclose(found, pruned_outputs(Net(), checkpoint, x), rtol=1e-3, atol=1e-4)


def test_dimensions_have_their_names(exported_net: tuple[Path, ExportResult]) -> None:
    model = onnx.load(exported_net[1].output)
    assert [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.ir_version <= 8


def test_what_was_said_once_need_not_be_said_again(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "a.pt")
    settings = {"model": SPEC.format("Net"), "model_arguments": {"width": "16"}, "input": ["1,3,8,8"]}
    checkpoint = prune(tmp_path / "a.pt", Pattern(2, 4), settings=settings).output
    result = export(checkpoint, dynamic={})
    dims = onnx.load(result.output).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [1, 3, 8, 8]


def test_another_model_does_not_get_the_arguments_of_the_first(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "a.pt")
    settings = {"model": SPEC.format("Net"), "model_arguments": {"width": "16"}, "input": ["1,3,8,8"]}
    checkpoint = prune(tmp_path / "a.pt", Pattern(2, 4), settings=settings).output
    result = export(checkpoint, model=SPEC.format("net"))
    manifest = Manifest.of(open_checkpoint(result.output))
    assert manifest is not None
    assert (manifest.settings["model"], manifest.settings["model_arguments"]) == (SPEC.format("net"), {})


@pytest.mark.parametrize("flavour", ["dense", "inlined"])
def test_other_flavours(tmp_path: Path, flavour: str) -> None:
    checkpoint = saved(net(), tmp_path)
    result = export(checkpoint, flavour=flavour, model=SPEC.format("net"), inputs=IMAGE)
    assert result.output.name == f"a.nm2-4.{flavour}.onnx"
    x = torch.randn(2, 3, 8, 8)
    found = session(result.output).run(None, {session(result.output).get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, pruned_outputs(Net(), checkpoint, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = saved(net(), tmp_path, dtype=dtype)
    result = export(checkpoint, model=SPEC.format("Net"), inputs=IMAGE)
    assert len(result.compressed.layers) == 4
    opened = session(result.output)
    name, element = opened.get_inputs()[0].name, opened.get_inputs()[0].type
    assert element == ("tensor(float16)" if dtype == torch.float16 else "tensor(float)")
    x = torch.randn(2, 3, 8, 8)
    found = opened.run(None, {name: x.half().numpy() if dtype == torch.float16 else x.numpy()})[0]
    expected = pruned_outputs(Net(), checkpoint, x.half().float() if dtype == torch.float16 else x)
    assert np.abs(found - expected.numpy()).max() < 0.02 * expected.abs().max()
    if dtype == torch.float16:
        assert result.compressed.packed_bytes <= 0.563 * result.compressed.dense_bytes


class Pooled(nn.Module):
    """With a dense layer that is stored in half, after a mean: the exporter notes the types of all its values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 16, 3), nn.Linear(16, 100)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
        return out


@pytest.mark.parametrize(("dtype", "how"), [(torch.bfloat16, {}), (torch.float32, {"flavour": "dense", "values": "float16"})])
def test_layers_that_stay_dense_are_stored_in_half(tmp_path: Path, dtype: torch.dtype, how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch.save({"state_dict": Pooled().to(dtype).state_dict()}, tmp_path / "a.pt")
    pruned = prune(tmp_path / "a.pt", Pattern(2, 4), exclude=["fc.*"]).output
    result = export(pruned, model=SPEC.format("Pooled"), inputs=[InputSpec.parse("2,8,6,6")], **how)
    x = torch.randn(2, 8, 6, 6)
    opened = session(result.output)
    found = opened.run(None, {opened.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, pruned_outputs(Pooled(), pruned, x), rtol=1e-2, atol=1e-3)
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(result.output).graph.initializer}
    assert stored["fc.weight" if dtype == torch.bfloat16 else "conv.weight"] in (
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.FLOAT16,
    )


def test_to_float16_on_the_way(tmp_path: Path) -> None:
    result = export(saved(net(), tmp_path), model=SPEC.format("net"), inputs=IMAGE, dtype=torch.float16)
    assert session(result.output).get_inputs()[0].type == "tensor(float16)"
    assert {layer.info.dtype for layer in result.compressed.layers} == {"float16"}


def test_several_inputs_and_tied_weights(tmp_path: Path) -> None:
    checkpoint = saved(tokens(), tmp_path)
    inputs = [InputSpec("ids", (1, 6), "int64"), InputSpec("weights", (1, 6, 16))]
    result = export(checkpoint, model=SPEC.format("tokens"), inputs=inputs)
    opened = session(result.output)
    assert [found.name for found in opened.get_inputs()] == ["ids", "weights"]
    ids, weights = torch.randint(0, 32, (3, 6)), torch.randn(3, 6, 16)
    expected = pruned_outputs(Tokens(), checkpoint, ids, weights)
    for found, wanted in zip(opened.run(None, {"ids": ids.numpy(), "weights": weights.numpy()}), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    initializers = {tensor.name: tensor for tensor in onnx.load(result.output).graph.initializer}
    assert [np.prod(tensor.dims) for tensor in initializers.values()].count(32 * 16) == 1  # the tied table is there once
    assert packed_names(result) == {"attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"}


def test_an_exported_program(tmp_path: Path) -> None:
    model = Net()
    model.load_state_dict(torch.load(saved(net(), tmp_path), weights_only=True)["state_dict"])
    torch.export.save(torch.export.export(model.eval(), (torch.randn(2, 3, 8, 8),)), tmp_path / "b.pt2")
    with pytest.raises(UntrustedFileError, match="--trust"):
        export(tmp_path / "b.pt2")
    result = export(tmp_path / "b.pt2", trust=True)
    assert len(result.compressed.layers) == 4
    pruned = prune(tmp_path / "b.pt2", Pattern(1, 4), trust=True)
    result = export(pruned.output, trust=True)
    assert {str(layer.pattern) for layer in result.compressed.layers} == {"1:4"}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    checkpoint = saved(net(), tmp_path)
    with pytest.raises(UsageError, match="holds weights only; name the module with --model"):
        export(checkpoint)
    with pytest.raises(UsageError, match="an example input is needed; give its shape, for example --input 1,3,224,224"):
        export(checkpoint, model=SPEC.format("net"))
    with pytest.raises(UsageError, match="2 inputs were given, the model's forward takes 1: x"):
        export(checkpoint, model=SPEC.format("net"), inputs=IMAGE * 2)
    with pytest.raises(UsageError, match=r"the model's forward has no input 'y': it takes x"):
        export(checkpoint, model=SPEC.format("net"), inputs=[InputSpec("y", (1, 3, 8, 8))])
    with pytest.raises(ExportError, match=r"the model fails on x .* to have 3 channels, but got 4 .*; is --input right\?"):
        export(checkpoint, model=SPEC.format("net"), inputs=[InputSpec(None, (1, 4, 8, 8))])
    with pytest.raises(UsageError, match="no input has a dimension 9 to leave open with --dynamic: the last one is 3"):
        export(checkpoint, model=SPEC.format("net"), inputs=IMAGE, dynamic={9: "h"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nm2-4.pt", "a.pt"]


def test_a_pickled_module_is_not_run(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"a\.pt: the module that is pickled in it is not run; name the module with --model"):
        export(tmp_path / "a.pt", inputs=IMAGE, trust=True)


class Choosing(nn.Module):
    """As many results as values are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x).flatten()
        return y[y > 0].sum() if (y > 0).nonzero().shape[0] > 2 else y.sum()


def choosing() -> nn.Module:
    return Choosing()


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = saved(choosing(), tmp_path)
    with pytest.raises(ExportError, match=r"data-dependent.*export a module that returns as many each time"):
        export(checkpoint, model=SPEC.format("choosing"), inputs=[InputSpec("x", (1, 16))])
    assert capsys.readouterr() == ("", "")


def test_a_dense_checkpoint_is_told_so(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"a\.pt: nothing in it is N:M sparse; run nmconvert prune first"):
        export(tmp_path / "a.pt", model=SPEC.format("net"), inputs=IMAGE)


def hugging_face(kind: str) -> tuple[Any, list[InputSpec]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "bert":
        config = transformers.BertConfig(**small, intermediate_size=64, max_position_embeddings=32)
        model = transformers.BertForSequenceClassification(config)
    elif kind == "t5":  # its attention has a bias, and its decoder a configuration of its own
        config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16)
        config.decoder_start_token_id = 0
        return transformers.T5ForConditionalGeneration(config).eval(), [
            InputSpec("input_ids", (1, 8), "int64"),
            InputSpec("decoder_input_ids", (1, 8), "int64"),
        ]
    else:
        config = transformers.LlamaConfig(**small, intermediate_size=64, max_position_embeddings=32, num_key_value_heads=1)
        model = transformers.LlamaForCausalLM(config)
    inputs = [InputSpec("input_ids", (1, 8), "int64"), InputSpec("attention_mask", (1, 8), "int64")]
    return model.eval(), inputs[:1] if kind == "llama" else inputs


@pytest.mark.parametrize(("kind", "layers"), [("gpt2", 8), ("bert", 13), ("llama", 14), ("t5", 32)])
def test_hugging_face_folders(tmp_path: Path, kind: str, layers: int) -> None:
    model, inputs = hugging_face(kind)
    model.save_pretrained(tmp_path / kind)
    pruned = prune(tmp_path / kind, Pattern(2, 4))
    assert len(pruned.plan.pruned) == layers
    with pytest.raises(
        UsageError, match="an example input is needed; give its shape, for example --input input_ids=1,16:int64"
    ):
        export(pruned.output)
    result = export(pruned.output, inputs=inputs)
    assert packed_names(result) == {row.name for row in pruned.plan.pruned}
    assert result.output == tmp_path / f"{kind}.nm2-4.onnx"
    again = type(model).from_pretrained(pruned.output).eval()
    ids = torch.randint(0, 64, (3, 8))
    arguments = {spec.name or "": ids if spec.name == "input_ids" else torch.ones_like(ids) for spec in inputs}
    found = session(result.output).run(None, {name: array.numpy() for name, array in arguments.items()})[0]
    with torch.no_grad():
        expected = again(**arguments).logits
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_reasons_of_the_plan_are_told_under_a_prefix_too(tmp_path: Path) -> None:
    """As Lightning writes it: the names of the file are not those of the graph."""
    told = []
    for prefix in ("", "model."):
        state = {prefix + name: value for name, value in net().state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "a.ckpt")
        pruned = prune(tmp_path / "a.ckpt", Pattern(2, 4), model=net())
        told.append(export(pruned.output, model=SPEC.format("net"), inputs=IMAGE).compressed.dense)
    assert told[0] == told[1]
    assert "output layer" in told[1]["head.weight"]
