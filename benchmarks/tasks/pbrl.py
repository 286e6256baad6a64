"""Control: a frozen policy is refined on labelled pairs of action segments, and judged by what it then earns."""

from __future__ import annotations

from benchmarks.control.config import ControlConfig
from benchmarks.control.task import ControlTask

__all__ = ["load"]


def load(config: ControlConfig, seed: int) -> ControlTask:
    """Load the reference of a config; its pairs are collected when they are first needed."""
    return ControlTask.load(config, seed)
