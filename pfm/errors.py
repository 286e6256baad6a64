"""The errors of pfm that are not about a wrong argument."""

from __future__ import annotations

from typing import Any

__all__ = [
    "BadAnswerError",
    "BudgetError",
    "ContentFilterError",
    "ContextTooLongError",
    "EmptyAnswerError",
    "EncodingError",
    "EndpointError",
    "GenerationError",
    "KeyRefusedError",
    "MissingKeyError",
    "NonFiniteWarning",
    "NotRegisteredError",
    "NotTextError",
    "PfmError",
    "ProcessLostError",
    "RateLimitError",
    "RequestRefusedError",
    "ServerError",
    "ToolCallError",
    "UnknownModelError",
    "UntrustedEncoderError",
]


class PfmError(Exception):
    """The parent of every error that pfm raises by a name of its own."""


class GenerationError(PfmError, RuntimeError):
    """Raised when a generator failed after its retries.

    Args:
        message: what failed and what to do.
        partial: what was already produced when it failed, in the shape of the full result with None in the
            gaps; None if nothing was.
    """

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial

    def __reduce__(self):
        # Worker processes send errors home by pickle, which would otherwise rebuild them without `partial`.
        return type(self), (str(self), self.partial)


class EndpointError(GenerationError):
    """Raised when nothing answers at the address, or something that does not speak the protocol."""


class UnknownModelError(GenerationError):
    """Raised when the server has no model of this name."""


class MissingKeyError(GenerationError, ValueError):
    """Raised when a key is needed and none was given."""


class KeyRefusedError(GenerationError):
    """Raised when the server refused the key, or the key does not allow the request."""


class RequestRefusedError(GenerationError):
    """Raised when the server refused the request for a reason of its own, such as a parameter it does not take."""


class ContextTooLongError(GenerationError):
    """Raised when the prompt is longer than the model can read."""


class ContentFilterError(GenerationError):
    """Raised when a filter of the server, or the model itself, refused to answer."""


class RateLimitError(GenerationError):
    """Raised when the server limits the rate after all retries, or the account's quota is spent."""


class ServerError(GenerationError):
    """Raised when the server failed, took too long or hung up, after the retries."""


class BudgetError(GenerationError):
    """Raised when the calls or tokens that were allowed are spent."""


class BadAnswerError(GenerationError):
    """Raised when an answer came and holds nothing that can be used."""


class EmptyAnswerError(BadAnswerError):
    """Raised when a text came that is empty or only white space."""


class NotTextError(BadAnswerError):
    """Raised when something else than a text came in its place."""


class ToolCallError(BadAnswerError):
    """Raised when the model called a tool in place of an answer."""


class EncodingError(PfmError, RuntimeError):
    """Raised when texts could not be turned into vectors; what was already encoded is in the cache."""


class ProcessLostError(PfmError, RuntimeError):
    """Raised when another process of a fit by several has ended, or does not answer."""


class NotRegisteredError(PfmError, ValueError):
    """Raised when a configuration or a saved flow names a field, coupling or solver that is not registered here."""


class UntrustedEncoderError(PfmError, ValueError):
    """Raised when a saved flow names an encoder that would contact a server or open a folder without consent."""


class NonFiniteWarning(RuntimeWarning):
    """Raised when the field left the finite numbers for some rows, each of which keeps its last finite state.

    Attributes:
        finite: (B,) bool tensor, which rows stayed finite.
    """

    def __init__(self, finite: Any) -> None:
        lost = [row for row, well in enumerate(finite.tolist()) if not well]
        named = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        super().__init__(f"the field left the finite numbers for {len(lost)} of {len(finite)} rows ({named})")
        self.finite = finite
