"""Sentences of five corpora, and those of held-out reviews apart.

``python -m benchmarks.text_editing.sentences --out sentences.jsonl`` writes what an editor is trained on; with
``--films`` the two corpora of films' reviews alone, for a small one.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.core.data import data_folder, read_csv, read_jsonl

__all__ = ["Sentence", "held_out", "main", "of_films", "sentences_of", "training"]

HELD_OUT = 2000  # reviews of each corpus of films
SHORTEST, LONGEST = 3, 26  # words
MOST_CHARACTERS = 180
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


@dataclass(frozen=True)
class Sentence:
    """Holds a sentence, whether its review liked the film, and the review's number."""

    text: str
    liked: bool
    review: int


def sentences_of(text: str) -> Iterator[str]:
    """Yield the sentences of a text that have 3 to 26 words."""
    for line in re.sub(r"<br\s*/?>", " ", html.unescape(text)).split("\n"):
        for part in _END.split(re.sub(r"\s+", " ", line).strip()):
            found = part.strip()
            sized = SHORTEST <= len(found.split()) <= LONGEST and len(found) <= MOST_CHARACTERS
            if sized and found.isprintable() and re.search(r"[A-Za-z]{2}", found):
                yield found


@cache
def of_films() -> dict[str, tuple[list[Sentence], list[Sentence]]]:
    """Read the training and the held-out sentences of IMDB and of rt_polarity; no sentence is in two of these lists.

    The 2,000 held-out reviews of each corpus are the same in every run.
    """
    rng = random.Random(0)
    seen: set[str] = set()
    imdb = read_jsonl(data_folder("imdb") / "train.jsonl.xz")
    critics = read_jsonl(data_folder("rt_polarity") / "rt_polarity.jsonl.gz")
    apart = [set(_shuffled(len(rows), rng)[:HELD_OUT]) for rows in (imdb, critics)]
    cuts: list[Callable[[str], Iterator[str]]] = [sentences_of, _whole]
    found: dict[tuple[str, bool], list[Sentence]] = {}
    for held in (True, False):
        for name, rows, chosen, cut in zip(("imdb", "rt_polarity"), (imdb, critics), apart, cuts, strict=True):
            here = found.setdefault((name, held), [])
            for number, row in enumerate(rows):
                if (number in chosen) == held:
                    for text in cut(row["text"]):
                        if text.lower() not in seen:
                            seen.add(text.lower())
                            here.append(Sentence(text, bool(row["label"]), number))
    return {name: (found[name, False], found[name, True]) for name in ("imdb", "rt_polarity")}


def held_out(name: str) -> list[Sentence]:
    """Return the sentences of held-out reviews of "imdb" or "rt_polarity"."""
    return of_films()[name][1]


def training(*, films: bool) -> list[str]:
    """Return the sentences that an editor is trained on: of films' reviews, and of all corpora unless ``films``."""
    texts = [sentence.text for train, _ in of_films().values() for sentence in train]
    if not films:
        for row in read_jsonl(data_folder("alpaca_eval") / "outputs.jsonl.xz"):
            if row["id"] % 10:
                texts += [found for output in row["outputs"].values() for found in sentences_of(output or "")]
        for row in read_csv(data_folder("caption_contest") / "captions.csv.gz"):
            texts += sentences_of(row["caption"])
        for row in read_jsonl(data_folder("ukp_convarg") / "arguments.jsonl.gz"):
            texts += sentences_of(row["text"])
    apart = {sentence.text.lower() for name in of_films() for sentence in held_out(name)}
    return list(dict.fromkeys(text for text in texts if text.lower() not in apart))


def _whole(text: str) -> Iterator[str]:
    found = re.sub(r"\s+", " ", text).strip()
    if SHORTEST <= len(found.split()) <= 30:
        yield found


def _shuffled(count: int, rng: random.Random) -> list[int]:
    order = list(range(count))
    rng.shuffle(order)
    return order


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the training sentences as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_editing.sentences", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help='file to write, one {"text": ...} a line')
    parser.add_argument("--films", action="store_true", help="sentences of films' reviews alone")
    parser.add_argument("--limit", type=int, help="at most so many, drawn at random")
    options = parser.parse_args(arguments)
    texts = training(films=options.films)
    random.Random(0).shuffle(texts)
    lines = [json.dumps({"text": text}) + "\n" for text in texts[: options.limit]]
    options.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines):,} sentences in {options.out}")


if __name__ == "__main__":
    main()
