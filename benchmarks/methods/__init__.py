"""What is measured: one module a family of methods, with ``make(config)``."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

from benchmarks.core.config import MethodConfig

__all__ = ["make_method"]


class _Family(Protocol):
    """A module of this package."""

    def make(self, config: Any, /) -> Any: ...


def make_method(config: MethodConfig) -> Any:
    """Make the method that a config names.

    What it must be able to do, the protocols of the kinds of tasks say: ``Chooser`` (selection), ``Comparer``
    (comparisons), ``Mover`` (laws; images), ``ControlMethod`` (control), and ``Acquirer`` (labels asked for).
    """
    return cast(_Family, import_module(f"benchmarks.methods.{config.family}")).make(config)
