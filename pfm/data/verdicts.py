"""Rows of two responses and a verdict: which of them is better, or that neither is.

====================================================== ====================================================
the responses                                          the verdict
====================================================== ====================================================
``response_a, response_b``, ``conversation_a, ...``    ``winner``: model_a, model_b, a name in ``model_a`` or
                                                       ``model_b``, tie, tie (bothbad) (Chatbot Arena), or
                                                       ``winner_model_a, winner_model_b, winner_tie``
``response_0, response_1``                             ``better_response_id``: 0, 1 (PKU-SafeRLHF)
``response_1, response_2``, ``response1, response2``   ``preference_strength``, ``overall_preference``: below 0
                                                       where the first is better (HelpSteer)
====================================================== ====================================================

``winner`` or ``preference`` may stand with any of them, and names a response by the end of its column: a, b, 1, 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pfm.data.errors import PreferenceDataError, show

__all__ = ["compared_row", "without"]

_RESPONSES = tuple(
    (f"{name}{first}", f"{name}{second}")
    for first, second in (("_a", "_b"), ("_0", "_1"), ("_1", "_2"), ("1", "2"))
    for name in ("response", "conversation", "answer", "completion", "output")
)
_NAMING = ("winner", "preference", "preferred", "better_response_id")
_SIGNED = ("overall_preference", "preference_strength")
_COUNTED = ("winner_model_a", "winner_model_b", "winner_tie")
_TIES = frozenset(("tie", "tie (bothbad)", "both_bad", "bothbad", "both", "neither", "equal", "same", "draw", "0.5"))


def compared_row(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str] | None:
    """Return a row of two responses and a verdict with the standard columns, and its layout; None if it is another.

    A tie has the probability one half.

    Raises:
        PreferenceDataError: no column says which response is better, or it says neither of them.

    >>> responses = {"response_a": "No.", "response_b": "It rains."}
    >>> row, layout = compared_row({"prompt": "Why?", **responses, "winner": "model_b"})
    >>> row
    {'prompt': 'Why?', 'chosen': 'It rains.', 'rejected': 'No.'}
    """
    names = next((pair for pair in _RESPONSES if all(row.get(name) is not None for name in pair)), None)
    if names is None:
        return None
    second_wins, used = _verdict(row, names)
    better, worse = names[::-1] if second_wins > 0.5 else names
    standard = {"chosen": row[better], "rejected": row[worse]}
    if second_wins == 0.5:
        standard["probability"] = 0.5
    dropped = [*names, *used]
    if row.get("prompt") is None and isinstance(row.get("context"), list):  # HelpSteer3
        standard = {"prompt": row["context"], **standard}
        dropped.append("context")
    return without(row, dropped) | standard, f"two responses ({', '.join((*names, *used))})"


def without(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a row without some columns."""
    return {name: value for name, value in row.items() if name not in names}


def _verdict(row: Mapping[str, Any], names: tuple[str, str]) -> tuple[float, tuple[str, ...]]:
    """Return 0 where the first response is better, 1 where the second is, one half for a tie; and the columns read."""
    if names[0].endswith("_a") and all(row.get(column) is not None for column in _COUNTED):
        first, second, tie = (_number(row, column) for column in _COUNTED)
        if first + second + tie == 1 and {first, second, tie} == {0.0, 1.0}:
            return second + tie / 2, _COUNTED
        given = {column: row[column] for column in _COUNTED}
        raise PreferenceDataError(
            f"got {show(given)}; expected 1 in one of {', '.join(_COUNTED)} and 0 in the others", reason="no winner"
        )
    for column in _SIGNED:
        if row.get(column) is not None and names[0].endswith("1"):
            number = _number(row, column)
            return (0.5 if number == 0 else float(number > 0)), (column,)
    for column in _NAMING:
        if row.get(column) is not None:
            return _named(row, column, names), (column,)
    raise PreferenceDataError(
        f"the columns {names[0]!r} and {names[1]!r} hold two responses, and none says which is better; expected "
        f"a column {', '.join((*_NAMING[:2], *_SIGNED))}, or chosen and rejected",
        reason="no winner",
    )


def _named(row: Mapping[str, Any], column: str, names: tuple[str, str]) -> float:
    value = row[column]
    said = str(value).strip()
    models = [row.get(f"model_{end}") for end in "ab"] if names[0].endswith("_a") else []
    if len(set(models)) == 2 and said in models:
        return float(models.index(said))
    said = said.casefold()
    if isinstance(value, float) and value.is_integer():
        said = str(int(value))
    for number, name in enumerate(names):
        if said in (name, name[-1], f"model_{name[-1]}", f"model {name[-1]}", f"response {name[-1]}"):
            return float(number)
    if said in _TIES and not isinstance(value, bool):
        return 0.5
    raise PreferenceDataError(
        f"got {show(value)}; expected {names[0][-1]!r} where {names[0]} is better, {names[1][-1]!r} where {names[1]} "
        "is, or 'tie'",
        reason="no winner",
        column=column,
    )


def _number(row: Mapping[str, Any], column: str) -> float:
    try:
        number = float(row[column])
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise PreferenceDataError(f"got {show(row[column])}; expected a number", reason="bad number", column=column)
    return number
