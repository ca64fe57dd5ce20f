"""ResNet-50 (He et al. 2015) in the shapes of torchvision's, to measure speed and size by: its weights are random."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """1×1, 3×3 with the stride, 1×1, and a shortcut (figure 5 right)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *_conv(inputs, width, 1, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU(), *_conv(width, outputs, 1, 1)
        )
        changed = stride > 1 or inputs != outputs
        self.shortcut: nn.Module = nn.Sequential(*_conv(inputs, outputs, 1, stride)) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum, rectified."""
        return F.relu(self.body(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)


def resnet50() -> nn.Sequential:
    """25.6 million parameters, 4.1 billion multiplications for an image of 224×224; [N, 3, H, W] → logits [N, 1000]."""
    layers: list[nn.Module] = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(count):
            layers.append(Bottleneck(inputs, width, 1 if block else stride))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
