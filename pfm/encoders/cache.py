"""Embeddings on disk, found by content.

An entry is a row in one of the *shards* of its encoder's folder. A shard is two files that one writer appends
to and nobody else: ``<shard>.vectors`` holds plain float32 rows, ``<shard>.keys`` a header and then, for each
row, its key and a checksum over key and vector. The vectors are written before their keys, so that a row
exists only once it is whole. Several processes therefore fill one folder without a lock: each appends to
shards of its own and maps those of the others as they grow. What a crash, a full disk or a bad sector leaves
behind fails the length check or the checksum, and counts as not stored.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pfm._internal.checks import check_number
from pfm._internal.files import cache_folder

__all__ = ["EmbeddingCache", "text_keys"]

logger = logging.getLogger(__name__)

KEY_BYTES = 32
_HEADER = struct.Struct("<8sII")  # magic, dimension, checksum of the two
_MAGIC = b"PFMEMB1\n"
_ENTRY = np.dtype([("key", np.uint8, KEY_BYTES), ("checksum", "<u4")])
_READ_AT_ONCE = 8192  # rows copied out of the maps before the next; bounds the memory beside the result
MAX_BYTES = 20_000_000_000
_SHARES = 8  # shards of a full cache: what is deleted at once is one of them
_CHECK_BYTES = 64_000_000  # appended before the size is looked at again
_MAX_DIMENSION = 2**20  # a header that says more is damaged
_ROWS_PER_SHARD = 2**40  # places are shard * 2**40 + row
_SPACE_NAME = re.compile(r"[0-9a-f]{24}")


def text_keys(space: str, kind: str, texts: Sequence[str]) -> np.ndarray:
    """Compute the cache keys of texts: the SHA-256 of the encoder's fingerprint, the kind and the text.

    Returns:
        (N, 32) uint8.
    """
    start = hashlib.sha256(f"{space}\0{kind}\0".encode())
    digests = bytearray()
    for text in texts:
        digest = start.copy()
        digest.update(text.encode())
        digests += digest.digest()
    return np.frombuffer(bytes(digests), np.uint8).reshape(len(texts), KEY_BYTES)


class EmbeddingCache:
    """Keeps embeddings on disk, so that the same text is encoded once.

    Safe for several threads and processes at once. A folder that cannot be written (read-only, full) costs
    one warning: what it holds is still read, new embeddings are not kept. Damaged rows are ignored with a
    warning and encoded again. Holds keys and vectors only, never a text.

    Args:
        folder: where to keep them; made when first written to. None: the folder named by the environment
            variable ``PFM_CACHE``, else ``pfm/embeddings`` in the user's cache folder
            (``XDG_CACHE_HOME``, ``~/.cache``).
        max_bytes: size of the folder beyond which the embeddings written the longest ago are deleted, an eighth at
            a time; None for no bound.

    Raises:
        ValueError: ``max_bytes`` is below 1.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, max_bytes: int | None = MAX_BYTES) -> None:
        max_bytes = check_number("max_bytes", max_bytes, least=1, also=(None,))
        self.max_bytes = max_bytes
        self._unchecked = _CHECK_BYTES  # so that the first addition looks
        self.folder = cache_folder("embeddings") if folder is None else Path(folder).expanduser()
        self._lock = threading.RLock()
        self._indices: dict[str, _Index] = {}
        self._writers: dict[str, _Writer] = {}
        self._writable = True

    def get(self, space: str, keys: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """Look up keys in the space of one encoder.

        Args:
            space: the encoder's fingerprint.
            keys: (N, 32) uint8, see :func:`text_keys`.

        Returns:
            The vectors (N, D) float32, undefined where not found, or None if the space is empty; and which
            were found, (N,) bool.
        """
        with self._lock:
            return self._index(space).read(np.ascontiguousarray(keys))

    def put(self, space: str, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Store vectors (N, D) float32 under keys (N, 32) uint8, unless the folder cannot be written."""
        if keys.shape != (len(vectors), KEY_BYTES) or vectors.ndim != 2 or not vectors.shape[1]:
            raise ValueError(
                f"keys must have shape (N, {KEY_BYTES}) and vectors (N, D), D >= 1;"
                f" got {keys.shape} and {vectors.shape}"
            )
        if not self._writable or not len(vectors):
            return
        with self._lock:
            try:
                writer = self._writers.get(space)
                full = self.max_bytes is not None and writer is not None and writer.size > self.max_bytes / _SHARES
                if writer is None or full or not writer.is_current(vectors.shape[1]):
                    writer = _Writer(self._space_folder(space), vectors.shape[1])
                    self._writers[space] = writer
                writer.append(np.ascontiguousarray(keys), np.ascontiguousarray(vectors, "<f4"))
                self._unchecked += vectors.nbytes
                if self.max_bytes is not None and self._unchecked >= min(_CHECK_BYTES, self.max_bytes / _SHARES):
                    self._unchecked = 0
                    self._delete_oldest(self.max_bytes)
            except OSError as error:
                self._writable = False
                logger.warning(
                    "the embedding cache in %s cannot be written (%s); new embeddings are not kept. Free some"
                    " space, or name another folder in PFM_CACHE",
                    self.folder,
                    error.strerror or error,
                )

    def _delete_oldest(self, max_bytes: int) -> None:
        """Delete shards, those that were appended to the longest ago first, until the rest fits."""
        found: list[tuple[float, int, Path]] = []
        for folder in self._space_folders():
            for keys in folder.glob("*.keys"):
                try:
                    parts = keys.stat(), keys.with_suffix(".vectors").stat()
                except FileNotFoundError:  # another process has just deleted it
                    continue
                found.append((max(part.st_mtime for part in parts), sum(part.st_size for part in parts), keys))
        own = {writer.keys for writer in self._writers.values()}
        excess = sum(size for _, size, _ in found) - max_bytes
        for _, size, keys in sorted(found, key=lambda shard: shard[0]):
            if excess <= 0:
                return
            if keys not in own:
                keys.unlink(missing_ok=True)  # first, as in clear()
                keys.with_suffix(".vectors").unlink(missing_ok=True)
                excess -= size

    def dimension(self, space: str) -> int | None:
        """Return the length of the vectors of a space, or None if it holds none."""
        with self._lock:
            return self._index(space).refresh().dimension

    @property
    def size_bytes(self) -> int:
        """The bytes that the cache takes on disk."""
        total = 0
        for path in self._files():
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # another process has just cleared it
                continue
        return total

    def __len__(self) -> int:
        """Count the distinct embeddings stored."""
        with self._lock:
            return sum(_Index(folder).refresh().distinct() for folder in self._space_folders())

    def clear(self) -> None:
        """Delete every embedding stored in the folder; other files there are left alone."""
        with self._lock:
            for path in self._files():
                path.unlink(missing_ok=True)
            for folder in self._space_folders():
                try:
                    folder.rmdir()
                except OSError as error:  # it holds something that is not ours
                    logger.debug("%s stays: %s", folder, error)
            self._indices.clear()
            self._writers.clear()
            self._writable = True

    def __repr__(self) -> str:
        return f"EmbeddingCache({str(self.folder)!r}: {len(self):,} embeddings, {self.size_bytes / 1e6:,.1f} MB)"

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _space_folder(self, space: str) -> Path:
        return self.folder / hashlib.sha256(space.encode()).hexdigest()[:24]

    def _index(self, space: str) -> _Index:
        if space not in self._indices:
            self._indices[space] = _Index(self._space_folder(space))
        return self._indices[space]

    def _space_folders(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if _SPACE_NAME.fullmatch(path.name))
        except OSError:
            return []

    def _files(self) -> Iterator[Path]:
        # Keys first: a row without its vector would look damaged to a reader, one without its key is no row.
        for suffix in ("*.keys", "*.vectors"):
            for folder in self._space_folders():
                yield from sorted(folder.glob(suffix))


class _Writer:
    """Appends to a shard that no other writer knows of."""

    def __init__(self, folder: Path, dimension: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.process = os.getpid()
        self.dimension = dimension
        self.rows = 0
        stem = f"{self.process}-{secrets.token_hex(6)}"
        self.keys = folder / f"{stem}.keys"
        self.vectors = folder / f"{stem}.vectors"

    @property
    def size(self) -> int:
        """The bytes of both files."""
        return _HEADER.size + self.rows * (_ENTRY.itemsize + 4 * self.dimension)

    def is_current(self, dimension: int) -> bool:
        """Return whether the next row would land where its key says.

        Not so after a fork, when the files were cleared or cut from outside, or when an interrupt came between
        the vectors and their keys.
        """
        if self.process != os.getpid() or self.dimension != dimension:
            return False
        try:
            sizes = self.keys.stat().st_size, self.vectors.stat().st_size
        except FileNotFoundError:
            return False
        return sizes == (_HEADER.size + self.rows * _ENTRY.itemsize, self.rows * 4 * self.dimension)

    def append(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        entries = np.empty(len(keys), _ENTRY)
        entries["key"] = keys
        entries["checksum"] = _checksums(keys, vectors)
        _append(self.vectors, vectors.tobytes())
        _append(self.keys, (b"" if self.rows else _header(self.dimension)) + entries.tobytes())
        self.rows += len(keys)


class _Shard:
    """One shard, as far as it is mapped."""

    def __init__(self, path: Path, number: int, dimension: int) -> None:
        self.path = path
        self.number = number
        self.dimension = dimension
        self.rows = 0
        self.identity: int | None = None
        self.entries = np.empty(0, _ENTRY)
        self.vectors = np.empty((0, dimension), np.float32)
        self.warned = False

    def extend(self, keys: os.stat_result, vectors: os.stat_result | None) -> np.ndarray:
        """Map the rows appended since the last call and return their entries.

        Raises:
            _ShardReplacedError: the file is no longer the one that was mapped.
        """
        rows = max(0, keys.st_size - _HEADER.size) // _ENTRY.itemsize
        whole = 0 if vectors is None else vectors.st_size // (4 * self.dimension)
        if whole < rows:
            # The folder's listing may have seen the vectors before and the keys after an append: look again.
            path = self.path.with_suffix(".vectors")
            whole = path.stat().st_size // (4 * self.dimension) if path.exists() else 0
        if whole < rows:
            self.warn(rows - whole)
            rows = whole
        if rows < self.rows or keys.st_ino != (self.identity or keys.st_ino):
            raise _ShardReplacedError
        start, self.rows, self.identity = self.rows, rows, keys.st_ino
        if rows > start:
            shape = (rows, self.dimension)
            self.entries = np.memmap(self.path, _ENTRY, "r", offset=_HEADER.size, shape=(rows,))
            self.vectors = np.memmap(self.path.with_suffix(".vectors"), "<f4", "r", shape=shape)
        return self.entries[start:]

    def warn(self, rows: int) -> None:
        if not self.warned:
            self.warned = True
            logger.warning("%s: %d damaged rows are ignored; their texts are encoded again", self.path, rows)


class _ShardReplacedError(Exception):
    """Raised when a mapped file was cleared, cut or replaced."""


class _Index:
    """Finds the rows of one encoder: sorted first eight bytes of all keys, and where each row lies.

    Eight bytes are enough to find a row, the whole key decides whether it is the one: two texts that share
    eight bytes cost a second encoding at most.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forget()

    def _forget(self) -> None:
        self.dimension: int | None = None
        self.shards: list[_Shard] = []
        self.known: dict[str, _Shard | None] = {}  # None: damaged, and said so
        self.prefixes = np.empty(0, np.uint64)
        self.places = np.empty(0, np.int64)

    def refresh(self) -> _Index:
        """Take in what this and other processes have appended since the last call."""
        try:
            with os.scandir(self.folder) as entries:
                files = {entry.name: entry.stat() for entry in entries}
        except OSError:  # nothing stored yet, not readable by this user, or cleared while it was listed
            files = {}
        try:
            if not self.known.keys() <= files.keys():
                raise _ShardReplacedError
            self._extend(files)
        except _ShardReplacedError:
            self._forget()
            self._extend(files)
        return self

    def _extend(self, files: dict[str, os.stat_result]) -> None:
        for name in sorted(files):
            if not name.endswith(".keys") or files[name].st_size < _HEADER.size:
                continue
            try:
                if name not in self.known:
                    self.known[name] = self._open(self.folder / name)
                shard = self.known[name]
                if shard is None:
                    continue
                entries = shard.extend(files[name], files.get(f"{name.removesuffix('.keys')}.vectors"))
            except OSError as error:  # cleared by another process a moment ago, or not readable by this user
                logger.debug("%s is passed over: %s", name, error)
                continue
            if len(entries):
                first = shard.number * _ROWS_PER_SHARD + shard.rows - len(entries)
                prefixes = _prefixes(entries["key"])
                order = np.argsort(prefixes, kind="stable")
                at = np.searchsorted(self.prefixes, prefixes[order])
                self.prefixes = np.insert(self.prefixes, at, prefixes[order])
                self.places = np.insert(self.places, at, first + order)

    def _open(self, path: Path) -> _Shard | None:
        """Open the shard whose keys are in `path`, or warn and return None if it is damaged."""
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        dimension = int.from_bytes(header[8:12], "little")
        if header != _header(dimension) or not 0 < dimension <= _MAX_DIMENSION:
            logger.warning("%s is damaged and ignored; its texts are encoded again", path)
            return None
        if dimension != (self.dimension or dimension):
            logger.warning("%s is ignored: rows of %d numbers, not %d", path, dimension, self.dimension)
            return None
        self.dimension = dimension
        self.shards.append(_Shard(path, len(self.shards), dimension))
        return self.shards[-1]

    def read(self, keys: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        self.refresh()
        found = np.zeros(len(keys), bool)
        if self.dimension is None:
            return None, found
        vectors = np.empty((len(keys), self.dimension), np.float32)
        for start in range(0, len(keys), _READ_AT_ONCE):
            part = slice(start, start + _READ_AT_ONCE)
            self._read(keys[part], vectors[part], found[part])
        return vectors, found

    def _read(self, keys: np.ndarray, vectors: np.ndarray, found: np.ndarray) -> None:
        """Fill in the vectors of the keys that are stored, and mark them found."""
        wanted = _prefixes(keys)
        pending = np.arange(len(keys))
        while len(pending):
            at = np.searchsorted(self.prefixes, wanted[pending])
            stored = at < len(self.prefixes)
            stored[stored] = self.prefixes[at[stored]] == wanted[pending[stored]]
            pending, at = pending[stored], at[stored]
            shards, rows = np.divmod(self.places[at], _ROWS_PER_SHARD)
            for number in np.unique(shards):
                shard, here = self.shards[number], np.flatnonzero(shards == number)
                values, entries = shard.vectors[rows[here]], shard.entries[rows[here]]
                whole = _checksums(entries["key"], values) == entries["checksum"]
                if not whole.all():
                    shard.warn(int(np.count_nonzero(~whole)))
                good = whole & (entries["key"] == keys[pending[here]]).all(1)
                vectors[pending[here[good]]] = values[good]
                found[pending[here[good]]] = True
            # A row that is damaged or another's is dropped, and the next one with this prefix is tried.
            bad = ~found[pending]
            self.prefixes = np.delete(self.prefixes, at[bad])
            self.places = np.delete(self.places, at[bad])
            pending = pending[bad]

    def distinct(self) -> int:
        return len(np.unique(self.prefixes))


def _header(dimension: int) -> bytes:
    return _HEADER.pack(_MAGIC, dimension, zlib.crc32(dimension.to_bytes(4, "little"), zlib.crc32(_MAGIC)))


def _prefixes(keys: np.ndarray) -> np.ndarray:
    """Return the first eight bytes of keys (N, 32) as (N,) uint64."""
    return np.ascontiguousarray(keys[:, :8]).view("<u8").ravel().astype(np.uint64, copy=False)


def _checksums(keys: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Compute the CRC-32 of each key and its vector, (N,) uint32."""
    keys = np.ascontiguousarray(keys)
    sums = [zlib.crc32(vector, zlib.crc32(key)) for key, vector in zip(keys, vectors, strict=True)]
    return np.array(sums, np.uint32)


def _append(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
    finally:
        os.close(file)
