"""The paper's three experiments on one page: see :mod:`benchmarks.paper`."""

from __future__ import annotations

from benchmarks.paper.config import PaperConfig
from benchmarks.paper.task import Paper

__all__ = ["load"]


def load(config: PaperConfig, seed: int) -> Paper:
    """Make the task; the sweeps set the seeds."""
    return Paper(config)
