"""Name what went wrong with a request to an OpenAI-compatible server.

Servers agree on status codes and little else, so the code comes first, then the error's own code, then words.
The words are those of OpenAI, vLLM, llama.cpp, Ollama and Azure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pfm._internal.endpoint import public_address, redacted
from pfm.errors import (
    BadAnswerError,
    ContentFilterError,
    ContextTooLongError,
    EndpointError,
    GenerationError,
    KeyRefusedError,
    RateLimitError,
    RequestRefusedError,
    ServerError,
    UnknownModelError,
)

__all__ = ["named_failure"]

_TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum (model|sequence|input|prompt) length|"
    r"(prompt|input|request)( \S+){0,4} (is )?too (long|large)|too many (input |prompt )?tokens|reduce the length",
    re.IGNORECASE,
)
_FILTERED = re.compile(r"content.?(filter|policy|management)|safety (system|filter|polic)|moderation", re.IGNORECASE)
_NO_MODEL = re.compile(
    r"model\b.*\b(not (be )?(found|exist|supported|available|loaded)|does not exist|unknown|invalid)|"
    r"(unknown|invalid|no such|unsupported) model",
    re.IGNORECASE | re.DOTALL,
)
_SHOWN = 300


def named_failure(
    error: BaseException, model: str, address: str, secrets: Iterable[str], route: str = ""
) -> GenerationError:
    """Return the error that says by its name what ``error`` of the openai client means.

    Args:
        error: what the client raised.
        model, address: of the request.
        secrets: texts that must not be shown; servers quote keys in their errors.
        route: the proxy of the request, in words; empty for none.
    """
    import openai

    secrets = list(secrets)

    if isinstance(error, GenerationError):
        return error
    if isinstance(error, openai.APIStatusError):
        location = error.response.headers.get("location", "") if 300 <= error.status_code < 400 else ""
        kind, message = _named_status(error.status_code, error.body, model, address, secrets, location)
    elif isinstance(error, openai.APITimeoutError):
        kind, message = ServerError, f"no answer from {address}{route} in time{_cause(error)}"
    elif isinstance(error, openai.APIConnectionError):
        if "Connect" in type(error.__cause__).__name__ or "UnsupportedProtocol" in type(error.__cause__).__name__:
            question = "is the server running and base_url right?"
            if route:
                question = "is the proxy running, and meant for this address? no_proxy lists addresses without one"
            kind, message = EndpointError, f"nothing answers at {address}{route}: {question}"
        else:
            kind, message = ServerError, f"the connection to {address}{route} broke"
        message += _cause(error)
    elif isinstance(error, UnicodeEncodeError):
        message = f"the request cannot be sent, since it holds half of a character: {error.reason}"
        kind = GenerationError
    elif isinstance(error, ValueError) and not isinstance(error, openai.OpenAIError):
        kind, message = BadAnswerError, f"the answer of {address} is not JSON: {error}"
    else:
        kind, message = GenerationError, f"{type(error).__name__}: {error}"
    return kind(redacted(message, secrets))


def _named_status(
    status: int, body: Any, model: str, address: str, secrets: Iterable[str], location: str
) -> tuple[type[GenerationError], str]:
    detail, code = _told(body)
    detail = redacted(detail, secrets, _SHOWN)
    if 300 <= status < 400:
        there = f" to {public_address(location)}" if location else ""
        return EndpointError, (
            f"{address} answered {status}, a redirect{there}: it was not followed, since prompts and keys would go "
            "there; if that is right, give it as base_url"
        )
    said = f"{address} answered {status}: {detail or 'no reason given'}"
    if status == 401 or code == "invalid_api_key":
        return KeyRefusedError, f"the key was refused; {said}"
    if status == 429:
        return RateLimitError, said
    if code == "model_not_found" or (status in (400, 404, 422) and _NO_MODEL.search(detail)):
        return UnknownModelError, f"there is no model {model!r}; {said}"
    if status in (404, 405):
        return EndpointError, f"base_url seems wrong, most end in /v1; {said}"
    if status in (400, 403, 413, 422, 500):
        if code == "context_length_exceeded" or _TOO_LONG.search(detail):
            return ContextTooLongError, said
        if "content_filter" in code or "content_policy" in code or (status != 500 and _FILTERED.search(detail)):
            return ContentFilterError, said
    if status == 403:
        return KeyRefusedError, f"the key does not allow this; {said}"
    return (ServerError if status >= 500 else RequestRefusedError), said


def _told(body: Any) -> tuple[str, str]:
    """Return message and code of an error's body, whichever of the usual shapes it has."""
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        if isinstance(inner, Mapping):
            message = inner.get("message") or inner.get("detail") or inner
            return str(message), str(inner.get("code") or inner.get("type") or "")
        return str(inner), ""
    text = "" if body is None else str(body)
    return ("a web page" if text.lstrip().startswith("<") else text), ""


def _cause(error: BaseException) -> str:
    cause = error.__cause__
    return f" ({type(cause).__name__}: {cause})" if cause is not None and str(cause) else ""
