"""Summaries of preference pairs, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PairsSummary", "extremes", "quantiles"]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class PairsSummary:
    """Holds counts and quantiles of a set of pairs; prints as a table.

    ``chosen_words``, ``rejected_words`` and ``candidates`` (texts in a candidate set) are quantiles by name, empty
    where there is nothing to measure; ``chosen_longer`` is the share of rows whose chosen response has more
    words; ``weight`` and ``probability`` give minimum, mean and maximum, or None.
    """

    rows: int
    prompts: int
    responses: int
    without_prompt: int
    chosen_words: dict[str, float]
    rejected_words: dict[str, float]
    chosen_longer: float
    weight: dict[str, float] | None
    probability: dict[str, float] | None
    groups: int
    candidates: dict[str, float]
    extra: list[str]
    dropped: dict[str, int]
    layout: str = ""
    notes: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str]]:
        """Return (label, value) of everything worth showing."""
        optional: dict[str, str | int | dict[str, float] | None] = {
            "layout": self.layout,
            "rows without a prompt": self.without_prompt and f"{self.without_prompt:,}",
            "weight": self.weight and _spread(self.weight),
            "probability": self.probability and _spread(self.probability),
            "groups": self.groups and f"{self.groups:,}",
            "candidates a prompt": self.candidates and _middle(self.candidates),
            "other columns": ", ".join(self.extra),
            "dropped": ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.items()),
            "note": "; ".join(self.notes),
        }
        return [
            ("rows", f"{self.rows:,}"),
            ("prompts", f"{self.prompts:,}"),
            ("distinct responses", f"{self.responses:,}"),
            ("words of chosen", _middle(self.chosen_words)),
            ("words of rejected", _middle(self.rejected_words)),
            ("chosen is longer", f"{self.chosen_longer:.1%}"),
            *((label, str(value)) for label, value in optional.items() if value),
        ]

    def __str__(self) -> str:
        lines = self.lines()
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text as RichText

        table = Table("preference pairs", "", show_edge=False)
        for label, value in self.lines():
            table.add_row(label, RichText(value))
        return table


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Return some quantiles by name, or an empty dict without values."""
    if not len(values):
        return {}
    return {f"{q:.0%}": float(np.quantile(values, q)) for q in _QUANTILES}


def extremes(values: list[float] | None) -> dict[str, float] | None:
    """Return minimum, mean and maximum, or None without values."""
    if not values:
        return None
    return {"min": min(values), "mean": math.fsum(values) / len(values), "max": max(values)}


def _middle(values: dict[str, float]) -> str:
    if not values:
        return ""
    return f"median {values['50%']:,.4g}; 90% between {values['5%']:,.4g} and {values['95%']:,.4g}"


def _spread(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:,.4g}" for name, value in values.items())
