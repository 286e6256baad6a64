"""Identity of prompts and groups: which rows belong to one prompt, so that no split separates them.

Two prompts are one where their normal forms agree: Unicode form NFKC, case folded, every run of white space one space,
none at either end. People and tables change these without a thought (a trailing line break, ``é`` as one character or
as two, a full-width ``？``), and the prompt stays what it was. A row without a prompt is identified by its group.

A group of None, NaN or blank text is no group, nor are the words "nan", "none" and "null": tables write these where
there is nothing. Rows without a group are identified by their prompt alone.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from numbers import Real
from typing import Any, TypeAlias

__all__ = ["PromptIdentity", "given_group", "is_missing", "name_form", "normal_form", "prompt_identity"]

PromptIdentity: TypeAlias = tuple[str, Any]

#: Characters without width that editors and browsers leave in text: soft hyphen, zero-width space, word joiner, BOM.
_INVISIBLE: dict[int, None] = dict.fromkeys((0x00AD, 0x200B, 0x2060, 0xFEFF))

#: What tables that make everything a string write where there is no group.
_NO_GROUP = frozenset(("", "nan", "none", "null", "<na>", "nat"))


def normal_form(text: str) -> str:
    """Return the form in which texts that differ by white space, case or Unicode form alone are equal."""
    # Folding can undo the composition, so compose again (Unicode Standard, section 3.13, D146).
    folded = unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


@lru_cache(1024)
def name_form(name: str) -> str:
    """Return the normal form of a column's name, which comes back in every row.

    >>> name_form("\ufeffPrompt ")
    'prompt'
    """
    return normal_form(name)


def prompt_identity(prompt: str, group: Any) -> PromptIdentity:
    """Return the identity of a prompt: the normal form of their text, or the group where there is no prompt."""
    form = normal_form(prompt)
    return (form, None if form else given_group(group))


def is_missing(value: Any) -> bool:
    """Return whether a table's cell holds nothing: None, NaN, or pandas' NA and NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Real) and value != value


def given_group(group: Any) -> Any:
    """Return a group, or None where there is none: None, NaN, blank text, or the name of one of these."""
    if is_missing(group) or (isinstance(group, str) and group.strip().casefold() in _NO_GROUP):
        return None
    return group
