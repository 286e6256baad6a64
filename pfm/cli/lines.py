"""A file of results, written line by line, so that a run can be stopped at any point and repeated."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

__all__ = ["LineFile"]


class LineFile:
    """Is appended to line by line, and read back when a run is repeated.

    A line is a JSON object whose first key, "pfm", says to which row it belongs. A file with other lines, or with
    lines that came from something else, is refused, so that no run mixes with another and no file of the user is
    harmed; half a line, of a run that was stopped while writing it, is cut off.

    Args:
        path: the file, there or not.
    """

    START = b'{"pfm": {"row": '
    RESULT = "result of pfm"  # what a line is
    ORIGIN = "results of other rows"  # what lines of another run are

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: list[Hashable] = []  # of the rows, line by line
        if path.exists():
            self._recover()

    def __enter__(self) -> Self:
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def meet(self, record: Mapping[str, Any]) -> Hashable | None:
        """Take over a line of an earlier run: give the key of its row, or None if it comes from something else.

        Raises:
            KeyError, TypeError, ValueError: it is no result at all.
        """
        raise NotImplementedError

    def append(self, key: Hashable, record: Mapping[str, Any]) -> None:
        """Write the line of a row."""
        rest = memoryview(_encoded(record))
        while rest:  # a write to a nearly full disk may take a part only
            rest = rest[self._file.write(rest) :]
        self.keys.append(key)

    def put_in_order(self, order: Sequence[Hashable]) -> None:
        """Put the lines in this order of keys, of a repeated row the latest, if they are in another."""
        if self.keys == list(order):
            return
        from pfm.rows import write_lines

        latest = dict(zip(self.keys, self.path.read_text(encoding="utf-8").split("\n"), strict=False))
        write_lines(self.path, (latest[key] for key in order))
        self.keys = list(order)

    def _recover(self) -> None:
        whole, newline, rest = self.path.read_bytes().rpartition(b"\n")
        for place, line in enumerate(whole.split(b"\n") if newline else [], 1):
            try:
                key = self.meet(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise self._foreign(place) from None
            if key is None:
                raise ValueError(
                    f"{self.path} holds {self.ORIGIN} (line {place}): give another --out, or delete it to start again"
                )
            self.keys.append(key)
        if not (rest.startswith(self.START) or self.START.startswith(rest)):
            raise self._foreign(len(self.keys) + 1)
        if rest:
            os.truncate(self.path, len(whole) + len(newline))

    def _foreign(self, place: int) -> ValueError:
        return ValueError(f"{self.path} is there and line {place} is no {self.RESULT}: give another --out")


def _encoded(record: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair in a column of the input
        return (json.dumps(record, default=str) + "\n").encode()
