"""Atomic file writes, locks against a second writer, and the folder of caches."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

__all__ = [
    "FileInUseError",
    "WriterLock",
    "cache_folder",
    "claim_folder",
    "replace_file",
    "replace_json",
    "require_files",
]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path`` and move into place, so that a failure leaves what was there.

    Raises:
        OSError: it cannot be written, as on a full disk; safetensors' own error becomes one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    except Exception as error:
        safetensors = sys.modules.get("safetensors")
        if safetensors is not None and isinstance(error, safetensors.SafetensorError):
            raise OSError(f"{path} was not written ({error})") from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def replace_json(path: Path, value: Any) -> None:
    """Write JSON to ``path`` as :func:`replace_file` does.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def claim_folder(folder: Path, name: str, settings: dict[str, Any], what: str) -> None:
    """Note in the file ``name`` what a folder is made with, or refuse one that was made with other settings.

    Raises:
        ValueError: it was; the message says ``what`` it holds and names the first setting that differs.
    """
    path = folder / name
    ours = json.loads(json.dumps(settings))
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(path, ours)
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ValueError(
                f"{folder} holds {what} with {key}={theirs.get(key)!r}, and this one has {value!r}: use another folder"
            )


def require_files(folder: Path, names: Sequence[str], writer: str) -> None:
    """Refuse a folder in which a file is missing, and name what writes such folders.

    Raises:
        FileNotFoundError: it is.
    """
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: give a folder written by {writer}")


def cache_folder(kind: str) -> Path:
    """Return the folder of a cache: the one that ``PFM_CACHE`` names, else ``pfm/KIND`` in the user's cache folder.

    A user without a home gets a folder that cannot be written, which makes a cache warn and step aside.
    """
    named = os.environ.get("PFM_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base, "pfm", kind)
    try:
        return Path.home() / ".cache" / "pfm" / kind
    except RuntimeError:
        return Path(os.devnull, "pfm")


NOTE = b'{"pid": '  # how a lock file begins while its lock is held


class FileInUseError(OSError):
    """Raised when another process writes to a file."""


def _command() -> str:
    """Name the program and its first argument; the others may hold keys."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return " ".join([name, *(word for word in sys.argv[1:2] if re.fullmatch(r"[a-z-]{1,20}", word))])


class WriterLock:
    """Lets one process at a time write to a file.

    The lock is the operating system's, on ``.NAME.lock`` beside the file, so that it ends with its process, however
    that ends. The lock file says who holds the lock; it stays when the lock is released, since removing it would
    let two processes lock two files of its name. Links and other spellings of a path share one lock.

    Args:
        path: the file, there or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        real = path.resolve()
        self.place = real.with_name(f".{real.name}.lock")
        self._lock: Any = None

    def acquire(self) -> Self:
        """Take the lock, and note who holds it.

        Raises:
            FileInUseError: another process, or another lock of this one, has it; the message says who.
            OSError: the lock file cannot be made.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.place)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise FileInUseError(
                f"{self.path} is being written by {self._holder()}: wait until that is done, or give another file"
            ) from None
        self._lock = lock
        held = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": _command(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        self._note(json.dumps(held))
        return self

    def release(self) -> None:
        """Return the lock back."""
        if self._lock is not None:
            self._note("")
            self._lock.release()
            self._lock = None

    def _note(self, text: str) -> None:
        from filelock import SoftFileLock

        try:
            with self.place.open("r+b") as file:
                # A lock by existence keeps notes of its own; any other content is not ours to replace.
                ours = file.read(len(NOTE)) in (b"", NOTE) and os.fstat(file.fileno()).st_nlink == 1
                if ours and not isinstance(self._lock, SoftFileLock):
                    file.seek(0)
                    file.write(text.encode())
                    file.truncate()
        except OSError:  # the lock holds without it, as on systems that let nobody write to a locked file
            return

    def _holder(self) -> str:
        try:
            with self.place.open("rb") as file:
                held = json.loads(file.read(10_000))
            pid, host, command, since = (str(held[name]) for name in ("pid", "host", "command", "since"))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "another process"
        return f"process {pid} on {host} ({command}) since {since}"
