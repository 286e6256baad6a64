"""Conversations that arrive as strings: JSON text, or Python's ``repr`` of message lists, in the cells of a table.

They come from columns that were written by ``json.dumps``, from ``DataFrame.to_csv``, and from arrays of numpy, whose
``repr`` puts no comma between messages. Text that holds such a list by chance (an answer that is JSON) looks the same,
so that a column decides: where all of its strings are conversations they are parsed, and where only some are, the
fewer are bad rows. They are never read as text.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pfm._internal.nesting import MAX_NESTING, parse_json
from pfm.data.conversations import Message, as_text
from pfm.data.errors import PreferenceDataError, show

__all__ = ["parse_columns", "parse_literal", "parse_text"]

#: How a conversation begins: an optional array( or quote, brackets, and a key in quotes.
_BEGINNING = re.compile(r"""\s*(?:array\(\s*)?(?:"\s*(?=[\[{]))?(?:[\[(]\s*)?\{\s*\\?["']\w+\\?["']\s*:""")
#: The keys of messages; what begins alike without them is some other JSON.
_MESSAGE_KEY = re.compile(r"""["'](?:role|from)\\?["']\s*:""")
_PYTHON_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_MISSING_COMMA = re.compile(rf"({_PYTHON_STRING})|(\}})\s+(?=\{{)", re.DOTALL)


def parse_text(text: str) -> list[Message] | None:
    """Return the conversation that a string holds, or None where it is plain text.

    Raises:
        ValueError: the string begins as a conversation, and cannot be parsed.
    """
    if not _BEGINNING.match(text) or not _MESSAGE_KEY.search(text):
        return None
    value = parse_literal(text)
    if isinstance(value, str):  # written twice: JSON within JSON
        value = parse_literal(value)
    if isinstance(value, Mapping):
        value = value.get("messages") or value.get("conversations") or value
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list | tuple) or not all(map(_is_message, messages)):
        return None
    parsed = as_text(value, None)
    return parsed if isinstance(parsed, list) else None


def _is_message(value: Any) -> bool:
    """Tell a message from other objects: JSON in an answer may have a key "value" too."""
    if not isinstance(value, Mapping):
        return False
    return "role" in value or ("from" in value and isinstance(value.get("value"), str))


def parse_literal(text: str) -> Any:
    """Return the value of JSON text or of a Python literal.

    Raises:
        ValueError: the text is neither.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        problem = error
    text = text.strip()
    if text.startswith("array(") and text.endswith(")"):
        text = text[len("array(") : text.rfind("]") + 1]  # without its dtype
    for form in (text, _MISSING_COMMA.sub(lambda found: found[1] or "}, ", text)):
        if _depth(form) > MAX_NESTING:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in a string written by hand
                return ast.literal_eval(form)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise ValueError(f"neither JSON ({problem}) nor a Python literal")


def _depth(text: str) -> int:
    """Bound how deep brackets nest, those in strings included."""
    depth = deepest = 0
    for character in re.findall(r"[\[\](){}]", text):
        depth += 1 if character in "[({" else -1
        deepest = max(deepest, depth)
    return deepest


def parse_columns(
    rows: Sequence[tuple[int, Mapping[str, Any]]],
    columns: Iterable[str],
    refuse: Callable[[int, PreferenceDataError], None],
) -> list[tuple[int, Mapping[str, Any]]]:
    """Parse the conversations in columns that hold them as strings; a row that does not fit its column is refused.

    Args:
        rows: numbered rows.
        columns: names of the columns whose cells may be conversations.
        refuse: takes the number of a bad row, and what is wrong with it.

    Returns:
        The rows that are left, in order; a row that changes is copied.
    """
    parsed: dict[int, dict[str, Any]] = {}
    refused: dict[int, PreferenceDataError] = {}
    named = {name for _, row in rows for name in row}
    for column in columns:
        if column not in named:
            continue
        cells = [(place, row.get(column)) for place, (_, row) in enumerate(rows)]
        texts = [(place, cell) for place, cell in cells if isinstance(cell, str) and cell and not cell.isspace()]
        found: dict[int, list[Message]] = {}
        for place, cell in texts:
            try:
                messages = parse_text(cell)
            except PreferenceDataError as error:
                error.column = column
                refused.setdefault(place, error)
            except ValueError as error:
                problem = f"got {show(cell)}, a conversation that cannot be parsed: {error}"
                refused.setdefault(place, PreferenceDataError(problem, reason="damaged conversation", column=column))
            else:
                if messages is not None:
                    found[place] = messages
        plain = [place for place, _ in texts if place not in found and place not in refused]
        mixed = plain if len(found) > len(plain) else found
        if plain and found:
            for place in mixed:
                refused.setdefault(place, _mixed(column, cells[place][1], len(found), len(texts)))
        for place, messages in found.items():
            parsed.setdefault(place, {})[column] = messages
    kept: list[tuple[int, Mapping[str, Any]]] = []
    for place, (number, row) in enumerate(rows):
        if place in refused:
            refuse(number, refused[place])
        else:
            kept.append((number, {**row, **parsed[place]} if place in parsed else row))
    return kept


def _mixed(column: str, cell: Any, found: int, texts: int) -> PreferenceDataError:
    return PreferenceDataError(
        f"got {show(cell)}, and {found} of the {texts} strings in this column are conversations written as text; "
        "expected all or none of them: write conversations as lists of messages",
        reason="conversation as text",
        column=column,
    )
