"""g2p (Park, Apache-2.0): letters → phonemes with two GRUs; the module of ``g2p.pt``, which `benchmarks/data.py g2p` makes.

    python benchmarks/models/g2p.py g2p        # word accuracy 68.0 %, phoneme error rate 9.62 % on the first 2,000 words

Of its weights only the output layer is a linear layer: what nmconvert does with the others (GRUs, embeddings) is to leave
them dense, with the reason.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

LETTERS, PHONEMES, WIDTH = 29, 74, 256
PAD, UNKNOWN, LETTER_END = 0, 1, 2
START, END, LONGEST = 2, 3, 20


class Half(nn.Module):
    """An embedding and a GRU."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, 256] and the last state [1, B, 256]."""
        outputs, last = self.gru(self.embedding(ids), state)
        return outputs, last


class G2P(nn.Module):
    """``input_ids`` [B, S] (letters, then 2), ``decoder_input_ids`` [B, T] (2, then phonemes) → logits [B, T, 74].

    The rows of ``input_ids`` have one length: there is no padding in this model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.fc = Half(LETTERS), Half(PHONEMES), nn.Linear(WIDTH, PHONEMES)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """The logits of what follows each phoneme."""
        _, state = self.encoder(input_ids)
        logits: Tensor = self.fc(self.decoder(decoder_input_ids, state)[0])
        return logits

    @torch.inference_mode()
    def generate(self, input_ids: Tensor) -> Tensor:
        """The likeliest phonemes of words of one length: ids [B, 20], those after the first 3 without meaning."""
        _, state = self.encoder(input_ids)
        ids = torch.full((len(input_ids), 1), START)
        found = []
        for _ in range(LONGEST):
            output, state = self.decoder(ids, state)
            ids = self.fc(output).argmax(-1)
            found.append(ids)
        return torch.cat(found, 1)


def g2p() -> G2P:
    """The module of ``g2p.pt``."""
    return G2P()


def measure(model: G2P, folder: Path, count: int = 2000) -> dict[str, float]:
    """Word accuracy and phoneme error rate in percent on the first ``count`` words of ``words.tsv``.

    A word counts as right if it is said like any of its pronunciations; errors are counted to the nearest of them.
    """
    symbols = json.loads((folder / "symbols.json").read_text())
    numbers = {letter: number for number, letter in enumerate(symbols["graphemes"])}
    known: dict[str, list[list[str]]] = {}
    for line in (folder / "words.tsv").read_text("utf-8").splitlines():
        word, pronunciation = line.split("\t")[:2]
        known.setdefault(word, []).append(pronunciation.split())
    words = list(known)[:count]
    right, errors, total = 0, 0, 0
    for length in sorted({len(word) for word in words}):
        chosen = [word for word in words if len(word) == length]
        rows = [[*(numbers.get(letter, UNKNOWN) for letter in word), LETTER_END] for word in chosen]
        for word, ids in zip(chosen, model.generate(torch.tensor(rows)).tolist(), strict=True):
            ids = ids[: ids.index(END)] if END in ids else ids
            said = [symbols["phonemes"][i] for i in ids]
            distance, wanted = min(((edits(said, p), len(p)) for p in known[word]), key=lambda pair: pair[0] / pair[1])
            right, errors, total = right + (distance == 0), errors + distance, total + wanted
    return {"word_accuracy": 100 * right / len(words), "phoneme_error_rate": 100 * errors / total}


def edits(said: list[str], wanted: list[str]) -> int:
    """The fewest insertions, deletions and replacements that make one of the other (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for i, phoneme in enumerate(said, 1):
        before, row = row, [i]
        for j, other in enumerate(wanted, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (phoneme != other)))
    return row[-1]


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python benchmarks/models/g2p.py FOLDER [CHECKPOINT]")
    model = g2p()
    file = Path(sys.argv[2]) if len(sys.argv) == 3 else Path(sys.argv[1]) / "g2p.pt"
    model.load_state_dict(torch.load(file, weights_only=True))
    print({name: round(value, 2) for name, value in measure(model.eval(), Path(sys.argv[1])).items()})
