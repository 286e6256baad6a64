"""Feedback on answers, kept as preference rows that ``pfm fit`` reads."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pfm._internal.files import WriterLock
from pfm._internal.nesting import parse_json
from pfm.generators.base import is_usable_text
from pfm.serve.asked import MAX_VALUES, read_messages, shown
from pfm.serve.config import ServeConfig
from pfm.serve.errors import Refused
from pfm.serve.redaction import Redactor

__all__ = ["FeedbackFile", "read_feedback"]

START = b'{"feedback": {'  # of every line
GROUP_CHARACTERS = 256
_FIELDS = ("prompt", "messages", "completion", "label", "chosen", "rejected", "group")
_FORMS = "send a completion with its label (true or false), or chosen and rejected"


def read_feedback(content: bytes, config: ServeConfig) -> dict[str, Any]:
    """Read a request with feedback as a preference row.

    Args:
        content: the body: ``prompt`` (a text) or ``messages``, with ``completion`` and ``label`` (true or false), or
            with ``chosen`` and ``rejected``; ``group`` may name who or what rows belong together by.
        config: the longest text.

    Raises:
        Refused: a field is missing, unknown or of another type (400), or a text is too long (413).
    """
    try:
        body = parse_json(content, max_values=MAX_VALUES)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Refused(400, f"the body must be a JSON object: {_FORMS}", outcome="bad_request")
    unknown = next((name for name in body if name not in _FIELDS), None)
    if unknown is not None:  # what is not known is not kept: it might be a key
        raise _bad(shown(unknown), f"is unknown; known are {', '.join(_FIELDS)}")
    row: dict[str, Any] = {"prompt": _prompt(body, config)}
    if (body.get("completion") is None) == (body.get("chosen") is None and body.get("rejected") is None):
        raise _bad("completion", f"or chosen and rejected must be given: {_FORMS}")
    if body.get("completion") is not None:
        if not isinstance(body.get("label"), bool):
            raise _bad("label", f"must be true (liked) or false, got {shown(body.get('label'))}")
        row |= {"completion": _text(body, "completion", config), "label": body["label"]}
    else:
        if body.get("label") is not None:
            raise _bad("label", "belongs to completion, not to chosen and rejected")
        row |= {name: _text(body, name, config) for name in ("chosen", "rejected")}
        if row["chosen"].strip() == row["rejected"].strip():
            raise _bad("rejected", "must be another text than chosen")
    if body.get("group") is not None:
        group = body["group"]
        if not is_usable_text(group) or len(group) > GROUP_CHARACTERS:
            raise _bad("group", f"must be a text of at most {GROUP_CHARACTERS} characters")
        row["group"] = group
    return row


class FeedbackFile:
    """A file of JSON lines that feedback is appended to, each line whole or not at all.

    One server at a time writes to it. It is opened anew for every line, so that it may be moved away at any time: the
    next line begins a new file. New files are readable by their owner alone.

    Args:
        path: the file, there or not.
        limit: the most bytes.
        secrets: keys that must not be written, wherever they stand in a text.

    Raises:
        ValueError: the file holds something else, or is no regular file.
        FileInUseError: another server writes to it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, limit: int, secrets: Iterable[str | None] = ()) -> None:
        self.path = path
        self.limit = limit
        self._redactors = [Redactor(secret) for secret in secrets if secret]
        self._one = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._held = WriterLock(path).acquire()
        try:
            self._recover()
            os.close(self._open())  # a place that cannot be written to shows at once
        except BaseException:
            self._held.release()
            raise

    def close(self) -> None:
        """Let another server write to the file."""
        self._held.release()

    def add(self, row: Mapping[str, Any], time: datetime | None = None) -> None:
        """Append a row, with the time; None: now.

        Raises:
            Refused: the file is full, or cannot be written; status 507. What it holds is left as it was.
        """
        when = (datetime.now(UTC) if time is None else time).isoformat(timespec="seconds")
        line = json.dumps({"feedback": {"time": when}, **row}).encode() + b"\n"
        for redactor in self._redactors:
            line = redactor.whole(line, error=False)
        with self._one:
            try:
                self._append(line)
            except OSError as error:
                raise Refused(507, f"the feedback could not be kept: {error.strerror}", outcome="error") from None

    def _append(self, line: bytes) -> None:
        file = self._open()
        try:
            size = os.fstat(file).st_size
            if size + len(line) > self.limit:
                raise Refused(
                    507,
                    f"the file of feedback is full (feedback_bytes={self.limit}): fit it, and move it away",
                    outcome="error",
                )
            try:
                written = os.write(file, line)
                if written < len(line):  # a nearly full disk takes a part
                    raise OSError(28, "no space is left")
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _recover(self) -> None:
        """Check what the file holds, and cut off half a line, which a crash may leave."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"feedback must be a regular file: {self.path} is none")
        with self.path.open("r+b") as file:
            head = file.read(len(START))
            if head != START[: len(head)]:
                raise ValueError(
                    f"feedback must name a new file or one of earlier feedback: {self.path} holds other text"
                )
            end = _end_of_lines(file, found.st_size)
            if end < found.st_size:
                file.truncate(end)


def _end_of_lines(file: Any, size: int, block: int = 65536) -> int:
    """Return where the last whole line ends."""
    while size:
        start = max(0, size - block)
        file.seek(start)
        place = file.read(size - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        size = start
    return 0


def _prompt(body: Mapping[str, Any], config: ServeConfig) -> Any:
    if (body.get("prompt") is None) == (body.get("messages") is None):
        raise _bad("prompt", "or messages must be given, and not both")
    if body.get("prompt") is not None:
        return _text(body, "prompt", config)
    messages = read_messages(body["messages"])
    if not messages:
        raise _bad("messages", "must be a list of messages with role and content, of texts")
    if not all(is_usable_text(message["content"]) for message in messages):
        raise _bad("messages", "must hold texts that are not empty")
    _check_length("messages", sum(len(message["content"]) for message in messages), config)
    return messages


def _text(body: Mapping[str, Any], name: str, config: ServeConfig) -> str:
    text = body.get(name)
    if not isinstance(text, str) or not is_usable_text(text):
        raise _bad(name, f"must be a text that is not empty, got {shown(text)}")
    _check_length(name, len(text), config)
    return text


def _check_length(name: str, length: int, config: ServeConfig) -> None:
    if length > config.text_characters:
        raise Refused(
            413, f"{name} is longer than {config.text_characters} characters", outcome="bad_request", param=name
        )


def _bad(name: str, problem: str) -> Refused:
    return Refused(400, f"{name} {problem}", outcome="bad_request", param=name)
