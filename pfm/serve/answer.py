"""Write the chosen candidate in the upstream's own envelope, whole or as a stream."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["envelope", "events", "to_json"]

# A few words at a time, with the white space around them: put together, the pieces are the text.
_PIECE = re.compile(r"\s*(?:\S+\s*){1,4}|\s+")


def envelope(
    data: Mapping[str, Any], choice: Mapping[str, Any], text: str | None, usage: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return a completion as the upstream wrote it, with one choice.

    Args:
        data: the completion that holds the choice.
        choice: the choice.
        text: the content in place of the choice's own, where a decoder wrote another; None leaves it.
        usage: of all calls.
    """
    message = choice["message"] if text is None else choice["message"] | {"content": text}
    whole = {**data, "choices": [{**choice, "index": 0, "message": message}]}
    return whole if usage is None else {**whole, "usage": usage}


def events(whole: Mapping[str, Any], evidence: Mapping[str, Any], *, include_usage: bool) -> Iterator[bytes]:
    """Write a completion as server-sent events; the evidence comes with the last piece of the choice.

    Args:
        whole: the completion, with one choice.
        evidence: what goes under the extension key.
        include_usage: end with a chunk of the usage, as ``stream_options`` asks for.
    """
    shared = {name: value for name, value in whole.items() if name not in ("object", "choices", "usage")}
    head = {**shared, "object": "chat.completion.chunk"} | ({"usage": None} if include_usage else {})
    (choice,) = whole["choices"]
    message = dict(choice["message"])
    content = message.pop("content", None)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [
            {"index": place, **call} if isinstance(call, dict) else call for place, call in enumerate(calls)
        ]

    def chunk(delta: Mapping[str, Any], finish_reason: Any = None, **more: Any) -> bytes:
        part = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**head, "choices": [part], **more})

    said = {name: value for name, value in message.items() if value is not None}
    yield chunk({"role": "assistant", **said, "content": "" if content is not None else None})
    if isinstance(content, str):
        for found in _PIECE.finditer(content):
            yield chunk({"content": found.group()})
    elif content is not None:  # parts, as reasoning models send them
        yield chunk({"content": content})
    yield chunk({}, choice.get("finish_reason") or "stop", pfm=evidence)
    if include_usage:
        yield _event({**head, "choices": [], "usage": whole.get("usage")})
    yield b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Write JSON that every parser reads: NaN and the infinities, which JSON does not know, become null."""
    try:
        return json.dumps(value, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"
