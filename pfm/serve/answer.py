"""Write the chosen candidate in the upstream's own envelope, whole or as a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["envelope", "events"]

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
    for index, call in enumerate(message.get("tool_calls") or []):
        call.setdefault("index", index)

    def chunk(delta: Mapping[str, Any], finish_reason: Any = None, **more: Any) -> bytes:
        part = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**head, "choices": [part], **more})

    said = {name: value for name, value in message.items() if value is not None}
    yield chunk({"role": "assistant", **said, "content": "" if isinstance(content, str) else None})
    if isinstance(content, list):  # of parts, which a client of such a server knows how to read
        yield chunk({"content": content})
    else:
        for piece in _PIECE.findall(content or ""):
            yield chunk({"content": piece})
    yield chunk({}, choice.get("finish_reason") or "stop", pfm=evidence)
    if include_usage:
        yield _event({**head, "choices": [], "usage": whole.get("usage")})
    yield b"data: [DONE]\n\n"


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
