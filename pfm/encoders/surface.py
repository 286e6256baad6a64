"""The surface of a text as numbers: how long it is, how it is laid out, how it speaks."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pfm.encoders.base import Encoder, check_texts

__all__ = ["SurfaceEncoder"]

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# Marks, and what follows them if it is none of what may follow the end of a sentence.
_MARKS = re.compile(r"[.!?…]++([^\s\"'”’»)\]*_])?")
_FULL_WIDTH_MARKS = re.compile(r"[。！？]++")
_LIST_ITEM = re.compile(r"[ \t]*(?:[-*+•‣]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)])[ \t]+\S")
_HEADING = re.compile(r"[ \t]*(?:#{1,6}[ \t]+\S|\*\*[^*]+\*\*:?[ \t]*$|__[^_]+__:?[ \t]*$)")
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.DOTALL)
_BLANK_LINES = re.compile(r"\n\s*\n")
_LINK = re.compile(r"https?://\S+|www\.\S+")
_QUOTED = re.compile(r"\"[^\"\n]+\"|“[^“”\n]+”|„[^„“\n]+“|«[^«»\n]+»|「[^「」\n]+」")
_BRACKETED = re.compile(r"\([^()\n]+\)|（[^（）\n]+）")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_FIRST_PERSON = _set("i i'm i've i'd i'll me my mine myself we we're we've us our ours")
_SECOND_PERSON = _set("you you're you've you'd you'll your yours yourself yourselves")
_HEDGES = _set(
    "about almost apparently appear appears approximately arguably around could doubt generally guess likely may"
    " maybe might mostly often partly perhaps possible possibly presumably probably rather relatively roughly"
    " seem seems somewhat sometimes suggest suggests suppose think typically unclear unlikely usually"
)
_NEGATIONS = _set("no not never none nothing nobody neither nor cannot without")
_CONNECTIVES = _set(
    "also although because but consequently finally first furthermore hence however if instead meanwhile moreover"
    " nevertheless otherwise second since so then therefore third though thus unless whereas while yet"
)

# Name, and what it is; the order of the vector's numbers.
_FEATURES = {
    "words": "log(1 + words) / 7, at most 2; 1 is about 1100 words",
    "characters": "log(1 + characters) / 9, at most 2; 1 is about 8100 characters",
    "word_length": "mean letters and digits of a word / 10, at most 2",
    "word_length_spread": "standard deviation of that / 5, at most 2",
    "sentences": "log(1 + sentences) / 4, at most 2; 1 is about 54 sentences",
    "sentence_length": "log(1 + words a sentence) / 4, at most 2; 1 is about 54 words",
    "paragraphs": "log(1 + blocks between blank lines) / 3, at most 2; 1 is about 19",
    "lines": "non-empty lines after the first a sentence, at most 1",
    "capitals": "share of letters that are capitals",
    "digits": "share of visible characters that are digits",
    "punctuation": "share of visible characters that are neither letters nor digits, times 2, at most 1",
    "beyond_ascii": "share of letters outside of ASCII",
    "questions": "question marks a sentence, at most 1",
    "exclamations": "exclamation marks a sentence, at most 1",
    "finished": "1 if the text ends as a sentence or a block of code does, else 0",
    "list_items": "share of non-empty lines that begin like list items",
    "headings": "share of non-empty lines that are headings",
    "code": "share of characters in code fences and code spans",
    "links": "links, at most 4, / 4",
    "quotations": "quoted passages a sentence, at most 1",
    "brackets": "bracketed passages a sentence, at most 1",
    "first_person": "share of words such as I, my, we, times 5, at most 1",
    "second_person": "share of words such as you, your, times 5, at most 1",
    "hedges": "share of words such as perhaps, might, usually, times 5, at most 1",
    "negations": "share of words such as not, never, don't, times 5, at most 1",
    "connectives": "share of words such as because, however, then, times 5, at most 1",
    "variety": "distinct among the first 100 words / those words",
    "repetition": "share of three-word sequences that occurred before",
}


class SurfaceEncoder(Encoder):
    """Measures the surface of a text: length, layout, punctuation, manner of speaking.

    A cheap complement to sentence embeddings, which hardly see these. Every number lies in [0, 2] and most
    in [0, 1]; :attr:`feature_names` names them and :attr:`features` says what each is. Counts of function
    words know English only and are 0 elsewhere; the rest works in any script that separates words.

    Args:
        provides_context: whether it encodes prompts too when it is part of a :class:`ConcatEncoder`.
        on_empty: "error" refuses empty texts; "encode" makes them zeros.

    >>> encoder = SurfaceEncoder()
    >>> vector = encoder.encode(["Is it? It is!"])[0]
    >>> float(vector[encoder.feature_names.index("questions")])
    0.5
    """

    features: ClassVar[dict[str, str]] = dict(_FEATURES)
    feature_names = tuple(_FEATURES)

    def __init__(self, *, provides_context: bool = False, on_empty: Literal["error", "encode"] = "error") -> None:
        if on_empty not in ("error", "encode"):
            raise ValueError(f"on_empty must be 'error' or 'encode', got {on_empty!r}")
        self.provides_context = provides_context
        self.on_empty: Literal["error", "encode"] = on_empty

    @property
    def dimension(self) -> int:
        """The number of features."""
        return len(self.feature_names)

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Measure N texts; no progress is shown: a thousand characters take a fraction of a millisecond.

        Returns:
            (N, F) float32, in the order of :attr:`feature_names`.

        Raises:
            TypeError, ValueError: a text that is no string, or empty, by its index.
        """
        checked = check_texts(texts, self.on_empty)
        measured = {text: _measure(text) for text in dict.fromkeys(checked)}
        values = np.array([measured[text] for text in checked], np.float32)
        return torch.from_numpy(values.reshape(len(checked), self.dimension))

    def describe(self) -> dict[str, Any]:
        """Describe the encoder in JSON values."""
        return {
            "type": type(self).__name__,
            "name": "surface",
            "revision": "1",
            "dimension": self.dimension,
            "features": list(self.feature_names),
        }

    def __repr__(self) -> str:
        return f"SurfaceEncoder(provides_context={self.provides_context})"


