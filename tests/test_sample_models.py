"""The ResNets fit the published checkpoints, and the digits are those of scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from sample_models import resnet
from sample_models.digits import digits
from sample_models.train_digits import data, top1

PUBLISHED = {  # depth: file, parameters as its README gives them
    20: ("resnet20-12fca82f.th", 269_722),
    32: ("resnet32-d509ac18.th", 464_154),
    56: ("resnet56-4bfd9763.th", 853_018),
}


@pytest.mark.parametrize("depth", PUBLISHED)
def test_published_checkpoint_loads_strictly(depth: int, data_dir: Path) -> None:
    file, parameters = PUBLISHED[depth]
    state = torch.load(data_dir / "checkpoints" / file, map_location="cpu", weights_only=True)["state_dict"]
    model = getattr(resnet, f"resnet{depth}")()
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()}, strict=True)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    model = getattr(resnet, f"resnet{depth}")()
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


def test_shortcut_takes_every_second_pixel_and_pads_both_sides() -> None:
    x = torch.arange(2 * 16 * 4 * 4, dtype=torch.float32).reshape(2, 16, 4, 4)
    y = resnet.BasicBlock(16, 32, stride=2).shortcut(x)
    assert y.shape == (2, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize(("name", "shape"), [("resnet20", (3, 32, 32)), ("digits", (1, 8, 8))])
def test_exports_to_onnx_with_a_free_batch(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = (digits() if name == "digits" else resnet.resnet20()).eval()
    file = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(model, (torch.randn(2, *shape),), file, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(file)
    for count in (1, 5):
        x = torch.randn(count, *shape)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_digits_checkpoint_is_what_it_says(sample_models: Path) -> None:
    checkpoint = torch.load(sample_models / "digits.pt", weights_only=True)
    model = digits()
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    with np.load(sample_models / "digits.npz") as arrays:
        images, labels = (torch.from_numpy(arrays[f"test_{name}"]) for name in ("images", "labels"))
    measured = top1(model.eval(), images, labels)
    assert measured == checkpoint["top1"]
    assert measured > 0.97
    assert (sample_models / "digits.pt").stat().st_size < 500_000


def test_digits_data_are_those_of_scikit_learn(sample_models: Path) -> None:
    with np.load(sample_models / "digits.npz") as arrays:
        assert set(arrays) == set(data())
        for name, expected in data().items():
            assert arrays[name].dtype == expected.dtype
            np.testing.assert_array_equal(arrays[name], expected)
