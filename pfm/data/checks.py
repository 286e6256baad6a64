"""Values of rows: texts that must be there, numbers in their range, and how many pairs one prompt may make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from pfm._internal.checks import check_whole
from pfm.data.conversations import Text, as_text, is_blank, is_unicode, message_texts
from pfm.data.errors import PreferenceDataError, show
from pfm.data.identity import name_form

__all__ = [
    "DIFFERENCE",
    "check_pair_limit",
    "checked_prompt",
    "checked_response",
    "choose_pairs",
    "optional_number",
    "read_number",
    "require",
    "response",
]

#: Pairs that one prompt may give without a limit: beyond it the lists no longer fit in memory.
MOST_PAIRS_PER_PROMPT = 2_000_000
#: What two names of columns that are meant alike may differ in (:func:`pfm.data.identity.normal_form`).
DIFFERENCE = "case, spaces or invisible characters"
_LARGEST = 1e100  # sums and squares of scores stay finite
_TRUTH = {"true": 1.0, "false": 0.0}
_CHARACTER = "; expected at least one character to read"


def require(row: Mapping[str, Any], column: str, option: str | None = None) -> Any:
    """Return the value of a column that must be there; a null, as of an empty cell of a table, is none."""
    value = row.get(column)
    if value is not None:
        return value
    if column in row:
        raise PreferenceDataError(
            "the value is empty, a cell with nothing in it or null; expected a value",
            reason="empty value",
            column=column,
        )
    found = ", ".join(repr(name) for name in row) or "none"
    rename = f"; if another column holds it, name that one with {option}=" if option else ""
    near = next((name for name in row if name_form(str(name)) == name_form(column)), None)
    if near is not None:
        rename = f"; {near!r} differs in {DIFFERENCE} only: rename it{f', or give {option}={near!r}' if option else ''}"
    problem = f"the column is missing; columns found: {found}{rename}"
    raise PreferenceDataError(problem, reason="missing column", column=column)


def response(row: Mapping[str, Any], column: str, option: str | None = None) -> Text:
    """Return a response that must be there and hold more than white space."""
    if column in row and row[column] is None:
        raise PreferenceDataError(
            f"the text is empty or only white space{_CHARACTER}", reason="empty text", column=column
        )
    return checked_response(require(row, column, option), column)


def checked_response(value: Any, column: str | None) -> Text:
    """Return a response as a text; refuse one that is blank."""
    text = as_text(value, column)
    if is_blank(text):
        raise PreferenceDataError(
            f"the text is empty or only white space, {show(value)}{_CHARACTER}",
            reason="empty text",
            column=column,
        )
    check_unicode(text, column)
    return text


def checked_prompt(value: Any, column: str | None) -> Text:
    """Return a prompt as a text; "" or [] says that there is none, white space alone is a prompt that got lost."""
    text = as_text(value, column)
    if text and is_blank(text):
        raise PreferenceDataError(
            f'the prompt is only white space, {show(value)}; expected a text, or "" for no prompt',
            reason="empty text",
            column=column,
        )
    check_unicode(text, column)
    return text


def check_unicode(text: Text, column: str | None) -> None:
    """Refuse half surrogate pairs: they can be written in JSON escapes but are no text."""
    if not all(map(is_unicode, message_texts(text))):
        raise PreferenceDataError(
            "the text holds half of a surrogate pair (a character cut in two); expected valid Unicode",
            reason="invalid Unicode",
            column=column,
        )


def optional_number(row: Mapping[str, Any], column: str, highest: float = math.inf) -> float | None:
    """Return a number from 0 to ``highest``, or None when the row has none; text such as "0.5" is read."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()) or type(value).__name__ == "NAType":
        return None
    try:
        number = float(value) if isinstance(value, Real | Decimal | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):  # an integer beyond what a float holds
        number = math.nan
    if not (math.isfinite(number) and 0 <= number <= highest):
        expected = "a finite number ≥ 0" if highest == math.inf else f"a number from 0 to {highest:g}"
        expected += " with a decimal point" * (isinstance(value, str) and "," in value)
        raise PreferenceDataError(f"got {show(value)}; expected {expected}", reason="bad number", column=column)
    return number


def read_number(value: Any, column: str) -> float:
    """Return a finite number, such as a score or a cost; true and false are 1 and 0, and text such as "0.5" is read.

    Raises:
        PreferenceDataError: there is none, or its size is above 1e100, beyond which squares are not finite.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        text = value.strip().casefold()
        value = _TRUTH.get(text, value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise PreferenceDataError("the value is missing; expected a number", reason="missing value", column=column)
    try:
        number = float(value) if isinstance(value, Real | Decimal | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        reason = "number not finite" if isinstance(value, float) else "wrong type"
        hint = " with a decimal point" * (isinstance(value, str) and "," in value)
        raise PreferenceDataError(f"got {show(value)}; expected a finite number{hint}", reason=reason, column=column)
    return number


def check_pair_limit(limit: int | None) -> None:
    """Refuse a limit of pairs a prompt that is not None or a positive integer."""
    check_whole("max_pairs_per_prompt", limit, 1, also=(None,))


def choose_pairs(total: int, limit: int | None, seed: tuple[int, int], where: str) -> np.ndarray | None:
    """Draw ``limit`` of ``total`` pair numbers, ascending; None means all of them.

    Raises:
        ValueError: there is no limit, and there are more pairs than memory should hold.
    """
    if limit is None:
        if total > MOST_PAIRS_PER_PROMPT:
            raise ValueError(
                f"{where}: the candidates make {total:,} pairs; pass max_pairs_per_prompt= to draw some of them"
            )
        return None
    if total <= limit:
        return None
    return np.sort(np.random.default_rng(seed).choice(total, size=limit, replace=False, shuffle=False))
