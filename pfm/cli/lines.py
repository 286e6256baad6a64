"""A file of results, written line by line, so that a run can be stopped at any point and repeated."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pfm._internal.files import WriterLock

__all__ = ["LineFile"]


class LineFile:
    """Is appended to line by line, and read back when a run is repeated.

    A line is a JSON object whose first key, "pfm", says to which row it belongs. A file with other lines, or with
    lines that came from something else, is refused, so that no run mixes with another and no file of the user is
    harmed; half a line, of a run that was stopped while writing it, is cut off. From the moment it is made until
    it is left, no other process can write to the file by this class.

    Args:
        path: the file, there or not.

    Raises:
        FileInUseError: another process writes to it.
        ValueError: it is no regular file, has several names, or holds something else.
    """

    START = b'{"pfm": {"row": '
    RESULT = "result of pfm"  # what a line is
    ORIGIN = "results of other rows"  # what lines of another run are

    def __init__(self, path: Path) -> None:
        _check_place(path)
        self.path = path
        self.keys: list[Hashable] = []  # of the rows, line by line
        self._lock = WriterLock(path).acquire()
        try:
            if path.exists():
                self._recover()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

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
        """Put the lines in this order of keys, of a repeated row the latest, if they are in another.

        Raises:
            OSError: a program without the lock has replaced or changed the file, which is left as it is.
        """
        self._check_unchanged()
        if self.keys == list(order):
            return
        from pfm.data.readers import write_lines

        lines = self.path.read_bytes().decode("utf-8").split("\n")
        if len(lines) != len(self.keys) + 1:
            raise self._changed()
        latest = dict(zip(self.keys, lines, strict=False))
        write_lines(self.path.resolve(), (latest[key] for key in order))
        self._file.close()
        self._file = self.path.open("ab", buffering=0)
        self.keys = list(order)

    def _check_unchanged(self) -> None:
        try:
            same = os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise self._changed()

    def _changed(self) -> OSError:
        return OSError(f"{self.path} was removed or changed by another program during this run: look at what it holds")

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


#: Endings by which a file would be read as something else than the lines that it holds.
_OTHER_FORMS = frozenset((".json", ".csv", ".tsv", ".parquet", ".gz", ".xz", ".bz2"))


def _check_place(path: Path) -> None:
    """Refuse what cannot be read back and continued: pipes, terminals, devices, folders, the command's own output."""
    if path.suffix.lower() in _OTHER_FORMS:
        raise ValueError(f"--out {path} is written as JSON lines, line by line: let its name end in .jsonl")
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"--out {path} must be a regular file, which a second run can read back and continue: it is "
            f"{_kind(found.st_mode)}"
        )
    for stream in (1, 2):
        try:
            own = os.path.samestat(found, os.fstat(stream))
        except OSError:  # closed
            continue
        if own:
            raise ValueError(f"--out {path} is where this command writes its messages to: give a file of its own")
    if found.st_nlink > 1:
        raise ValueError(
            f"--out {path} has {found.st_nlink} names (hard links), and a run under another one could write to it at "
            "once: give another file"
        )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _encoded(record: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair in a column of the input
        return (json.dumps(record, default=str) + "\n").encode()
