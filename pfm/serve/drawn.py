"""The upstream's replies to one request: the candidates in them, and their tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pfm.generators.base import is_usable_text
from pfm.reasoning import field_reasoning, read_content
from pfm.serve.errors import Refused

__all__ = ["Choice", "Drawn", "Reply", "summed"]

# Of a number of tokens; beyond it JSON's readers lose digits.
MOST_TOKENS = 2**53
# Headers are bytes: what they mean beyond ASCII is a matter of those who wrote and read them.
Header = tuple[bytes, bytes]


@dataclass
class Reply:
    """One whole answer of the upstream.

    Attributes:
        status: HTTP status.
        headers: those that travel back, without what describes the body.
        kind: the content type, empty if there is none.
        content: the body, decoded.
        data: the body where it is a chat completion.
    """

    status: int
    headers: list[Header]
    kind: bytes
    content: bytes
    data: dict[str, Any] | None


@dataclass
class Choice:
    """One usable candidate: its text, the choice that holds it, and the completion that holds that.

    ``reasoning`` counts the characters of hidden reasoning beside the text, in a field or a part of its own.
    """

    text: str
    choice: dict[str, Any]
    reply: Reply
    reasoning: int = 0


@dataclass
class Drawn:
    """The upstream's replies to one request.

    Attributes:
        choices: usable candidates, the original first.
        replies: chat completions, in the order of the calls.
        plain: why the original must be passed on as it is, if it must.
        failure: what went wrong first: an answer with another status or form, or an error of the proxy's own.
        calls: calls of the upstream.
        dropped: choices without usable text.
        errors: what went wrong, by how often.
    """

    choices: list[Choice] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    plain: str | None = None
    failure: Reply | Refused | None = None
    calls: int = 0
    dropped: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def usage(self) -> dict[str, Any] | None:
        """Return the usage of all calls together, as far as the upstream reports it; None if it never does."""
        total: dict[str, Any] | None = None
        for reply in self.replies:
            usage = (reply.data or {}).get("usage")
            if isinstance(usage, dict):
                total = summed(total, usage)
        return total

    def add(self, result: Reply | Refused, n: int) -> None:
        """Take in the result of one call, up to n candidates in all."""
        if isinstance(result, Refused):
            self.errors[result.message] += 1
            self.failure = self.failure or result
            return
        if result.data is None:
            form = "no chat completion" if result.status == 200 else f"status {result.status}"
            self.errors[f"the upstream answered with {form}"] += 1
            self.failure = self.failure or result
            return
        self.replies.append(result)
        for choice in result.data["choices"]:
            problem = _beyond_text(choice)
            if problem is not None and not self.choices and len(self.replies) == 1:
                self.plain = self.plain or problem
            message = choice["message"]
            text, reasoning = message.get("content"), field_reasoning(message)
            if (parts := read_content(text)) is not None:
                text, reasoning = parts.text, reasoning + parts.reasoning
            if problem is None and is_usable_text(text):
                if len(self.choices) < n:
                    self.choices.append(Choice(text, choice, result, len(reasoning)))
            else:
                self.dropped += 1


def _beyond_text(choice: Mapping[str, Any]) -> str | None:
    """Return why a choice is more, or less, than a text of the model; None where it is one."""
    for name in ("tool_calls", "function_call", "refusal", "audio"):
        if choice["message"].get(name):
            return f"the answer has {name}"
    if choice.get("finish_reason") == "content_filter":
        return "the answer was cut by a content filter"
    content = choice["message"].get("content")
    if not isinstance(content, str | None) and read_content(content) is None:
        return "the answer is not text"
    return None


def summed(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> dict[str, Any] | None:
    """Add the numbers of two usages up, at any depth; of anything else keep the first. None is no usage.

    What cannot be a number of tokens (negative, not finite, 2^53 and beyond) counts as 0.
    """
    total = dict(one or {})
    for name, value in other.items():
        before = total.get(name)
        if isinstance(value, dict):
            total[name] = summed(before if isinstance(before, dict) else None, value) or {}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            total[name] = _tokens(_tokens(value) + _tokens(before))
        elif before is None:
            total[name] = value
    return total or None


def _tokens(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return value if 0 <= value < MOST_TOKENS and math.isfinite(value) else 0
