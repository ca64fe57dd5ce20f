"""Train ``digits.pt``, and write its data: ``python -m sample_models.train_digits``, some ten seconds on one core.

The data are scikit-learn's copy of the UCI handwritten digits, 1,797 images; the last 360, in its own order, are for
testing. The same seed, one thread and deterministic algorithms: a machine makes the same checkpoint each time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sample_models.digits import DigitsNet, digits

HERE = Path(__file__).parent
TEST_IMAGES = 360
EPOCHS = 30
BATCH = 64


def data() -> dict[str, NDArray[np.generic]]:
    """``train_images`` and ``test_images`` float32 [N, 1, 8, 8] in [0, 1], ``train_labels`` and ``test_labels`` int64 [N]."""
    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    split = len(labels) - TEST_IMAGES
    return {
        "train_images": images[:split],
        "train_labels": labels[:split],
        "test_images": images[split:],
        "test_labels": labels[split:],
    }


def train(images: Tensor, labels: Tensor) -> DigitsNet:
    """A trained model: SGD with Nesterov momentum, one-cycle learning rate, images shifted by up to a pixel."""
    torch.manual_seed(0)
    model = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = EPOCHS * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH)[: len(labels) // BATCH]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(shifted(images[batch])), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def shifted(images: Tensor) -> Tensor:
    """``images`` [N, 1, 8, 8], all moved by the same -1, 0 or 1 pixel in each direction."""
    down, right = (int(torch.randint(0, 3, ())) for _ in range(2))
    return nn.functional.pad(images, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]


@torch.no_grad()
def top1(model: DigitsNet, images: Tensor, labels: Tensor) -> float:
    """Share of the images [N, 1, 8, 8] whose highest logit is their label's."""
    return float((model(images).argmax(dim=1) == labels).double().mean())


def main() -> None:
    """Write ``digits.npz`` and ``digits.pt`` beside this file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    arrays = data()
    np.savez_compressed(HERE / "digits.npz", **arrays)  # type: ignore[arg-type]
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    model = train(tensors["train_images"], tensors["train_labels"])
    accuracy = top1(model, tensors["test_images"], tensors["test_labels"])
    torch.save({"state_dict": model.state_dict(), "top1": accuracy}, HERE / "digits.pt")
    print(f"top-1 on {TEST_IMAGES} test images: {accuracy:.2%}")


if __name__ == "__main__":
    main()
