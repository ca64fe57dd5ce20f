"""An image classifier for handwritten digits of 8×8 pixels: four convolutions, about 100,000 parameters.

``digits.pt`` is what ``train_digits.py`` made of it. Input: grey values / 16, in [0, 1].
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

WIDTHS = (32, 64, 64, 80)


class DigitsNet(nn.Module):
    """[N, 1, 8, 8] → logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        strides = (1, 2, 1, 2)
        self.features = nn.Sequential(
            *(_block(i, o, stride) for (i, o), stride in zip(pairwise((1, *WIDTHS)), strides, strict=True))
        )
        self.classifier = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10]."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


def _block(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def digits() -> DigitsNet:
    """The model that ``digits.pt`` belongs to, with fresh weights."""
    return DigitsNet()
