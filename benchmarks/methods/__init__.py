"""What is measured: one module a family of methods, with ``make(config)``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from benchmarks.core.config import MethodConfig

__all__ = ["make_method"]


def make_method(config: MethodConfig) -> Any:
    """Make the method that a config names; what it must be able to do, the task says."""
    return import_module(f"benchmarks.methods.{config.family}").make(config)
