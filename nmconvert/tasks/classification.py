"""Image classification: ``model(images) → logits``, measured by top-1 and top-5 accuracy in percent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from nmconvert.errors import DataError, UsageError
from nmconvert.tasks import images
from nmconvert.tasks.base import IMAGE_MISFIT, Batch, Gather, Predict, Samples, Split, need_labels, on_bad, tensor_of
from nmconvert.tasks.distillation import kl
from nmconvert.tasks.labelled import Source, open_source

Pair = tuple[NDArray[Any] | Tensor, int]
"""An image, uint8 [H, W, C] or float [C, H, W], and its label; -1 where there is none."""

SMALL = 96  # pixels; from here down an image is a CIFAR-like thumbnail, that is shifted and not cropped


@dataclass(frozen=True)
class Classification:
    """The task; see `nmconvert.tasks.labelled.open_source` for its data.

    Attributes:
        mean: subtracted from uint8 images after division by 255, one per channel; float images are taken as they are.
            Gray images become as many channels as there are means, so that one mean is for a model of gray images.
        std: divides after that.
        size: the side of what the model sees. By default that of the first image to train on where it is at most 96
            pixels, else 224: the shorter side is resized to 256/224 of that, and the middle cut out.
        flip: augmented images are mirrored at random; switch it off for digits and letters.
        crop: augmented thumbnails are shifted by up to so many pixels; larger images get a random resized crop.
        label_smoothing: as in Szegedy et al. 2016, section 7.
        temperature: of the distillation (Hinton et al. 2015).
        skip_bad: images that cannot be read are left out, with a warning.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: int | None = None
    flip: bool = True
    crop: int = 4
    label_smoothing: float = 0.0
    temperature: float = 2.0
    skip_bad: bool = False

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "top1"
    higher_is_better: ClassVar[bool] = True
    misfit: ClassVar[str] = IMAGE_MISFIT

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            counts = f"mean has {len(self.mean)} and std {len(self.std)}"
            raise UsageError(f"{counts} values: give one of each for every channel of the model, as in --mean 0.5 --std 0.25")

    def dataset(self, data: str, *, split: Split, augment: bool) -> Samples:
        """Samples of an image folder, an .npz file, or ``package.module:callable``."""
        source = open_source(data, split)
        size = self.size or _natural_size(source, self.skip_bad)

        read = partial(_read, source, 0 if source.fixed_size and self.size is None else size, augment)
        change = partial(self._augmented, size) if augment else None
        return Samples(read, len(source), augment=change, bad=on_bad(self.skip_bad, split))

    def _augmented(self, size: int, sample: Pair, rng: Generator) -> Pair:
        image, label = sample
        if isinstance(image, Tensor):
            return sample  # a callable's own dataset augments for itself
        channels_first = image.dtype != np.uint8
        pixels = image.transpose(1, 2, 0) if channels_first else image
        if size > SMALL and not channels_first:
            pixels = images.random_resized_crop(pixels, size, rng)
        elif self.crop:
            pixels = images.shifted(pixels, self.crop, rng)
        if self.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if channels_first else pixels), label

    def collate(self, samples: Sequence[Pair | None]) -> Batch:
        """Images as float [B, C, H, W], normalised; labels as int64 [B]."""
        kept = [sample for sample in samples if sample is not None]
        labels = torch.tensor([int(label) for _, label in kept], dtype=torch.int64)
        lowest, highest = (int(labels.min()), int(labels.max())) if kept else (0, 0)
        pixels = self._stacked([image for image, _ in kept]) if kept else torch.zeros(0)
        targets = {"labels": labels, "highest": highest}
        return Batch(pixels, targets, size=len(kept), labelled=lowest >= 0)

    def _stacked(self, arrays: Sequence[NDArray[Any] | Tensor]) -> Tensor:
        arrays = [self._coloured(a) for a in arrays]
        shapes = {tuple(a.shape) for a in arrays}
        if len(shapes) > 1:
            raise DataError(f"images of different sizes in one batch, {sorted(shapes)[:2]}: set size, e.g. size=224")
        if isinstance(arrays[0], Tensor):
            tensors = torch.stack([torch.as_tensor(a) for a in arrays])
            return tensors.float() if tensors.is_floating_point() else tensors
        stacked = torch.from_numpy(np.stack([np.asarray(a) for a in arrays]))
        if stacked.dtype != torch.uint8:
            return stacked.float()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        channels = stacked.permute(0, 3, 1, 2).contiguous().float() / 255
        if channels.shape[1] not in (1, mean.shape[1]) and mean.shape[1] != 1:
            raise DataError(f"images of {channels.shape[1]} channels, but {mean.shape[1]} means: set mean and std")
        return (channels - mean) / std

    def _coloured(self, pixels: NDArray[Any] | Tensor) -> NDArray[Any] | Tensor:
        gray = pixels.dtype == np.uint8 and pixels.shape[2] == 1
        return np.broadcast_to(pixels, (*pixels.shape[:2], len(self.mean))) if gray else pixels

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Cross entropy, a mean over images."""
        _need_labels(batch)
        logits = tensor_of(model(batch.inputs))
        _check_labels(batch, logits)
        return F.cross_entropy(logits.float(), batch.targets["labels"], label_smoothing=self.label_smoothing)

    def distill(self, model: Any, teacher: Any, batch: Batch) -> Tensor:
        """T² KL(teacher ‖ model) of the classes at temperature T, a mean over images (Hinton et al. 2015)."""
        with torch.no_grad():
            goal = tensor_of(teacher(batch.inputs))
        return kl(tensor_of(model(batch.inputs)), goal, self.temperature)

    def taught(self, teacher: Any, batch: Batch) -> Batch:
        """Labelled with the teacher's best classes: top-1 is then how often the model agrees with it."""
        with torch.no_grad():
            labels = tensor_of(teacher(batch.inputs)).argmax(1)
        return replace(batch, targets={"labels": labels, "highest": int(labels.max())}, labelled=True)

    def predictor(self, model: Any) -> Predict:
        """Images → logits [B, classes]."""
        return lambda inputs: tensor_of(model(inputs))

    def evaluate(self, predict: Predict, loader: Iterable[Batch], *, gather: Gather = list) -> dict[str, float]:
        """``top1`` and ``top5`` in percent, and ``loss``, the mean cross entropy."""
        counts: list[tuple[int, int, int, float]] = []
        for batch in loader:
            if batch.size:
                _need_labels(batch)
                _check_finite(batch, sum(count for count, *_ in counts))
                with torch.inference_mode():
                    logits = predict(batch.inputs).float()
                _check_labels(batch, logits)
                counts.append(_count(logits, batch.targets["labels"].to(logits.device)))
        size, top1, top5, loss = (sum(column) for column in zip((0, 0, 0, 0.0), *gather(counts), strict=True))
        if not size:
            raise DataError("no image to evaluate on: the data is empty, or none of it can be read")
        return {"top1": 100 * top1 / size, "top5": 100 * top5 / size, "loss": loss / size}


