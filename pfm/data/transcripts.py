"""Strings that hold a beginning in common: transcripts of Human and Assistant, and openings of whole words."""

from __future__ import annotations

import re
import unicodedata

from pfm.data.identity import normal_form

__all__ = ["is_opening", "is_transcript", "shared_opening", "split_transcript"]

#: How many words make an opening: answers often begin with the same one or two ("Well,", "I am").
OPENING_WORDS = 3
_TURN = re.compile(r"(?:\A|\n)[^\S\n]*(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Return whether a string is a dialogue in the form of Anthropic's HH: ``Human: …`` and then ``Assistant: …``."""
    begun = text.lstrip()
    return begun.startswith("Human:") and any(turn[1] == "Assistant" for turn in _TURN.finditer(begun))


def split_transcript(chosen: str, rejected: str) -> tuple[int, int] | None:
    """Return where either transcript ends its prompt: after the last ``Assistant:`` up to which both are the same.

    None where they differ before the first one. Turns that differ by white space, case or Unicode form are the same.
    """
    cut = None
    start = [0, 0]
    for one, two in zip(_TURN.finditer(chosen), _TURN.finditer(rejected), strict=False):
        before = [text[begin : turn.end()] for text, begin, turn in zip((chosen, rejected), start, (one, two))]  # noqa: B905
        if normal_form(before[0]) != normal_form(before[1]):
            break
        start = [one.end(), two.end()]
        if one[1] == "Assistant":
            cut = one.end(), two.end()
    return cut


def shared_opening(chosen: str, rejected: str) -> int:
    """Return the length of the longest common beginning of whole words; both strings keep at least one word."""
    limit = min(len(chosen.rstrip()), len(rejected.rstrip()))
    low, high = 0, limit
    while low < high:  # bisection over slices: a loop over characters is slow on long prompts
        middle = (low + high + 1) // 2
        if chosen[low:middle] == rejected[low:middle]:
            low = middle
        else:
            high = middle - 1
    head = chosen[:low]
    ends_a_word = low < limit and chosen[low].isspace() and rejected[low].isspace()
    if ends_a_word or head[-1:].isspace():
        return len(head.rstrip())
    whole_words = head.rsplit(None, 1)[:-1]
    return len(whole_words[0]) if whole_words else 0


def is_opening(text: str) -> bool:
    """Return whether a common beginning is long enough to be a prompt: three words, or six wide characters (CJK)."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text[:100])
    return len(text.split()) + wide // 2 >= OPENING_WORDS
