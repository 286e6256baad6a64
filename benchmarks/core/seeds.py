"""A figure over the runs of several seeds: its values, their mean, and the interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.core.runs import Run

__all__ = ["figure_interval", "figure_values", "student_interval"]

_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def figure_values(runs: Sequence[Run], name: str) -> list[float]:
    """Return a figure's values over runs, without those where it is undefined."""
    found = [run.metrics["figures"].get(name) for run in runs]
    return [figure["value"] for figure in found if figure]


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of Student's 95% interval; infinity for a single value."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2:
        return float(found.mean()), math.inf
    t = _T95[min(len(found) - 2, len(_T95) - 1)]
    return float(found.mean()), t * float(found.std(ddof=1)) / math.sqrt(len(found))


def figure_interval(runs: Sequence[Run], name: str) -> tuple[float, float] | None:
    """Return a figure's mean and half of its 95% interval: over seeds, or of one seed over its draws.

    None where it is undefined for all.
    """
    values = figure_values(runs, name)
    if not values:
        return None
    mean, half = student_interval(values)
    if not math.isfinite(half):
        own = next(figure for run in runs if (figure := run.metrics["figures"].get(name)))
        half = (own["high"] - own["low"]) / 2
    return mean, half