def _count(logits: Tensor, labels: Tensor) -> tuple[int, int, int, float]:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return len(labels), int(best[:, 0].sum()), int(best.sum()), float(loss)


def _need_labels(batch: Batch) -> None:
    """As `need_labels`; where some images of the batch have labels, what is wrong with the others is said."""
    if not batch.labelled and batch.targets["highest"] >= 0:
        number = int(batch.targets["labels"].min())
        raise DataError(f"an image has the label {number}, others have one of 0 or more: repair it, or leave the image out")
    need_labels(batch)


def _check_finite(batch: Batch, before: int) -> None:
    """Raise where an image holds NaN or infinity; ``before`` it and its batch this process has measured so many."""
    if isinstance(batch.inputs, Tensor) and batch.inputs.is_floating_point():
        bad = (~torch.isfinite(batch.inputs).flatten(1).all(1)).nonzero()
        if len(bad):
            raise DataError(f"sample {before + int(bad[0])} of those to be measured holds NaN or infinity: repair or remove it")


def _check_labels(batch: Batch, logits: Tensor) -> None:
    if logits.ndim != 2:
        raise DataError(f"the model returned a tensor {[*logits.shape]}; classification needs [batch, classes]")
    if batch.targets["highest"] >= logits.shape[1]:
        raise DataError(
            f"label {batch.targets['highest']} is out of range: the model has {logits.shape[1]} classes, "
            f"0 to {logits.shape[1] - 1}"
        )


def _natural_size(source: Source, skip_bad: bool) -> int:
    if source.fixed_size:
        return 0
    for path, _ in source.sizing():
        try:
            height, width = images.read_image(path).shape[:2]
        except DataError:
            if not skip_bad:
                raise
        else:
            return height if height == width and height <= SMALL else 224
    raise DataError("none of the images can be read")


def _read(source: Source, size: int, augment: bool, index: int) -> Pair:
    image, label = source.read(index)
    if not size or isinstance(image, Tensor) or image.dtype != np.uint8:
        return image, label
    if size <= SMALL:
        return images.resize(image, size, size), label
    if augment:
        return image, label  # cropped by the augmentation, at random
    return images.centre_crop(images.resize_shorter(image, round(size * 256 / 224)), size), label
