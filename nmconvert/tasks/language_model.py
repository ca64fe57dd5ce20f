"""Language modelling: ``model(input_ids) → logits`` as in Hugging Face's causal models, measured by perplexity.

The token at each position is predicted from those before it, within one block. ``logits[:, t]`` predicts what follows
``input_ids[:, t]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

from nmconvert.errors import DataError
from nmconvert.tasks.base import Batch, Gather, Predict, Samples, Split, held_out, part_names, tensor_of, text_misfit
from nmconvert.tasks.distillation import kl
from nmconvert.tasks.labelled import open_npz
from nmconvert.tasks.text import IGNORED, check_ids, encode, fixed_length, lengthened, padded, read_text

Window = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Ids, and the number of bytes that each stands for; at least two of them, of which block + 1 are used."""


@dataclass(frozen=True)
class LanguageModel:
    """The task.

    Attributes:
        tokenizer: a ``tokenizer.json`` of the tokenizers library, or a folder with one; by default the bytes of the text
            are the tokens.
        block: how many tokens the model sees at once. Training starts its blocks at random places.
        temperature: of the distillation.
    """

    tokenizer: str | None = None
    block: int = 256
    temperature: float = 1.0

    name: ClassVar[str] = "language_model"
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    misfit: ClassVar[str] = text_misfit("block")

    def dataset(self, data: str, *, split: Split, augment: bool) -> Samples:
        """Blocks of a text.

        - A text file, UTF-8; of one in one piece the last tenth is the validation part.
        - A folder with ``train.txt`` and ``val.txt`` (or ``test.txt``), or the same as ``.npz``.
        - An ``.npz`` file with ``ids`` [n], tokenised already, and ``lengths`` of the documents in it, if it has several:
          each is then a block of its own, cut at ``block`` tokens; of those in one piece every tenth is held out.

        Raises:
            DataError: there is none of these, or it has no two tokens.
        """
        ids, widths, starts = self._tokens(data, split)
        if not len(starts):
            held = "" if split == "test" else ", and of documents in one piece every tenth is held out"
            raise DataError(f"{data}: no text for the split '{split}': a block needs two tokens{held}")
        change = partial(_shifted, self.block) if augment else None
        return Samples(partial(_window, ids, widths, starts), len(starts), augment=change)

    def _tokens(self, data: str, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[int, int]]]:
        path, whole = _part(Path(data), split)
        if path.suffix == ".npz":
            ids, lengths = _stored(path)
            widths = np.zeros(len(ids), np.int64)
            if lengths is not None:
                firsts = lengths.cumsum() - lengths
                ranges = [(int(i), int(i + min(n, self.block))) for i, n in zip(firsts, lengths, strict=True) if n > 1]
                return ids, widths, ranges if whole else [ranges[i] for i in held_out(len(ranges), split)]
        else:
            ids, ends = encode(read_text(path), self.tokenizer)
            widths = np.diff(ends, prepend=0)
        if not whole and split != "test":
            cut = len(ids) * 9 // 10
            ids, widths = (ids[:cut], widths[:cut]) if split == "train" else (ids[cut:], widths[cut:])
        reach = 2 * self.block if split == "train" else self.block + 1
        return ids, widths, [(i, min(i + reach, len(ids))) for i in range(0, len(ids) - 1, self.block)]

    def collate(self, samples: Sequence[Window]) -> Batch:
        """``inputs`` int64 [B, T], ``labels`` the same moved by one, -100 beyond the end of a block."""
        ids = [window[0][: self.block + 1] for window in samples]
        labels = padded([row[1:] for row in ids], IGNORED)
        width = int(sum(window[1][1 : self.block + 1].sum() for window in samples))
        return Batch(padded([row[:-1] for row in ids], 0), {"labels": labels, "bytes": width}, int((labels >= 0).sum()))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Cross entropy, a mean over tokens."""
        return _cross_entropy(_logits(model, batch.inputs), batch.targets["labels"], "mean")

    def distill(self, model: Any, teacher: Any, batch: Batch) -> Tensor:
        """T² KL(teacher ‖ model) of the next token, a mean over tokens."""
        with torch.no_grad():
            goal = _logits(teacher, batch.inputs)
        counted = batch.targets["labels"] != IGNORED
        return kl(_logits(model, batch.inputs)[counted], goal[counted], self.temperature)

    def taught(self, teacher: Any, batch: Batch) -> Batch:
        """The batch itself: a text is its own label."""
        return batch

    def predictor(self, model: Any) -> Predict:
        """``input_ids`` [B, T] → logits [B, T, vocabulary]."""
        return partial(_logits, model)

    def evaluate(self, predict: Predict, loader: Iterable[Batch], *, gather: Gather = list) -> dict[str, float]:
        """``perplexity``, ``loss`` in nats per token, and ``bits_per_byte`` where the data is text."""
        counts: list[tuple[float, int, int]] = []
        for batch in loader:
            with torch.inference_mode():
                loss = _cross_entropy(predict(batch.inputs), batch.targets["labels"], "sum")
            counts.append((float(loss), batch.size, batch.targets["bytes"]))
        total, tokens, width = (sum(column) for column in zip((0.0, 0, 0), *gather(counts), strict=True))
        if not tokens:
            raise DataError("no text to evaluate on")
        loss = total / tokens
        result = {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}  # e^710 is beyond a float
        return result | ({"bits_per_byte": total / math.log(2) / width} if width else {})


def _logits(model: Any, ids: Tensor) -> Tensor:
    check_ids(model, ids)
    if isinstance(model, nn.Module):
        logits = tensor_of(model(ids))
    else:
        fitted = lengthened(ids, fixed_length(model, next(iter(model.inputs))), 0)
        extras = {
            "attention_mask": torch.ones_like(fitted),
            "position_ids": torch.arange(fitted.shape[1]).expand(len(fitted), -1),
        }
        logits = tensor_of(model(fitted, **{name: value for name, value in extras.items() if name in model.inputs}))
        logits = logits[:, : ids.shape[1]]
    if logits.shape[:2] != ids.shape or logits.ndim != 3:
        raise DataError(
            f"the model returned a tensor {[*logits.shape]} for input_ids {[*ids.shape]}; "
            "language modelling needs [batch, tokens, vocabulary]"
        )
    return logits


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    highest = int(labels.max()) if labels.numel() else 0
    if highest >= logits.shape[-1]:
        raise DataError(f"token {highest} is out of range: the model predicts {logits.shape[-1]}; another tokenizer?")
    goal = labels.to(logits.device).flatten()
    return F.cross_entropy(logits.float().flatten(0, 1), goal, ignore_index=IGNORED, reduction=reduction)


def _part(path: Path, split: Split) -> tuple[Path, bool]:
    if path.is_file():
        return path, False
    for part in part_names(split):
        for suffix in (".txt", ".npz"):
            if (path / f"{part}{suffix}").is_file():
                return path / f"{part}{suffix}", True
    raise DataError(f"{path}: language modelling takes a text file, or a folder with train.txt and val.txt")


def _stored(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """The ids of a file and the lengths of its documents, None where it is one; raises `DataError` where they are none."""
    with open_npz(path) as stored:
        if "ids" not in stored:
            raise DataError(f"{path}: has no array 'ids', only {', '.join(stored) or 'nothing'}")
        found = {name: stored[name].ravel() for name in ("ids", "lengths") if name in stored}
    for name, numbers in found.items():
        if numbers.dtype.kind not in "ui":
            raise DataError(f"{path}: '{name}' is {numbers.dtype}; whole numbers are needed")
        if numbers.min(initial=0) < 0:
            raise DataError(f"{path}: '{name}' holds {numbers.min()}; it counts from 0")
    ids, lengths = found["ids"].astype(np.int64), found.get("lengths")
    if lengths is not None and lengths.sum() != len(ids):
        raise DataError(f"{path}: 'lengths' add up to {lengths.sum()}, but there are {len(ids)} 'ids'")
    return ids, None if lengths is None else lengths.astype(np.int64)


def _window(ids: NDArray[np.int64], widths: NDArray[np.int64], starts: list[tuple[int, int]], index: int) -> Window:
    start, stop = starts[index]
    return ids[start:stop], widths[start:stop]


def _shifted(block: int, window: Window, rng: Generator) -> Window:
    first = int(rng.integers(0, max(len(window[0]) - block, 1)))
    return window[0][first:], window[1][first:]
