"""English sentences and their German translations, made by rule: ``python -m sample_models.sentences OUT``.

The rules are German's own: three genders, three cases, endings of adjectives after definite and indefinite articles, the
participle at the end of the clause, and the verb at its end after "weil".
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator

PARTS = {"train": 12_000, "val": 400}

NOUNS = {  # gender, German
    "dog": "m Hund", "cat": "f Katze", "horse": "n Pferd", "teacher": "m Lehrer", "woman": "f Frau", "child": "n Kind",
    "friend": "m Freund", "doctor": "f Ärztin", "girl": "n Mädchen", "king": "m König", "queen": "f Königin",
    "animal": "n Tier", "brother": "m Bruder", "sister": "f Schwester", "baby": "n Baby", "baker": "m Bäcker",
}  # fmt: skip
THINGS = {
    "table": "m Tisch", "lamp": "f Lampe", "book": "n Buch", "apple": "m Apfel", "flower": "f Blume", "bread": "n Brot",
    "key": "m Schlüssel", "bottle": "f Flasche", "letter": "m Brief", "picture": "n Bild", "clock": "f Uhr",
    "car": "n Auto", "chair": "m Stuhl", "bag": "f Tasche", "house": "n Haus",
}  # fmt: skip
PLACES = {
    "garden": "m Garten", "kitchen": "f Küche", "room": "n Zimmer", "forest": "m Wald", "city": "f Stadt",
    "village": "n Dorf", "street": "f Straße",
}  # fmt: skip
ADJECTIVES = {
    "small": "klein", "big": "groß", "old": "alt", "young": "jung", "red": "rot", "green": "grün", "new": "neu",
    "beautiful": "schön", "bad": "schlecht", "good": "gut",
}  # fmt: skip
VERBS = {  # past, German present, German participle
    "sees": "seen sieht gesehen", "finds": "found findet gefunden", "buys": "bought kauft gekauft",
    "paints": "painted malt gemalt", "carries": "carried trägt getragen", "takes": "taken nimmt genommen",
    "brings": "brought bringt gebracht", "loves": "loved liebt geliebt", "seeks": "sought sucht gesucht",
    "draws": "drawn zeichnet gezeichnet", "shows": "shown zeigt gezeigt", "steals": "stolen stiehlt gestohlen",
}  # fmt: skip
ADVERBS = {"today": "heute", "often": "oft", "never": "nie", "always": "immer"}

ARTICLES = {  # definite and indefinite, by case and gender
    "nom": {"m": ("der", "ein"), "f": ("die", "eine"), "n": ("das", "ein")},
    "acc": {"m": ("den", "einen"), "f": ("die", "eine"), "n": ("das", "ein")},
    "dat": {"m": ("dem", "einem"), "f": ("der", "einer"), "n": ("dem", "einem")},
}
ENDINGS = {
    "nom": {"m": ("e", "er"), "f": ("e", "e"), "n": ("e", "es")},
    "acc": {"m": ("en", "en"), "f": ("e", "e"), "n": ("e", "es")},
    "dat": {"m": ("en", "en"), "f": ("en", "en"), "n": ("en", "en")},
}

Pair = tuple[str, str]


def phrase(nouns: dict[str, str], case: str, rng: Generator) -> Pair:
    """An article, up to two adjectives and a noun."""
    english, german = list(nouns.items())[rng.integers(len(nouns))]
    gender, word = german.split()
    indefinite = int(rng.integers(2))
    chosen = [list(ADJECTIVES.items())[i] for i in rng.choice(len(ADJECTIVES), rng.integers(0, 3), replace=False)]
    before = [adjective + ENDINGS[case][gender][indefinite] for _, adjective in chosen]
    words = [*(a for a, _ in chosen), english]
    article = ("an" if words[0][0] in "aeiou" else "a") if indefinite else "the"
    return " ".join([article, *words]), " ".join([ARTICLES[case][gender][indefinite], *before, word])


def clause(rng: Generator, *, subordinate: bool = False) -> Pair:
    """Who does what, where; in the present or the perfect."""
    subject, thing = phrase(NOUNS, "nom", rng), phrase(THINGS if rng.random() < 0.7 else NOUNS, "acc", rng)
    verb, forms = list(VERBS.items())[rng.integers(len(VERBS))]
    past, present, participle = forms.split()
    adverb = list(ADVERBS.items())[rng.integers(len(ADVERBS))] if rng.random() < 0.4 else None
    place = phrase(PLACES, "dat", rng) if rng.random() < 0.5 else None
    perfect = rng.random() < 0.4
    english = [subject[0], f"has {past}" if perfect else verb, thing[0]]
    english += [f"in {place[0]}"] if place else []
    english += [adverb[0]] if adverb else []
    middle = [*([adverb[1]] if adverb else []), thing[1], *([f"in {place[1]}"] if place else [])]
    finite, rest = ("hat", [participle]) if perfect else (present, [])
    german = [subject[1], *middle, *rest, finite] if subordinate else [subject[1], finite, *middle, *rest]
    return " ".join(english), " ".join(german)


def sentence(rng: Generator) -> Pair:
    """One clause, or two with a reason."""
    english, german = clause(rng)
    if rng.random() < 0.4:
        reason = clause(rng, subordinate=True)
        english, german = f"{english} because {reason[0]}", f"{german} , weil {reason[1]}"
    return f"{english} .", f"{german} ."


@cache
def pairs(part: str) -> list[Pair]:
    """The sentences of a part, none of which the other has."""
    rng = np.random.default_rng(0)
    unique = dict.fromkeys(sentence(rng) for _ in range(sum(PARTS.values()) * 11 // 10))
    every = [*unique][: sum(PARTS.values())]
    return every[: PARTS["train"]] if part == "train" else every[PARTS["train"] :]


def write(out: Path) -> None:
    """``train.en``, ``train.de``, ``val.en`` and ``val.de`` in ``out``; the same on every machine."""
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        for ending, lines in zip(("en", "de"), zip(*pairs(part), strict=True), strict=True):
            (out / f"{part}.{ending}").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sample_models.sentences OUT")
    write(Path(sys.argv[1]))
