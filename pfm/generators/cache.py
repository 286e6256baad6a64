"""Responses on disk, found by content.

One SQLite file holds the responses of all generators. A response is in it once its transaction is committed, so
that a process that is killed leaves whole responses or none, and several processes can read and write at once.
Its keys are digests: prompts are not stored, and what a generator says of itself goes in without a key.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pfm.files import cache_folder
from pfm.generators.base import Prompt, Sample, as_messages, canonical

__all__ = ["ResponseCache", "sample_key"]

logger = logging.getLogger(__name__)

_BUSY_SECONDS = 30.0
_AT_ONCE = 500  # keys in one query; SQLite bounds them


def sample_key(origin: Mapping[str, Any], prompt: Prompt, number: int) -> bytes:
    """Compute the key of one sample: SHA-256 of who is asked, with which settings, what, and the sample's number.

    Args:
        origin: JSON values of all that the response depends on: model, address, every sampling parameter.
        prompt: a text counts as the one message of a user.
        number: 0 for the first sample of this prompt.
    """
    described = canonical({"origin": origin, "messages": as_messages(prompt), "sample": number})
    return hashlib.sha256(described.encode()).digest()


class ResponseCache:
    """Keeps responses on disk, so that the same call is made once.

    Safe for several threads and processes at once. A file that cannot be written (read-only, full) or read costs
    one warning: what can be read still is, and the run goes on. It holds the responses' texts: treat it like them.

    Args:
        folder: where to keep ``responses.sqlite``; made when first written to. None: the folder named by the
            environment variable ``PFM_CACHE``, else ``pfm/responses`` in the user's cache folder
            (``XDG_CACHE_HOME``, ``~/.cache``).
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = cache_folder("responses") if folder is None else Path(folder).expanduser()
        self.path = self.folder / "responses.sqlite"
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        self._readable = self._writable = True

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Sample]:
        """Look up samples; those that are not stored are not in the result."""
        found: dict[bytes, Sample] = {}
        with self._lock:
            if not self._readable or not self.path.exists():
                return found
            try:
                for start in range(0, len(keys), _AT_ONCE):
                    part = keys[start : start + _AT_ONCE]
                    query = f"SELECT key, value FROM responses WHERE key IN ({','.join('?' * len(part))})"
                    for key, value in self._connected().execute(query, part):
                        found[key] = Sample(**json.loads(value))
            except (sqlite3.Error, OSError, ValueError, TypeError) as error:
                self._give_up(error, "read")
                self._readable = False
        return found

    def put(self, samples: Mapping[bytes, Sample]) -> None:
        """Store samples; the first response stored for a key stays."""
        rows = [(key, json.dumps(asdict(sample))) for key, sample in samples.items()]
        with self._lock:
            if not (self._readable and self._writable and rows):
                return
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._connected() as connection:
                    connection.executemany("INSERT OR IGNORE INTO responses VALUES (?, ?)", rows)
            except (sqlite3.Error, OSError) as error:
                self._give_up(error, "written")

    def clear(self) -> None:
        """Delete every response."""
        with self._lock:
            if not self.path.exists():
                return
            try:
                connection = self._connected()
                with connection:
                    connection.execute("DELETE FROM responses")
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # locked or not writable: it is not ours to delete
                    raise
                self.close()
                for path in self._files():
                    path.unlink(missing_ok=True)
            self._readable = self._writable = True

    def close(self) -> None:
        """Close the file; the next look-up opens it again."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    @property
    def size_bytes(self) -> int:
        """The bytes that the cache takes on disk."""
        return sum(path.stat().st_size for path in self._files() if path.exists())

    def __len__(self) -> int:
        """Count the responses stored."""
        with self._lock:
            if not self.path.exists():
                return 0
            try:
                return self._connected().execute("SELECT COUNT(*) FROM responses").fetchone()[0]
            except (sqlite3.Error, OSError) as error:
                self._give_up(error, "read")
                return 0

    def __repr__(self) -> str:
        return f"ResponseCache({str(self.folder)!r}: {len(self):,} responses, {self.size_bytes / 1e6:,.1f} MB)"

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])

    def _files(self) -> list[Path]:
        return [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None or self._process != os.getpid():  # a connection must not outlive a fork
            self._connection = _open(self.path)
            self._process = os.getpid()
        return self._connection

    def _give_up(self, error: Exception, verb: str) -> None:
        self._writable = False
        logger.warning(
            "the response cache %s cannot be %s (%s); the run goes on without it, and calls may be repeated",
            self.path,
            verb,
            error,
        )


def _open(path: Path) -> sqlite3.Connection:
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
        try:
            # Readers and a writer do not wait for each other; a folder that cannot do it keeps the older way.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS responses (key BLOB PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
            )
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            if not os.access(path.parent, os.W_OK) and path.exists():
                # No journal can be made beside the file, so it is read as it stands.
                return sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True, check_same_thread=False)
            # The change of the journal's mode does not wait for other processes by itself.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        except sqlite3.Error:
            connection.close()
            raise
