"""Few images made many: what calibration changes in them at random. The dense model answers the changed ones, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

_LEAST = 0.5  # of a side, what is cut out and enlarged
_MOSAICS = 0.5  # of the images, how many are four put together
_LIGHT = 0.25  # by how much contrast and brightness change


def image_count(batch: Any) -> int:
    """How many images a batch is (see :func:`is_images`)."""
    return len(batch if isinstance(batch, Tensor) else batch[0])


def is_images(batch: Any) -> bool:
    """Whether a batch is a tensor of images [B, C, H, W], or a list of images [C, H, W], which may be flipped and shifted."""
    if isinstance(batch, tuple | list) and len(batch) == 1 and isinstance(batch[0], list):
        return all(isinstance(image, Tensor) and is_images(image[None]) for image in batch[0])
    return isinstance(batch, Tensor) and batch.dim() == 4 and batch.is_floating_point() and batch.shape[1] <= 4


def augment(batch: Any, generator: Generator) -> Any:
    """Each image of ``batch`` (see :func:`is_images`) mirrored with probability ½ and shifted by up to an eighth."""
    if not isinstance(batch, Tensor):
        return ([augment(image[None], generator)[0] for image in batch[0]],)
    size = len(batch)
    flip = torch.rand(size, generator=generator) < 0.5
    batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
    reach = max(1, min(batch.shape[2:]) // 8)
    padded = nn.functional.pad(batch, [reach] * 4, mode="reflect")
    offsets = torch.randint(0, 2 * reach + 1, (size, 2), generator=generator).tolist()
    height, width = batch.shape[2:]
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)])


def scenes(batch: Tensor, others: Sequence[Tensor], generator: Generator) -> Tensor:
    """Each image of ``batch`` [B, C, H, W] mirrored, enlarged, lit otherwise or put beside three of ``others`` [C, h, w].

    For models that answer for every place of an image: what they see there may then be anywhere, and of any size.
    """
    return torch.stack([_scene(image, others, generator) for image in batch])


def _scene(image: Tensor, others: Sequence[Tensor], generator: Generator) -> Tensor:
    height, width = image.shape[1:]
    if _uniform(generator) >= _MOSAICS:
        result = _cut(image, height, width, generator)
    else:
        chosen = torch.randint(len(others), (3,), generator=generator).tolist()
        y, x = (round(side * _uniform(generator, 1 / 3, 2 / 3)) for side in (height, width))
        places = [(y, x), (y, width - x), (height - y, x), (height - y, width - x)]
        parts = [
            _cut(part, *place, generator) for part, place in zip([image, *(others[n] for n in chosen)], places, strict=True)
        ]
        result = torch.cat([torch.cat(parts[:2], 2), torch.cat(parts[2:], 2)], 1)
    if _uniform(generator) < 0.5:
        return result
    mean, contrast, brightness = result.mean(), *(_uniform(generator, 1 - _LIGHT, 1 + _LIGHT) for _ in range(2))
    return ((result - mean) * contrast + mean * brightness).clamp(float(result.min()), float(result.max()))


def _cut(image: Tensor, height: int, width: int, generator: Generator) -> Tensor:
    """A part of ``image`` [C, H, W], perhaps mirrored, at another size."""
    image = image.flip(2) if _uniform(generator) < 0.5 else image
    sides = [max(1, round(side * _uniform(generator, _LEAST, 1.0))) for side in image.shape[1:]]
    top, left = (int(_uniform(generator, 0, whole - part + 1)) for whole, part in zip(image.shape[1:], sides, strict=True))
    part = image[None, :, top : top + sides[0], left : left + sides[1]]
    return F.interpolate(part, (height, width), mode="bilinear", align_corners=False, antialias=True)[0]


def _uniform(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
