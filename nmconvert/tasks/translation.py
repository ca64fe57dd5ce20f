"""Machine translation: Hugging Face's encoder–decoder convention, measured by BLEU and chrF (sacrebleu).

``model(input_ids=, attention_mask=, labels=)`` returns logits [B, T, vocabulary] (or an object that has them), the
decoder having seen the labels moved right by one; ``model.generate(input_ids=, attention_mask=, max_new_tokens=)``
returns ids [B, ≤ max_new_tokens + 1], the start token first. An ONNX file has the inputs ``input_ids``,
``attention_mask`` and ``decoder_input_ids`` and the output ``logits``, and is decoded greedily here.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nmconvert.errors import DataError, UsageError
from nmconvert.extras import require
from nmconvert.tasks.base import (
    Batch,
    Gather,
    Predict,
    Samples,
    Split,
    held_out,
    need_labels,
    part_names,
    tensor_of,
    text_misfit,
)
from nmconvert.tasks.distillation import kl
from nmconvert.tasks.text import (
    IGNORED,
    check_ids,
    fixed_length,
    lengthened,
    load_tokenizer,
    padded,
    read_lines,
    read_text,
    special,
)

Pair = tuple[str, str | None]
"""A sentence and its translation, None where there is none."""


@dataclass(frozen=True)
class Translation:
    """The task.

    Attributes:
        source: the ending of the files that are translated from.
        target: the ending of those that are translated to.
        tokenizer: a ``tokenizer.json`` of the tokenizers library, or a folder with one, for both languages.
        max_length: longer sentences are cut to so many tokens, and no longer ones are generated.
        beams: for models whose ``generate`` has ``num_beams``.
        label_smoothing: as in Vaswani et al. 2017, section 5.4.
        temperature: of the distillation.
    """

    source: str = "en"
    target: str = "de"
    tokenizer: str | None = None
    max_length: int = 128
    beams: int = 1
    label_smoothing: float = 0.1
    temperature: float = 1.0

    name: ClassVar[str] = "translation"
    metric: ClassVar[str] = "bleu"
    higher_is_better: ClassVar[bool] = True
    misfit: ClassVar[str] = text_misfit("max_length")

    def dataset(self, data: str, *, split: Split, augment: bool) -> Samples:
        """Pairs of lines of two files: ``train.en`` and ``train.de`` in the folder ``data``, or ``data.en`` and ``data.de``.

        Where there is no target file, the pairs have no labels: to distill on. There is no augmentation. Pairs of which one
        is blank are left out, with a warning.

        Raises:
            DataError: a file is missing or empty, or they differ in their number of lines.
        """
        stem, whole = self._stem(Path(data), split)
        first, second = Path(f"{stem}.{self.source}"), Path(f"{stem}.{self.target}")
        sentences = read_lines(first)
        translations: Sequence[str | None] = [None] * len(sentences)
        if second.is_file():
            translations = read_lines(second)
        if len(sentences) != len(translations):
            raise DataError(f"{first} has {len(sentences)} lines, {second} {len(translations)}: a line is a pair")
        pairs = [pair for pair in zip(sentences, translations, strict=True) if all(s is None or s.strip() for s in pair)]
        if blank := len(sentences) - len(pairs):
            warnings.warn(
                f"{first}: {blank} of {len(sentences)} lines are left out: they or their translations are blank", stacklevel=2
            )
        pairs = pairs if whole else [pairs[i] for i in held_out(len(pairs), split)]
        if not pairs:
            raise DataError(f"{first}: no sentences for the split '{split}'")
        return Samples(pairs.__getitem__, len(pairs))

    def _stem(self, path: Path, split: Split) -> tuple[Path, bool]:
        stems = [path / part for part in part_names(split)]
        found = next((stem for stem in stems if Path(f"{stem}.{self.source}").is_file()), None)
        if found is not None:
            return found, True
        if Path(f"{path}.{self.source}").is_file():
            return path, False
        raise DataError(
            f"{path}: there is neither {path}.{self.source} nor {stems[0]}.{self.source}: "
            "two text files, line by line, make the data; --task-arg source=… and target=… are their endings"
        )

    def collate(self, samples: Sequence[Pair]) -> Batch:
        """``input_ids`` and ``attention_mask`` int64 [B, S]; ``labels`` int64 [B, T], ending in the end token."""
        tokenizer, pad = self._tokenizer(), self._special("pad")
        rows = [self._ids(tokenizer, sentence) for sentence, _ in samples]
        ids = padded(rows, pad)
        mask = padded([[1] * len(row) for row in rows], 0)
        targets: dict[str, Any] = {"references": [translation for _, translation in samples]}
        labelled = all(translation is not None for _, translation in samples)
        if labelled:
            targets["labels"] = padded([self._ids(tokenizer, str(goal)) for _, goal in samples], IGNORED)
        size = int((targets["labels"] != IGNORED).sum()) if labelled else int(mask.sum())
        return Batch({"input_ids": ids, "attention_mask": mask}, targets, size, labelled)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UsageError("translation needs the model's tokenizer: --task-arg tokenizer=path/to/tokenizer.json")
        return load_tokenizer(self.tokenizer)

    def _special(self, kind: str) -> int:
        return special(self._tokenizer(), kind, str(self.tokenizer))

    def _start(self) -> int:
        """What the decoder reads first: as the ``config.json`` beside the tokenizer says, or the token that is called so."""
        path = Path(str(self.tokenizer))
        config = (path if path.is_dir() else path.parent) / "config.json"
        told = json.loads(read_text(config)).get("decoder_start_token_id") if config.is_file() else None
        return told if isinstance(told, int) else self._special("start")

    def _ids(self, tokenizer: Any, sentence: str) -> list[int]:
        end = self._special("end")
        ids = tokenizer.encode(sentence).ids[: self.max_length]
        return [*ids[: self.max_length - 1], end] if not ids or ids[-1] != end else ids

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Cross entropy with smoothed labels, a mean over tokens."""
        need_labels(batch)
        labels = batch.targets["labels"]
        logits = _logits(model, batch.inputs, labels).flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, label_smoothing=self.label_smoothing)

    def distill(self, model: Any, teacher: Any, batch: Batch) -> Tensor:
        """T² KL(teacher ‖ model) of the next token, a mean over tokens of the translation.

        Without one, over those of the teacher's own (Kim and Rush 2016, "Sequence-Level Knowledge Distillation").
        """
        batch = batch if batch.labelled else self.taught(teacher, batch)
        labels = batch.targets["labels"]
        with torch.no_grad():
            goal = _logits(teacher, batch.inputs, labels)
        counted = labels != IGNORED
        return kl(_logits(model, batch.inputs, labels)[counted], goal[counted], self.temperature)

    def taught(self, teacher: Any, batch: Batch) -> Batch:
        """With the teacher's translations for references."""
        end = self._special("end")
        with torch.no_grad():
            rows = self._generate(teacher, batch.inputs)
        labels = padded([[*row, end] for row in rows], IGNORED).to(batch.inputs["input_ids"].device)
        return replace(batch, targets={"references": self._decoded(rows), "labels": labels}, labelled=True)

    def with_answers(self, teacher: Callable[[], Any], batch: Batch) -> dict[str, Tensor]:
        """The inputs, and ``decoder_input_ids`` [B, T]: the translation moved right; without one ``teacher()`` translates."""
        batch = batch if batch.labelled else self.taught(teacher(), batch)
        before = batch.targets["labels"][:, :-1]
        before = F.pad(before.masked_fill(before == IGNORED, self._special("pad")), (1, 0), value=self._start())
        return {**batch.inputs, "decoder_input_ids": before}

    def predictor(self, model: Any) -> Predict:
        """``input_ids`` and ``attention_mask`` → the translations, a list of strings."""
        return partial(self._translate, model)

    def _translate(self, model: Any, inputs: dict[str, Tensor]) -> list[str]:
        return self._decoded(self._generate(model, inputs))

    def _decoded(self, rows: Sequence[Sequence[int]]) -> list[str]:
        found: list[str] = self._tokenizer().decode_batch(rows, skip_special_tokens=True)
        return found

    def _generate(self, model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
        """The ids of the translations, without start, end and padding."""
        check_ids(model, inputs["input_ids"])
        if hasattr(model, "generate"):
            beams = {} if self.beams == 1 else {"num_beams": self.beams}
            if beams and not _takes(model.generate, "num_beams"):
                name = type(model).__name__
                raise UsageError(
                    f"beams={self.beams}: the generate of {name} has no num_beams; leave beams at 1, which is greedy"
                )
            ids = model.generate(**inputs, max_new_tokens=self.max_length, **beams)
        else:
            ids = greedy(model, inputs, self._start(), self._special("end"), self.max_length)
        end, pad, rows = self._special("end"), self._special("pad"), []
        for row in ids[:, 1:].tolist():
            rows.append([i for i in row[: row.index(end) if end in row else None] if i != pad])
        return rows

    def evaluate(self, predict: Predict, loader: Iterable[Batch], *, gather: Gather = list) -> dict[str, float]:
        """``bleu`` (13a tokenisation, sacrebleu's default) and ``chrf`` of the corpus."""
        sacrebleu = require("sacrebleu", "text")
        pairs: list[tuple[str, str]] = []
        for batch in loader:
            need_labels(batch)
            with torch.inference_mode():
                pairs += zip(predict(batch.inputs), batch.targets["references"], strict=True)
        pairs = gather(pairs)
        if not pairs:
            raise DataError("no sentences to evaluate on")
        found, wanted = [p[0] for p in pairs], [[p[1] for p in pairs]]
        return {
            "bleu": float(sacrebleu.corpus_bleu(found, wanted, force=True).score),
            "chrf": float(sacrebleu.corpus_chrf(found, wanted).score),
        }


def greedy(model: Any, inputs: dict[str, Tensor], start: int, end: int, max_length: int) -> Tensor:
    """The likeliest token at each step, until each row [B] has its ``end``; ids [B, ≤ max_length + 1] from ``start`` on."""
    fitted = {name: lengthened(value, fixed_length(model, name), 0) for name, value in inputs.items()}
    room = fixed_length(model, "decoder_input_ids")
    ids = torch.full((len(fitted["input_ids"]), 1), start, device=fitted["input_ids"].device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(min(max_length, room or max_length)):
        logits = tensor_of(model(**fitted, decoder_input_ids=lengthened(ids, room, end)))
        following = logits[:, ids.shape[1] - 1].argmax(-1)
        following[done] = end
        ids = torch.cat([ids, following[:, None]], 1)
        done |= following == end
        if done.all():
            break
    return ids


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _logits(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    check_ids(model, inputs["input_ids"])
    logits = tensor_of(model(**inputs, labels=labels))
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise DataError(
            f"the model returned a tensor {[*logits.shape]} for labels {[*labels.shape]}; "
            "translation needs [batch, tokens, vocabulary]"
        )
    return logits.float()
