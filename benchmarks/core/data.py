"""Where the data of the benchmarks lie, and how their files are read."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["MissingDataError", "data_folder", "read_csv", "read_jsonl"]

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


class MissingDataError(Exception):
    """Says in one line which data are absent and how to name the place where they are."""


def data_folder(name: str) -> Path:
    """Find the folder of one data set, below ``PFM_DATA`` or ``../shared/data`` beside the repository.

    Raises:
        MissingDataError: there is no such folder.
    """
    root = Path(os.environ.get("PFM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    folder = root / name
    if not folder.is_dir():
        raise MissingDataError(f"no benchmark data at {folder}: set PFM_DATA to the folder that holds {name}/")
    return folder


def read_jsonl(path: Path) -> list[Any]:
    """Read one JSON value a line; ``.gz`` and ``.xz`` are unpacked."""
    return [json.loads(line) for line in _lines(path)]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a comma-separated file with a header; ``.gz`` and ``.xz`` are unpacked."""
    return list(csv.DictReader(_lines(path)))


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise MissingDataError(f"no benchmark data at {path}: the file is missing from its folder")
    with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="") as file:
        yield from file
