"""The errors of pfm that are not about a wrong argument."""

from __future__ import annotations

from typing import Any

__all__ = ["EncodingError", "GenerationError", "NonFiniteWarning", "PfmError"]


class PfmError(Exception):
    """Is the parent of every error that pfm raises by a name of its own."""


class GenerationError(PfmError, RuntimeError):
    """Says that a generator failed after its retries.

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


class EncodingError(PfmError, RuntimeError):
    """Says that texts could not be turned into vectors; what was already encoded is in the cache."""


class NonFiniteWarning(RuntimeWarning):
    """Says that the field left the finite numbers for some rows, each of which keeps its last finite state.

    Attributes:
        finite: (B,) bool tensor, which rows stayed finite.
    """

    def __init__(self, finite: Any) -> None:
        lost = [row for row, well in enumerate(finite.tolist()) if not well]
        named = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        super().__init__(f"the field left the finite numbers for {len(lost)} of {len(finite)} rows ({named})")
        self.finite = finite
