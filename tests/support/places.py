"""Where the repository is, and where data sets lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["ROOT", "data_path"]

ROOT = Path(__file__).resolve().parents[2]


def data_path(*parts: str) -> Path:
    """Return a file or folder of the data sets, below ``PFM_DATA``; skip the test where it is absent."""
    path = Path(os.environ.get("PFM_DATA") or ROOT.parent / "shared" / "data", *parts)
    if not path.exists():
        pytest.skip(f"there is no {path}: set PFM_DATA to the folder of the data sets")
    return path
