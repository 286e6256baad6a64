"""What takes long to make is made by one worker of a test run, and read by the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from pfm import PreferenceFlow
from pfm.devices import resolve_device

__all__ = ["made_once", "shared_flow"]


def made_once(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Give the folder ``name`` that ``make`` filled, here or in another worker; no test may change it."""
    root = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, partial = root / name, root / f"{name}.{os.getpid()}"
    with FileLock(root / f"{name}.lock"):
        if not folder.is_dir():
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


def shared_flow(temporary: pytest.TempPathFactory, name: str, fit: Callable[[], PreferenceFlow]) -> PreferenceFlow:
    """Fit a flow in one of the workers, and load it in all, onto the device that is tested."""
    folder = made_once(temporary, name, lambda folder: fit().save_pretrained(folder))
    return PreferenceFlow.from_pretrained(folder).to(resolve_device())
