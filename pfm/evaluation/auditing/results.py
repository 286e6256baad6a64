"""What an audit finds: a row a method, paired differences, and a finding in words for each selector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pfm.evaluation.results import named_row
from pfm.statistics import Estimate

__all__ = ["AuditResults", "AuditRow", "Difference", "Finding"]


@dataclass(frozen=True)
class Difference:
    """The mean score of a selector minus that of a row, over the same prompts.

    ``p_value`` is two-sided, of :func:`pfm._internal.significance.confirmed` on the prompts' differences.
    """

    selector: str
    value: Estimate
    p_value: float

    @property
    def sign(self) -> int:
        """Return 1 where the selector is ahead, -1 where it is behind, 0 where the two cannot be told apart."""
        if self.p_value >= 0.05 or self.value.low <= 0 <= self.value.high:
            return 0
        return 1 if self.value.value > 0 else -1


@dataclass(frozen=True)
class AuditRow:
    """What one method reached; every interval resamples the same prompts.

    Attributes:
        kind: "selector", "rule" (needs no learning), "fitted" (on the scores of other prompts), "control" or "bound".
        score: mean judge score of its picks.
        gap_closed: share of the gap from a random candidate to the oracle; None where there is no gap.
        win: share of the other candidates of its prompt that a pick beats, ties half; None without any.
        win_controlled: the same at equal length; None without lengths, or where length and method cannot be told apart.
        length_ratio: length of the pick / mean length of its prompt's candidates; None without lengths.
        differences: of each selector from this row.
    """

    name: str
    label: str
    kind: str
    score: Estimate
    gap_closed: Estimate | None
    win: Estimate | None
    win_controlled: Estimate | None
    length_ratio: Estimate | None
    differences: list[Difference]

    def difference(self, selector: str) -> Difference:
        """Return how far a selector is ahead of this row."""
        return next(each for each in self.differences if each.selector == selector)


@dataclass(frozen=True)
class Finding:
    """One selector in words.

    ``outcome`` is "ahead" (of every simple rule), "behind" (one of them), "indistinguishable" (from one of them) or
    "nothing to choose" (the judge scores the candidates of every prompt alike).
    """

    selector: str
    outcome: str
    headline: str
    sentences: list[str]


@dataclass
class AuditResults:
    """Hold all that an audit shows; :class:`pfm.evaluation.Audit` makes, draws and saves it.

    Attributes:
        findings: one a selector, in the order asked for.
        rows: selectors first, then simple rules, fitted baselines, the control and the oracle.
        warnings: one sentence for each reason to distrust the figures.
        settings: how the figures were measured (JSON values).
    """

    findings: list[Finding]
    rows: list[AuditRow]
    warnings: list[str]
    settings: dict[str, Any]

    def row(self, name: str) -> AuditRow:
        """Return the row of a method by name.

        Raises:
            KeyError: the audit has no such method.
        """
        return named_row(self.rows, name, "audit")
