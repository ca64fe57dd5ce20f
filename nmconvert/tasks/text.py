"""Text: files, tokenizers, and rows of token ids of unequal length."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmconvert.errors import DataError, UsageError
from nmconvert.extras import require
from nmconvert.tasks.base import unwrapped

IGNORED = -100  # the label of positions that have none, as in torch's cross entropy
_CHUNK = 100_000  # characters that are tokenised at once

SPECIALS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>"),
    "end": ("</s>", "<eos>", "[EOS]", "[SEP]", "<|endoftext|>"),
    "start": ("<s>", "<bos>", "[BOS]", "[CLS]", "<pad>", "<|endoftext|>"),
}


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, its line ends as ``\\n``; raises `DataError` with its path."""
    return _decoded(path).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, which end in ``\\n`` or ``\\r\\n``.

    And in nothing else that `str.splitlines` takes for an end, such as U+2028 within a sentence: files are read in parallel.
    """
    lines = [line.removesuffix("\r") for line in _decoded(path).split("\n")]
    return lines if lines[-1] else lines[:-1]


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    mark = len(BOM_UTF8) if content.startswith(BOM_UTF8) else 0  # editors on Windows write it; it is no text
    try:
        return content[mark:].decode()
    except UnicodeDecodeError as error:
        place = mark + error.start
        raise DataError(f"{path}: is no UTF-8 text: byte {place} is {content[place]:#04x}") from error


@lru_cache(maxsize=8)
def load_tokenizer(path: str) -> Any:
    """The ``tokenizers.Tokenizer`` of a ``tokenizer.json``, or of a folder that has one; it neither cuts nor pads."""
    tokenizers = require("tokenizers", "text")
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"{file}: there is no such tokenizer; give a tokenizer.json of the tokenizers library")
    try:
        found = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises this very class
        raise DataError(f"{file}: is no tokenizer.json: {error}") from error
    found.no_truncation()  # what the file was last used with is stored in it, and would be done to whole texts
    found.no_padding()
    return found


def special(tokenizer: Any, kind: str, path: str) -> int:
    """The id of the ``pad``, ``end`` or ``start`` token, by the names that are usual."""
    found = next((i for name in SPECIALS[kind] if (i := tokenizer.token_to_id(name)) is not None), None)
    if found is None:
        raise DataError(f"{path}: the tokenizer has no {kind} token: none of {', '.join(SPECIALS[kind])}")
    return int(found)


def encode(text: str, tokenizer: str | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids of ``text``, without special tokens, and where in its UTF-8 bytes each token ends.

    Without a tokenizer, ids are the bytes. With one, long texts are cut at line ends into pieces of some 100,000
    characters.
    """
    if tokenizer is None:
        found = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        return found, np.arange(1, len(found) + 1)
    ids: list[NDArray[np.int64]] = []
    ends: list[NDArray[np.int64]] = []
    before = 0
    for piece in _pieces(text):
        encoded = load_tokenizer(tokenizer).encode(piece, add_special_tokens=False)
        width = np.array([0, *(len(c.encode()) for c in piece)]).cumsum()
        ids.append(np.array(encoded.ids, np.int64))
        ends.append(before + width[np.array([end for _, end in encoded.offsets], int)])
        before += int(width[-1])
    nothing = np.zeros(0, np.int64)
    return np.concatenate([nothing, *ids]), np.concatenate([nothing, *ends])


def padded(rows: Sequence[Sequence[int] | NDArray[np.int64]], fill: int) -> Tensor:
    """Rows of ids as int64 [B, longest], filled up on the right."""
    found = torch.full((len(rows), max((len(row) for row in rows), default=0)), fill, dtype=torch.int64)
    for number, row in enumerate(rows):
        found[number, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return found


def check_ids(model: Any, ids: Tensor) -> None:
    """Raise where an id is beyond the model's vocabulary, if it says how large that is."""
    model = unwrapped(model)
    size = getattr(getattr(model, "config", None), "vocab_size", None) or getattr(model, "vocab_size", None)
    if size is not None and ids.numel() and int(ids.max()) >= size:
        raise DataError(f"token {int(ids.max())} is out of range: the model knows {size}; is the tokenizer another model's?")


def lengthened(ids: Tensor, length: int | None, fill: int) -> Tensor:
    """``ids`` [B, T] filled up to [B, length], for a graph that takes no other; as it is where ``length`` is None."""
    if length is None or ids.shape[1] == length:
        return ids
    if ids.shape[1] > length:
        raise DataError(f"{ids.shape[1]} tokens, but the graph takes {length}: set a smaller block or max_length")
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=fill)


def fixed_length(model: Any, name: str) -> int | None:
    """The length that an ONNX graph's input [B, T] ``name`` is fixed to, None where it is free or no ONNX file."""
    inputs = getattr(model, "inputs", None)
    if not isinstance(inputs, dict) or name not in inputs or len(inputs[name].shape) < 2:
        return None
    length = inputs[name].shape[1]
    return length if isinstance(length, int) else None


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = text.find("\n", start + _CHUNK)
        stop = len(text) if cut < 0 else cut + 1
        yield text[start:stop]
        start = stop
