"""Beginnings of film reviews to be continued, and the two judges of the continuations.

Reviews are those that :mod:`benchmarks.text_editing.sentences` holds out. Preferences are labelled by a classifier of
critics' sentences (rt_polarity), and choices are scored by one of viewers' sentences (IMDB): other texts by other
people, and neither reads what the encoders of b read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.text_editing.judges import WordJudge
from benchmarks.text_editing.sentences import held_out, of_films

__all__ = ["continuation", "judge", "liking", "openings"]

WORDS = 8  # of a review's first long sentence
PER_JUDGE = 20_000  # sentences that a judge learns from


def openings(count: int, seed: int = 0) -> list[str]:
    """Return distinct beginnings of so many held-out IMDB reviews.

    Raises:
        MissingDataError: the reviews are absent. ValueError: there are not so many.
    """
    first: dict[int, str] = {}
    for sentence in held_out("imdb"):
        words = sentence.text.split()
        if len(words) > WORDS + 2:
            first.setdefault(sentence.review, " ".join(words[:WORDS]))
    every = sorted(set(first.values()))
    if count > len(every):
        raise ValueError(f"openings must be at most {len(every)}: got {count}")
    return np.random.default_rng(seed).permutation(every)[:count].tolist()


def continuation(text: str) -> str:
    """Return the first paragraph of a continuation: models continue with other topics."""
    return text.strip().split("\n\n")[0].strip()


@cache
def judge(corpus: str) -> WordJudge:
    """Return the judge that has learned from the training sentences of "imdb" or "rt_polarity"."""
    train = of_films()[corpus][0]
    kept = np.random.default_rng(0).permutation(len(train))[:PER_JUDGE]
    return WordJudge([train[row].text for row in kept], [train[row].liked for row in kept])


def liking(corpus: str, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the probability (N,) of "liked" by the judge of a corpus."""
    return 1 / (1 + np.exp(-judge(corpus)(texts)))
