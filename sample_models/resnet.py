"""ResNet-20, -32, -44 and -56 for 32×32 images (He et al. 2015, section 4.2).

Names and shapes are those of the widely used checkpoints of akamaster/pytorch_resnet_cifar10, whose keys carry a
``module.`` prefix: with ``--model sample_models/resnet.py:resnet20``, ``resnet20-12fca82f.th`` is read as it is. Input:
RGB / 255, less the mean (.485, .456, .406), divided by (.229, .224, .225).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A): [N, C, H, W] → [N, width, H/s, W/s]."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.missing = width - inputs

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum, rectified."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """``x``; where the shape changes, every stride-th pixel, with zero channels on both sides."""
        if not self.missing:
            return x
        before = self.missing // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))


class ResNet(nn.Module):
    """A stem, three stages of ``blocks`` blocks, a linear classifier: [N, 3, H, W] → logits [N, classes]."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.linear = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(width, width, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, width, stride), *rest)


def resnet20(classes: int = 10) -> ResNet:
    """20 layers, 0.27 million parameters."""
    return ResNet(3, classes)


def resnet32(classes: int = 10) -> ResNet:
    """32 layers, 0.46 million parameters."""
    return ResNet(5, classes)


def resnet44(classes: int = 10) -> ResNet:
    """44 layers, 0.66 million parameters."""
    return ResNet(7, classes)


def resnet56(classes: int = 10) -> ResNet:
    """56 layers, 0.85 million parameters."""
    return ResNet(9, classes)