def _measure(text: str) -> list[float]:
    """Return the features of one text in the order of `_FEATURES`."""
    if not text or text.isspace():
        return [0.0] * len(_FEATURES)
    lower = text.lower().replace("’", "'")
    words = _WORD.findall(lower)
    count, times = max(1, len(words)), Counter(words)
    lengths = Counter(map(len, words)) or {0: 1}
    mean_length = sum(length * number for length, number in lengths.items()) / count
    spread = math.sqrt(sum(number * (length - mean_length) ** 2 for length, number in lengths.items()) / count)
    ends = _ends_sentence(text)
    # Text that ends without a mark still ends a sentence.
    marked = _MARKS.findall(text).count("") + len(_found(_FULL_WIDTH_MARKS, text, "。", "！", "？"))
    sentences = max(1, marked + (not ends))
    lines = [line for line in text.splitlines() if line and not line.isspace()]
    blocks = _BLANK_LINES.split(text) if "\n" in text else [text]
    paragraphs = len([block for block in blocks if block and not block.isspace()])
    letters, capitals, digits, beyond, spaces, others = _characters(text)
    visible = len(text) - spaces
    triples = list(zip(words, words[1:], words[2:], strict=False))

    def manner(known: frozenset[str]) -> float:
        return min(1.0, 5 * sum(times[word] for word in known.intersection(times)) / count)

    negations = sum(times[word] for word in _NEGATIONS.intersection(times))
    if "n't" in lower:
        negations += sum(n for word, n in times.items() if word.endswith("n't") and word not in _NEGATIONS)
    return [
        min(2.0, math.log1p(len(words)) / 7),
        min(2.0, math.log1p(len(text)) / 9),
        min(2.0, mean_length / 10),
        min(2.0, spread / 5),
        min(2.0, math.log1p(sentences) / 4),
        min(2.0, math.log1p(len(words) / sentences) / 4),
        min(2.0, math.log1p(paragraphs) / 3),
        min(1.0, (len(lines) - 1) / sentences),
        capitals / max(1, letters),
        digits / visible,
        min(1.0, 2 * others / visible),
        beyond / max(1, letters),
        min(1.0, (text.count("?") + text.count("？")) / sentences),
        min(1.0, (text.count("!") + text.count("！")) / sentences),
        float(ends or text.rstrip().endswith(("```", "~~~"))),
        sum(_LIST_ITEM.match(line) is not None for line in lines) / len(lines),
        sum(_HEADING.match(line) is not None for line in lines) / len(lines),
        sum(map(len, _found(_CODE, text, "`", "~~~"))) / len(text),
        min(4, len(_found(_LINK, text, "://", "www."))) / 4,
        min(1.0, len(_found(_QUOTED, text, '"', "”", "“", "»", "」")) / sentences),
        min(1.0, len(_found(_BRACKETED, text, ")", "）")) / sentences),
        manner(_FIRST_PERSON),
        manner(_SECOND_PERSON),
        manner(_HEDGES),
        min(1.0, 5 * negations / count),
        manner(_CONNECTIVES),
        len(set(words[:100])) / max(1, len(words[:100])),
        1 - len(set(triples)) / len(triples) if triples else 0.0,
    ]


def _found(pattern: re.Pattern[str], text: str, *signs: str) -> list[str]:
    """Return all matches of a pattern, each of which holds one of some signs: most texts hold none."""
    return pattern.findall(text) if any(sign in text for sign in signs) else []


def _characters(text: str) -> list[int]:
    """Count letters, capitals, digits, letters outside of ASCII, white space, and all other characters."""
    if text.isascii():
        return (np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=128) @ _ascii_kinds()).tolist()
    counts = [0] * 6
    for character, number in Counter(text).items():
        for place in _kinds(character):
            counts[place] += number
    return counts


@functools.cache
def _ascii_kinds() -> np.ndarray:
    """Return to which counts each of the 128 characters of ASCII belongs (128, 6), 0 or 1."""
    return np.array([[place in _kinds(chr(code)) for place in range(6)] for code in range(128)], np.int64)


@functools.lru_cache(maxsize=4096)
def _kinds(character: str) -> tuple[int, ...]:
    """Return which of the counts of :func:`_characters` a character belongs to."""
    letter, space = character.isalpha(), character.isspace()
    kinds = (
        letter, character.isupper(), character.isdigit(), letter and not character.isascii(), space,
        not (space or character.isalnum()),
    )  # fmt: skip
    return tuple(place for place, is_one in enumerate(kinds) if is_one)


def _ends_sentence(text: str) -> bool:
    return text.rstrip().rstrip("\"'”’»」)]*_").endswith((".", "!", "?", "…", "。", "！", "？"))
