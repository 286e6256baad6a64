"""Models unpacked or distilled on this machine and kept in the folder of caches: count, measure, delete."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from pfm._internal.files import cache_folder

__all__ = ["UnpackedModels"]

logger = logging.getLogger(__name__)

# Kind of the cache, and the folders in it: whole ones, and what a process that was killed left behind.
_FOLDERS = {
    "models": re.compile(r"(smollm2-135m-instruct-[0-9a-f]{12})|\.(smollm2-135m-instruct-[0-9a-f]{12})\.partial"),
    "static": re.compile(r"(static-[0-9a-f]{16})|\.(static-[0-9a-f]{16})\.\d+\.partial"),
}
LOCK_SECONDS = 1.0


class UnpackedModels:
    """The unpacked weights of SmolLM2 and the tables of the static encoder; both are made again when they are needed.

    Only folders by the names that the package gives are counted and deleted: ``PFM_CACHE`` may name any folder.
    """

    @property
    def folders(self) -> list[Path]:
        """Where they are kept."""
        return list(dict.fromkeys(cache_folder(kind) for kind in _FOLDERS))

    def __len__(self) -> int:
        return len(self._found())

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for folder, _ in self._found() for file in folder.rglob("*") if file.is_file())

    def clear(self) -> None:
        """Delete them; one that another process is making is left alone, with a warning."""
        from filelock import FileLock, Timeout

        for folder, lock in self._found():
            try:
                with FileLock(lock, timeout=LOCK_SECONDS):
                    shutil.rmtree(folder)
            except Timeout:
                logger.warning("%s is being made by another process, and stays", folder)

    def _found(self) -> list[tuple[Path, Path]]:
        """List each folder with the file of its lock; links are not followed."""
        found: list[tuple[Path, Path]] = []
        for kind, pattern in _FOLDERS.items():
            parent = cache_folder(kind)
            for path in sorted(parent.iterdir()) if parent.is_dir() else []:
                name = pattern.fullmatch(path.name)
                if name and path.is_dir() and not path.is_symlink():
                    found.append((path, parent / f".{name[1] or name[2]}.lock"))
        return found
