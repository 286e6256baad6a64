"""Responses on disk, found by content.

One SQLite file holds the responses of all generators. A response is in it once its transaction is committed, so
that a process that is killed leaves whole responses or none, and several processes can read and write at once.
Its keys are digests: prompts are not stored, and what a generator says of itself goes in without a key. A row
carries a checksum over its key and value, so that what a bad disk or another program changed is never handed out.
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

from pfm._internal.checks import check_number
from pfm._internal.files import cache_folder
from pfm.generators.base import Prompt, Sample, as_messages, canonical

__all__ = ["ResponseCache", "sample_key"]

logger = logging.getLogger(__name__)

MAX_BYTES = 4_000_000_000

_BUSY_SECONDS = 30.0
_AT_ONCE = 500  # keys in one query; SQLite bounds them
_LAYOUT = 1  # of the table, in the file's user_version; 0 had no checksums
_SIZES = ("page_size", "page_count", "freelist_count")
_COLUMNS = ("key", "value", "checksum", "stored")


def sample_key(origin: Mapping[str, Any], prompt: Prompt, number: int) -> bytes:
    """Compute the key of one sample: SHA-256 of the model, its settings, the prompt and the sample's number.

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
    one warning: what can be read is used, and the run continues. A damaged row counts as not stored. It holds the
    responses' texts: treat it like them.

    Args:
        folder: where to keep ``responses.sqlite``; made when first written to. None: the folder named by the
            environment variable ``PFM_CACHE``, else ``pfm/responses`` in the user's cache folder
            (``XDG_CACHE_HOME``, ``~/.cache``).
        max_bytes: size of the responses beyond which the oldest quarter is deleted; None for no bound.

    Raises:
        ValueError: ``max_bytes`` is below 1.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, max_bytes: int | None = MAX_BYTES) -> None:
        max_bytes = check_number("max_bytes", max_bytes, least=1, also=(None,))
        self.folder = cache_folder("responses") if folder is None else Path(folder).expanduser()
        self.path = self.folder / "responses.sqlite"
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        self.max_bytes = max_bytes
        self._readable = self._writable = True
        self._warned = False

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Sample]:
        """Look up samples; those that are not stored are not in the result."""
        found: dict[bytes, Sample] = {}
        damaged: list[bytes] = []
        with self._lock:
            if not self._readable or not self.path.exists():
                return found
            try:
                for start in range(0, len(keys), _AT_ONCE):
                    for key, value, checksum in self._rows(keys[start : start + _AT_ONCE], damaged):
                        sample = _sample(key, value, checksum)
                        if sample is None:
                            damaged.append(key)
                        else:
                            found[key] = sample
            except (sqlite3.Error, OSError) as error:
                self._give_up(error, "read")
                self._readable = False
            if damaged:
                self._drop(damaged)
        return found

    def _rows(self, keys: Sequence[bytes], damaged: list[bytes]) -> list[tuple[Any, Any, Any]]:
        """Read the rows of keys; those in damaged parts of the file are noted, and cost no other row."""
        query = f"SELECT key, value, checksum FROM responses WHERE key IN ({','.join('?' * len(keys))})"
        try:
            return self._connected().execute(query, list(keys)).fetchall()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) or "malformed" not in str(error):
                raise
            if len(keys) > 1:
                middle = len(keys) // 2
                return self._rows(keys[:middle], damaged) + self._rows(keys[middle:], damaged)
            damaged.extend(keys)
            return []

    def _drop(self, keys: Sequence[bytes]) -> None:
        """Delete damaged rows, so that new responses can take their places."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "the response cache %s holds damaged rows; there the run continues without it, and calls are repeated",
                self.path,
            )
        for key in keys if self._writable else ():
            try:
                with self._connected() as connection:
                    connection.execute("DELETE FROM responses WHERE key = ?", (key,))
            except (sqlite3.Error, OSError):  # it stays, and is ignored again
                continue

    def put(self, samples: Mapping[bytes, Sample]) -> None:
        """Store samples; the first response stored for a key stays."""
        now = time.time()
        rows: list[tuple[bytes, bytes, bytes, float]] = []
        for key, sample in samples.items():
            value = json.dumps(asdict(sample)).encode()
            rows.append((key, value, _checksum(key, value), now))
        with self._lock:
            if not (self._readable and self._writable and rows):
                return
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._connected() as connection:
                    connection.executemany("INSERT OR IGNORE INTO responses VALUES (?, ?, ?, ?)", rows)
                    self._bound(connection)
            except (sqlite3.Error, OSError) as error:
                self._give_up(error, "written")

    def _bound(self, connection: sqlite3.Connection) -> None:
        """Delete the oldest quarter of the responses if they take more than they may."""
        if self.max_bytes is None:
            return
        size, pages, free = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in _SIZES)
        if size * (pages - free) > self.max_bytes:
            connection.execute(
                "DELETE FROM responses WHERE key IN (SELECT key FROM responses ORDER BY stored "
                "LIMIT (SELECT COUNT(*) / 4 + 1 FROM responses))"
            )

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
            self._warned = False

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

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _files(self) -> list[Path]:
        return [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None or self._process != os.getpid():  # a connection must not outlive a fork
            self._connection = _open(self.path)
            self._process = os.getpid()
        return self._connection

    def _give_up(self, error: Exception, verb: str) -> None:
        self._writable = False
        if self._warned:
            return
        self._warned = True
        logger.warning(
            "the response cache %s cannot be %s (%s); the run continues without it, and calls may be repeated",
            self.path,
            verb,
            error,
        )


def _checksum(key: bytes, value: bytes) -> bytes:
    return hashlib.sha256(len(key).to_bytes(8, "big") + key + value).digest()


def _sample(key: Any, value: Any, checksum: Any) -> Sample | None:
    """Return the sample of a row, or None if the row is not as it was stored."""
    if not (isinstance(key, bytes) and isinstance(value, bytes)) or _checksum(key, value) != checksum:
        return None
    try:
        return Sample(**json.loads(value))
    except (ValueError, TypeError):  # of another version
        return None


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the table, or give one without checksums the columns that it lacks."""
    if connection.execute("PRAGMA user_version").fetchone()[0] >= _LAYOUT:
        return
    connection.execute("BEGIN IMMEDIATE")  # of several processes one does it, the others wait
    with connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS responses "
            "(key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum BLOB, stored REAL) WITHOUT ROWID"
        )
        columns = [row[1].decode() for row in connection.execute("PRAGMA table_info(responses)")]
        if columns == list(_COLUMNS[:2]):
            connection.execute("ALTER TABLE responses ADD COLUMN checksum BLOB")
            connection.execute("ALTER TABLE responses ADD COLUMN stored REAL")
            for (key,) in connection.execute("SELECT key FROM responses").fetchall():
                (value,) = connection.execute("SELECT value FROM responses WHERE key = ?", (key,)).fetchone()
                row = (_checksum(key, value), key)
                connection.execute("UPDATE responses SET checksum = ?, stored = 0 WHERE key = ?", row)
        elif columns != list(_COLUMNS):
            raise sqlite3.DatabaseError("it holds a table of another program")
        connection.execute(f"PRAGMA user_version = {_LAYOUT}")


def _connect(place: str | Path, **options: Any) -> sqlite3.Connection:
    connection = sqlite3.connect(place, timeout=_BUSY_SECONDS, check_same_thread=False, **options)
    connection.text_factory = bytes  # a text with a bad byte would otherwise fail the whole query
    return connection


def _open(path: Path) -> sqlite3.Connection:
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        connection = _connect(path)
        try:
            # Readers and a writer do not wait for each other; a folder that cannot do it keeps the older way.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            _prepare(connection)
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            if not os.access(path.parent, os.W_OK) and path.exists():
                # No journal can be made beside the file, so it is read as it stands.
                return _connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)
            # The change of the journal's mode does not wait for other processes by itself.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        except sqlite3.Error:
            connection.close()
            raise
