"""Texts and conversations: one form for every way to write messages, and the one text that encoders read.

A *text* is a string or a conversation, that is a list of ``{"role", "content"}`` messages. Read besides them are
``{"from", "value"}`` messages, columns of a table (``{"role": [...], "content": [...]}``), content as a list of parts,
of which those of text are joined by line breaks, and no content (null) beside tool calls. A null value in a message
counts as absent, because tables fill the keys that other messages have with nulls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pfm.data.errors import PreferenceDataError, show

__all__ = [
    "Message",
    "Text",
    "as_text",
    "conversation_text",
    "is_blank",
    "is_unicode",
    "joined_text",
    "message_texts",
    "shared_turns",
]

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]

_ROLES = {"human": "user", "gpt": "assistant"}
#: Types of content parts that hold text: of chat completions, and of OpenAI's responses.
_TEXT_PARTS = ("text", "input_text", "output_text")
_CALLS = ("tool_calls", "function_call")


def conversation_text(messages: str | Sequence[Mapping[str, Any]]) -> str:
    """Turn a conversation into the one text that encoders read; a string is returned unchanged.

    A single turn of the user or the assistant is just its content; anything longer, and a lone turn of another
    role, becomes one ``role: content`` line a turn. Tool calls follow the content as JSON, one line a call.

    Raises:
        PreferenceDataError: ``messages`` is neither a string nor a list of messages.
    """
    return joined_text(as_text(messages, None))


def joined_text(text: Text) -> str:
    """Return the one text of what :func:`as_text` has returned."""
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] in ("user", "assistant"):
        return _message_text(text[0])
    return "\n".join(f"{message['role']}: {_message_text(message)}" for message in text)


def as_text(value: Any, column: str | None) -> Text:
    """Return a string unchanged, and one message or a list of messages as a list of role/content messages.

    Raises:
        PreferenceDataError: the value is no text, or a message holds what is no text, such as an image.
    """
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):  # arrays, in which pandas hands lists on
        value = value.tolist()
    if isinstance(value, Mapping):
        value = _of_columns(value) or [value]
    if not isinstance(value, list | tuple):
        raise PreferenceDataError(
            f"got {show(value)}; expected a string or a list of role/content messages",
            reason="wrong type",
            column=column,
        )
    return [_as_message(message, turn, column) for turn, message in enumerate(value, 1)]


def _of_columns(table: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the messages of a table of columns, the form that ``datasets.Sequence`` gives lists of dictionaries."""
    columns = {name: list(column) for name, column in table.items() if isinstance(column, list | tuple)}
    lengths = {len(column) for column in columns.values()}
    named = {"role", "content"} <= columns.keys() or {"from", "value"} <= columns.keys()
    if not named or len(lengths) != 1:
        return None
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _as_message(message: Any, turn: int, column: str | None) -> Message:
    if isinstance(message, Mapping):
        role, content = message.get("role"), message.get("content")
        if len(message) == 2 and isinstance(role, str) and isinstance(content, str):  # the usual case, and the fastest
            return {"role": role, "content": content}
        given = {name: _without_nulls(value) for name, value in message.items() if value is not None}
        role, content = given.get("role"), given.get("content")
        if isinstance(content, list | tuple):
            content = _joined_parts(content, turn, column)
        if content is None and any(given.get(name) for name in _CALLS):
            content = ""
        if isinstance(role, str) and isinstance(content, str):
            return given | {"content": content}
        role, content = given.get("from"), given.get("value")
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise PreferenceDataError(
        f"turn {turn} is {show(message)}; expected {{'role': str, 'content': str}}",
        reason="wrong type",
        column=column,
    )


def _without_nulls(value: Any) -> Any:
    """Return a value of a message as lists and dictionaries without the nulls that tables fill them with."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _joined_parts(parts: Sequence[Any], turn: int, column: str | None) -> str:
    texts: list[str] = []
    for number, part in enumerate(parts, 1):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or kind not in (None, *_TEXT_PARTS):
            name = repr(kind) if isinstance(kind, str) else type(part).__name__
            raise PreferenceDataError(
                f"part {number} of turn {turn} is of type {name}, which is no text; expected parts of type 'text'",
                reason="content that is no text",
                column=column,
            )
        texts.append(text)
    return "\n".join(texts)


def _message_text(message: Message) -> str:
    """Return a message's content and its tool calls: two answers may differ in nothing but what they call."""
    if "tool_calls" not in message and "function_call" not in message:
        return message["content"]
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    lines = [message["content"]] if message["content"] or not calls else []
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        # The id of a call is drawn at random and says nothing.
        called = call.get("function", call) if isinstance(call, Mapping) else call
        if isinstance(called, Mapping):
            called = {name: value for name, value in called.items() if name not in ("id", "type")}
        lines.append(json.dumps(called, ensure_ascii=False, default=str))
    return "\n".join(lines)


def message_texts(text: Text) -> list[str]:
    """Return what a text says, message by message."""
    return [text] if isinstance(text, str) else [_message_text(message) for message in text]


def is_blank(text: Text) -> bool:
    """Return whether a text holds nothing but white space."""
    if isinstance(text, str):
        return not text or text.isspace()
    return all(not part or part.isspace() for part in message_texts(text))


def shared_turns(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Count the turns with which both conversations begin; each keeps at least one turn of its own."""
    limit = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < limit and chosen[shared] == rejected[shared]:
        shared += 1
    return shared


def is_unicode(text: str) -> bool:
    """Return whether a string can be written as UTF-8 (it holds no half of a surrogate pair)."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
