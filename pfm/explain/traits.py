"""Traits of a text that a person can name: what :mod:`pfm.explain.explanation` says outputs gain and lose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pfm.encoders.surface import SurfaceEncoder

__all__ = ["TRAITS", "Trait", "measure_traits", "tokens"]


@dataclass(frozen=True)
class Trait:
    """Names a trait: in words for more and for less of it, and by what it is measured."""

    more: str
    less: str
    measure: str


_SPOKEN = {
    "words": ("longer", "shorter"),
    "word_length": ("longer words", "shorter words"),
    "sentences": ("more sentences", "fewer sentences"),
    "sentence_length": ("longer sentences", "shorter sentences"),
    "paragraphs": ("more paragraphs", "fewer paragraphs"),
    "lines": ("more line breaks", "fewer line breaks"),
    "capitals": ("more capitals", "fewer capitals"),
    "digits": ("more digits", "fewer digits"),
    "punctuation": ("more punctuation", "less punctuation"),
    "beyond_ascii": ("more letters beyond ASCII", "fewer letters beyond ASCII"),
    "questions": ("more questions", "fewer questions"),
    "exclamations": ("more exclamations", "fewer exclamations"),
    "finished": ("more often ending as a sentence", "less often ending as a sentence"),
    "list_items": ("more lists", "fewer lists"),
    "headings": ("more headings", "fewer headings"),
    "code": ("more code", "less code"),
    "links": ("more links", "fewer links"),
    "quotations": ("more quotations", "fewer quotations"),
    "brackets": ("more brackets", "fewer brackets"),
    "first_person": ("more first person", "less first person"),
    "second_person": ("more second person", "less second person"),
    "hedges": ("more hedging", "less hedging"),
    "negations": ("more negations", "fewer negations"),
    "connectives": ("more connectives", "fewer connectives"),
    "variety": ("more varied words", "less varied words"),
    "repetition": ("more repetition", "less repetition"),
}

TRAITS: dict[str, Trait] = {
    **{name: Trait(*spoken, SurfaceEncoder.features[name]) for name, spoken in _SPOKEN.items()},
    "readability": Trait(
        "easier to read",
        "harder to read",
        "Flesch's reading ease (1948), between -100 and 150, syllables counted as groups of vowels; English",
    ),
    "positive": Trait("more positive words", "fewer positive words", "share of words such as good, helpful; English"),
    "negative": Trait("more negative words", "fewer negative words", "share of words such as bad, wrong; English"),
}
"""The traits in the order of :func:`measure_traits`; "words" is the one that length means."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_POSITIVE = _set(
    "admirable amazing appreciate beautiful benefit benefits best better brilliant charming clear comfortable"
    " creative delicious delight delightful easy effective elegant enjoy enjoyable excellent exciting fair fantastic"
    " favorite fine free fresh friendly fun funny gain generous good grateful great happy healthy help helpful honest"
    " hope ideal improve improved impressive inspiring interesting joy kind love loved lovely nice perfect pleasant"
    " pleased pleasure positive powerful proud recommend reliable rich right safe satisfying smart smooth strong"
    " succeed success successful superb support thank thanks useful valuable warm welcome win wise wonderful worth"
)
_NEGATIVE = _set(
    "afraid angry annoying anxious awful awkward bad bitter boring broken complain confusing cruel damage danger"
    " dangerous dead death depressing difficult dirty disappointed disappointing disaster disease disgusting dull"
    " dumb evil fail failed failure false fear flawed fool guilty hard harm harmful hate horrible hurt ignorant"
    " illegal immoral inferior kill killed lack lazy lie lies lonely lose loss mess mistake murder nasty negative pain"
    " painful poor problem problems ridiculous risk sad scary selfish shame sick sorry stupid suffer suffering"
    " terrible threat tragic trouble ugly unfair unfortunately unhappy useless violence weak worse worst wrong"
)
_TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[?!:;]")
_SENTENCE = re.compile(r"[.!?…]+(?=\s|$)|\n+")
_VOWELS = re.compile(r"[aeiouy]+")


def tokens(text: str) -> list[str]:
    """Split a text into its words in lower case and its marks ? ! : ;."""
    return [token.replace("’", "'") for token in _TOKEN.findall(text.lower())]


def measure_traits(texts: Sequence[str]) -> NDArray[np.float64]:
    """Measure N texts, which must not be empty: (N, F), in the order of :data:`TRAITS`."""
    encoder = SurfaceEncoder()
    surface = encoder.encode(texts).numpy().astype(np.float64)
    kept = [encoder.feature_names.index(name) for name in _SPOKEN]
    return np.column_stack([surface[:, kept], [_english(text) for text in texts]])


def _english(text: str) -> tuple[float, float, float]:
    words = [token for token in tokens(text) if token not in "?!:;"]
    count = max(1, len(words))
    sentences = max(1, sum(bool(part.strip()) for part in _SENTENCE.split(text)))
    ease = 206.835 - 1.015 * count / sentences - 84.6 * sum(map(_syllables, words)) / count
    positive, negative = (sum(word in known for word in words) / count for known in (_POSITIVE, _NEGATIVE))
    return min(150.0, max(-100.0, ease)) if words else 0.0, positive, negative


def _syllables(word: str) -> int:
    count = len(_VOWELS.findall(word))
    # A final e is mute, except in endings such as -le.
    if word.endswith("e") and not word.endswith(("le", "ee")):
        count -= 1
    return max(1, count)
