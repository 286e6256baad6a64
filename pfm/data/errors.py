"""Errors of preference data, and how bad rows are handled: raise at the first one, or count them by reason."""

from __future__ import annotations

import logging
import reprlib
from collections import Counter
from typing import Any

from pfm._internal.checks import check_choice
from pfm.errors import PfmError

__all__ = ["BadRows", "PreferenceDataError", "not_utf8", "show"]

logger = logging.getLogger(__name__)


class PreferenceDataError(PfmError, ValueError):
    """Raised when preference data are wrong: says where, what was found, what was expected, and the way out.

    Attributes: ``problem`` (a sentence), ``reason`` (a short name, the key in ``PreferencePairs.dropped``),
    ``source`` (file or argument), ``row`` (such as ``"line 3"``), ``column``; the last three may be None.
    """

    def __init__(
        self,
        problem: str,
        *,
        reason: str = "bad data",
        column: str | None = None,
        row: str | None = None,
        source: str | None = None,
    ):
        super().__init__(problem)
        self.problem = problem
        self.reason = reason
        self.column = column
        self.row = row
        self.source = source
        self.way_out = ""

    def __str__(self) -> str:
        column = None if self.column is None else f"column {self.column!r}"
        place = ", ".join(part for part in (self.source, self.row, column) if part)
        return (f"{place}: " if place else "") + self.problem + self.way_out


class BadRows:
    """Handles bad rows: raises at the first one, or counts them by reason."""

    def __init__(self, source: str, on_bad_rows: str):
        check_choice("on_bad_rows", on_bad_rows, ("raise", "drop"))
        self.source = source
        self.raises = on_bad_rows == "raise"
        self.dropped: Counter[str] = Counter()
        self.first: PreferenceDataError | None = None

    def meet(self, error: PreferenceDataError, row: str, count: int = 1) -> None:
        """Raise ``error`` with its place filled in (an inner place stays), or count it ``count`` times."""
        error.source, error.row = self.source, error.row or row
        if self.raises:
            error.way_out = '. Correct it, or pass on_bad_rows="drop" to skip and count such rows.'
            raise error
        self.dropped[error.reason] += count
        self.first = self.first or error

    def finish(self, kept: int, way_out: str = "") -> None:
        """Warn once about what was dropped; raise, adding ``way_out``, if no pair is left."""
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common())
        first = f". The first: {self.first}" if self.first else ""
        if not kept:
            problem = (
                f"nothing is left of the rows, all were dropped ({counts}){first}"
                if counts
                else "there are no rows; expected at least one"
            )
            raise PreferenceDataError(problem + way_out, reason="nothing left", source=self.source)
        if self.dropped:
            total = sum(self.dropped.values())
            logger.warning("%s: dropped %d (%s)%s", self.source, total, counts, first)


def show(value: Any) -> str:
    """Describe a value shortly for an error message: its type and its beginning."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


def not_utf8(error: UnicodeDecodeError, offset: int = 0, **place: Any) -> PreferenceDataError:
    """Describe the byte of a file that is not UTF-8; ``offset`` is where the bytes that were decoded begin in it."""
    byte = error.object[error.start]
    return PreferenceDataError(
        f"not valid UTF-8: byte 0x{byte:02x} at byte offset {offset + error.start}; save the text as UTF-8",
        reason="invalid UTF-8",
        **place,
    )
