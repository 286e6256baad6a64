"""Errors of the proxy, in the format that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any

__all__ = ["Disconnected", "Refused", "error_body"]


class Disconnected(Exception):
    """Raised when the client disconnected before it had its answer."""


class Refused(Exception):
    """Ends a request with a status and a message of the proxy's own.

    Args:
        status: HTTP status.
        message: what is wrong and the way out; it must hold no key.
        outcome: the label under which the metrics count it.
        param: the field of the request that is to blame.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        outcome: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.outcome = outcome
        self.param = param
        self.headers = headers or {}


def error_body(error: Refused) -> dict[str, Any]:
    """Write an error as the body that the OpenAI API uses."""
    kind = "invalid_request_error" if 400 <= error.status < 500 and error.status != 429 else error.outcome
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": f"pfm_{error.outcome}"}}
