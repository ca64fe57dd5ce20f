"""g2p, letters to phonemes by two GRUs: which of its weights can be 2:4, what that costs, and what training gives back.

    python benchmarks/data.py g2p WORK/data/g2p
    python -m benchmarks.finetune_g2p WORK [EPOCHS]     # word accuracy ↑ and phoneme error rate ↓ on the first 2,000 words

By its module only ``fc`` is a layer that nmconvert trains, exports and speeds up. By name alone, `nmconvert prune` without
``--model`` takes the GRUs' matrices for linear layers and prunes them, too: possible in the file, but no runtime gains from it.
The embeddings stay dense either way: a lookup reads whole rows. Training is the three-line API in a loop of its own, on the
18,000 words that are not measured; the dense model's phonemes are the labels.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import nmconvert
from benchmarks.models.g2p import END, G2P, LETTER_END, START, UNKNOWN, g2p, measure
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.srste.sparse import METHODS, Method

MEASURED, BATCH, RATE, DECAY = 2000, 64, 5e-4, 20.0


def unmeasured_words(folder: Path) -> list[Tensor]:
    """The letters of the other words, ended: [n, length + 1] for each length, so that nothing is padded."""
    numbers = {letter: number for number, letter in enumerate(json.loads((folder / "symbols.json").read_text())["graphemes"])}
    words = dict.fromkeys(line.split("\t")[0] for line in (folder / "words.tsv").read_text("utf-8").splitlines())
    by_length: dict[int, list[list[int]]] = {}
    for word in list(words)[MEASURED:]:
        by_length.setdefault(len(word), []).append([*(numbers.get(letter, UNKNOWN) for letter in word), LETTER_END])
    return [torch.tensor(rows) for rows in by_length.values()]


def batches(words: list[Tensor], epoch: int) -> Iterator[Tensor]:
    """Batches of words of one length, in an order of this epoch."""
    rng = np.random.default_rng(epoch)
    parts = [part for rows in words for part in rows[torch.from_numpy(rng.permutation(len(rows)))].split(BATCH)]
    yield from (parts[number] for number in rng.permutation(len(parts)))


def finetune(dense: G2P, words: list[Tensor], method: Method, epochs: int) -> G2P:
    """A copy of ``dense`` whose output layer is 2:4."""
    model, steps = copy.deepcopy(dense), epochs * sum(1 for _ in batches(words, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    sparse = nmconvert.sparsify(model, "2:4", include=["fc.weight"], method=method, decay=DECAY)
    sparse.attach(optimizer, steps=steps, freeze_masks=0.3)
    for epoch in range(epochs):
        for letters in batches(words, epoch):
            optimizer.zero_grad()
            distance(model, dense, letters).backward()
            optimizer.step()
            schedule.step()
    sparse.finalize()
    return model


def distance(model: G2P, dense: G2P, letters: Tensor) -> Tensor:
    """KL(dense ‖ model) of the next phoneme, a mean over those that ``dense`` says, its end included."""
    said = dense.generate(letters)
    before = F.pad(said[:, :-1], (1, 0), value=START)
    counted = (before == END).cumsum(1) == 0
    with torch.no_grad():
        goal = dense(letters, before)[counted].log_softmax(-1)
    return F.kl_div(model(letters, before)[counted].log_softmax(-1), goal, reduction="batchmean", log_target=True)


def main(work: Path, epochs: int) -> None:
    """Every figure on a line of its own."""
    torch.set_num_threads(1)
    folder = work / "data" / "g2p"

    def report(what: str, model: G2P, began: float) -> None:
        found = ", ".join(f"{name} {value:.2f}" for name, value in measure(model.eval(), folder).items())
        print(f"{what:40s} {found}, {time.process_time() - began:.0f} s", flush=True)

    def loaded(file: Path) -> G2P:
        model = g2p()
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()

    dense = loaded(folder / "g2p.pt")
    report("dense", dense, time.process_time())
    one_shot = {"fc (2 %), magnitude": ["fc.weight"], "fc and GRUs (97 %), by name, magnitude": ["fc.weight", "*gru.weight*"]}
    for what, include in one_shot.items():
        output = work / "g2p.pruned.pt"
        prune(folder / "g2p.pt", Pattern(2, 4), "channel", include=include, output=output)
        report(what, loaded(output), time.process_time())
    words = unmeasured_words(folder)
    for method in METHODS:
        began = time.process_time()
        report(f"fc, {method}, {epochs} epochs", finetune(dense, words, method, epochs), began)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m benchmarks.finetune_g2p WORK [EPOCHS]")
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 2)
