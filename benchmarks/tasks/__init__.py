"""What is measured on: one module a task, with ``load(config, seed)``; variants of a task share its module."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.config import TaskConfig

__all__ = ["Task", "load_task"]


class Task(Protocol):
    """Data that a method can be run on."""

    def run(self, method: object, bench: Bench) -> Outcome:
        """Fit and measure a method; TypeError if it is of a kind that the task has no use for."""
        ...


class _Module(Protocol):
    """A module of this package."""

    def load(self, config: Any, seed: int, /) -> Task: ...


def load_task(config: TaskConfig, seed: int) -> Task:
    """Load the task that a config names: the module, and after a hyphen what variant of it.

    Raises:
        MissingDataError: its data are absent.
    """
    module = import_module(f"benchmarks.tasks.{config.name.partition('-')[0]}")
    return cast(_Module, module).load(config, seed)
