"""Families held against each other at equal content, between their settings along straight lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from benchmarks.core.runs import Run
from benchmarks.core.seeds import student_interval
from benchmarks.core.tables import markdown_table
from benchmarks.text_autoencoder.moves import FAMILIES, encode_decode, family_of

__all__ = ["at_cosine", "equal_content"]

FLOW = "flow in a subspace"
RIVALS = tuple(family for family in FAMILIES if family not in (FLOW, "best of draws"))
COSINES = (0.8, 0.7, 0.6, 0.5, 0.4)


def at_cosine(run: Run, family: str, figure: str, cosine: float) -> float | None:
    """Return a family's figure where its curve first falls to a cosine, from encode and decode over all its settings.

    Args:
        run: of one seed. family: one of ``FAMILIES``. figure: "win" or "perplexity".
        cosine: mean of output and draft.

    Returns:
        the figure; None where the curve does not reach the cosine, or a setting has no such figure.
    """
    figures = run.metrics["figures"]
    names = [name.removesuffix(".cosine") for name in figures if name.endswith(".cosine")]
    curve = [encode_decode, *(name for name in names if family_of(name) == family)]
    pairs = [(figures[f"{name}.cosine"], figures.get(f"{name}.{figure}")) for name in curve]
    if any(value is None for pair in pairs for value in pair):
        return None
    points = [(float(x["value"]), float(y["value"])) for x, y in pairs]
    for (before, first), (after, second) in pairwise(points):
        if before >= cosine >= after and before > after:
            return first + (second - first) * (before - cosine) / (before - after)
    return None


def equal_content(runs: Sequence[Run]) -> list[str]:
    """Return two tables: the flow's lead in win rate, and its perplexity over that of the others, at equal cosines."""
    rated = all(f"{encode_decode}.perplexity" in run.metrics["figures"] for run in runs)
    wins = [
        "At equal cosines, along straight lines between settings: the win rate of the flow in a subspace, and its "
        "lead on the others, taken seed by seed.",
        "",
        *_table(runs, "win", lambda flow, other: flow - other),
    ]
    if not rated:
        return wins
    return [
        *wins,
        "",
        "Its perplexity, and what it is as a share of that of the others:",
        "",
        *_table(runs, "perplexity", lambda flow, other: flow / other),
    ]


def _table(runs: Sequence[Run], figure: str, compare: Callable[[float, float], float]) -> list[str]:
    rows = [["cosine", FLOW, *RIVALS]]
    for cosine in COSINES:
        own = [at_cosine(run, FLOW, figure, cosine) for run in runs]
        cells = [_cell([value for value in own if value is not None], len(runs), figure == "perplexity")]
        for rival in RIVALS:
            theirs = [at_cosine(run, rival, figure, cosine) for run in runs]
            both = [compare(a, b) for a, b in zip(own, theirs, strict=True) if a is not None and b is not None]
            cells.append(_cell(both, len(runs)))
        rows.append([f"{cosine:g}", *cells])
    return markdown_table(rows)


def _cell(values: Sequence[float], runs: int, whole: bool = False) -> str:
    """Show the mean over seeds and half of its interval; nothing where a seed has no such point."""
    if len(values) < runs:
        return "–"
    mean, half = student_interval(values)
    decimals = 0 if whole else 3
    told = f"{mean:.{decimals}f}" + (f" ± {half:.{decimals}f}" if np.isfinite(half) else "")
    return told.replace("-", "−")
