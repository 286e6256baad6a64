"""The two ways to ask an OpenAI-compatible server for texts: chat completions, and the responses API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pfm._internal.nesting import parse_json
from pfm.errors import (
    BadAnswerError,
    ContentFilterError,
    EmptyAnswerError,
    GenerationError,
    NotTextError,
    ToolCallError,
)
from pfm.generators.base import is_usable_text
from pfm.reasoning import field_reasoning, read_content

__all__ = ["PROTOCOLS", "Choice", "Protocol", "answer_usage"]


@dataclass(frozen=True)
class Choice:
    """One output of a server: a usable text, or what is wrong with it.

    ``reasoning`` counts the characters of hidden reasoning that came beside the text.
    """

    text: str = ""
    finish_reason: str | None = None
    error: GenerationError | None = None
    reasoning: int = 0


@dataclass(frozen=True)
class Protocol:
    """Says how one API is called and read.

    Attributes:
        method: the path of the client's method.
        prompt: name of the parameter that takes the conversation.
        takes_n: whether one request may be for several choices.
        read: gives the choices of an answer; raises BadAnswerError if it is none.
    """

    method: str
    prompt: str
    takes_n: bool
    read: Callable[[Any], list[Choice]]


def _part(value: Any, name: str) -> Any:
    """Return an entry or an attribute, or None: answers are whatever a server sent."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _parsed(answer: Any) -> Any:
    """Return an answer, from its text where the server did not call it JSON."""
    if not isinstance(answer, str):
        return answer
    try:
        return parse_json(answer)
    except ValueError:
        page = answer.lstrip().startswith("<")
        found = "a web page" if page else f"{answer[:80]!r}"
        raise BadAnswerError(f"the server sent {found} in place of an answer: is base_url right?") from None


def _checked(content: Any, finish_reason: Any, *, refusal: Any, called: bool, reasoning: int = 0) -> Choice:
    reason = finish_reason if isinstance(finish_reason, str) else None
    if called:
        return Choice(error=ToolCallError("the model called a tool, which nothing here can run"))
    if isinstance(refusal, str) and refusal.strip():
        return Choice(error=ContentFilterError(f"the model refused: {refusal[:200]}"))
    if reason == "content_filter":
        return Choice(error=ContentFilterError("the server filtered the answer"))
    if content is not None and not isinstance(content, str):
        return Choice(error=NotTextError(f"the content is no text but {type(content).__name__}"))
    if not content or not content.strip():
        detail = f" (finish_reason {reason!r})" if reason not in (None, "stop") else ""
        if reasoning:
            detail += f" after {reasoning:,} characters of hidden reasoning: let the model write more tokens"
        return Choice(error=EmptyAnswerError(f"the answer is empty or only white space{detail}"))
    if not is_usable_text(content):
        return Choice(error=NotTextError("the answer holds half a surrogate pair, which is no text"))
    return Choice(content, reason, reasoning=reasoning)


def _chat_choices(answer: Any) -> list[Choice]:
    choices = _part(_parsed(answer), "choices")
    if not isinstance(choices, list) or not choices:
        error = _part(_parsed(answer), "error")
        raise BadAnswerError("the answer holds no choices" + (f": {str(error)[:200]}" if error else ""))
    found = []
    for choice in choices:
        message = _part(choice, "message")
        content, reasoning = _part(message, "content"), field_reasoning(message)
        if (parts := read_content(content)) is not None:
            content, reasoning = parts.text, reasoning + parts.reasoning
        found.append(
            _checked(
                content,
                _part(choice, "finish_reason"),
                refusal=_part(message, "refusal"),
                called=bool(_part(message, "tool_calls") or _part(message, "function_call")),
                reasoning=len(reasoning),
            )
        )
    return found


def _response_choices(answer: Any) -> list[Choice]:
    answer = _parsed(answer)
    items = _part(answer, "output")
    if not isinstance(items, list) or not items:
        error = _part(answer, "error")
        raise BadAnswerError("the answer holds no output" + (f": {str(error)[:200]}" if error else ""))
    parts = [
        part
        for item in items
        if _part(item, "type") == "message" and isinstance(_part(item, "content"), list)
        for part in _part(item, "content")
    ]
    texts = [_part(part, "text") for part in parts if _part(part, "type") == "output_text"]
    whole = "".join(texts) if all(isinstance(text, str) for text in texts) else texts
    refusals = [_part(part, "refusal") for part in parts if _part(part, "type") == "refusal"]
    cut = _part(_part(answer, "incomplete_details"), "reason")
    reason = {"max_output_tokens": "length", None: "stop"}.get(cut, cut)
    called = any(_part(item, "type") in _OWN_TOOLS for item in items)
    thoughts = read_content([item for item in items if _part(item, "type") == "reasoning"])
    hidden = 0 if thoughts is None else len(thoughts.reasoning)
    return [_checked(whole, reason, refusal=next(iter(refusals), None), called=called, reasoning=hidden)]


# Calls that the asker has to answer; searches and the like the server runs itself.
_OWN_TOOLS = ("function_call", "custom_tool_call", "computer_call", "local_shell_call", "shell_call")

PROTOCOLS = {
    "chat": Protocol("chat.completions.create", "messages", True, _chat_choices),
    "responses": Protocol("responses.create", "input", False, _response_choices),
}


def answer_usage(answer: Any) -> dict[str, int]:
    """Return the token counts of an answer under the names of chat completions; empty if it has none."""
    if isinstance(answer, str):
        return {}
    usage = _part(answer, "usage")
    found = {}
    for name, other in (
        ("prompt_tokens", "input_tokens"),
        ("completion_tokens", "output_tokens"),
        ("total_tokens", "total_tokens"),
    ):
        value = _part(usage, name)
        value = _part(usage, other) if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            found[name] = value
    return found
