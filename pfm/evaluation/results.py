"""Measurements of refined outputs: judged candidates, a row a method, calibration, the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pfm.statistics import Bin, Estimate, Reliability

__all__ = ["Calibration", "Example", "Failure", "GroupRow", "MethodRow", "Prompt", "Results", "Scored", "Verdict"]

Prompt = str | list[dict[str, Any]]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=_Named)


def named_row(rows: Sequence[R], name: str, owner: str) -> R:
    """Return the row of a method by name; ``owner`` says in the error what has none.

    Raises:
        KeyError: there is no such row.
    """
    for row in rows:
        if row.name == name:
            return row
    raise KeyError(f"no method {name!r}: this {owner} has {', '.join(row.name for row in rows)}")


@dataclass
class Scored:
    """The judged candidates of one prompt, and which of them each method picks.

    Attributes:
        prompt: text or chat messages.
        candidates: n >= 1 texts.
        scores: (n,) the judge's score of each candidate, finite, higher is better.
        picks: method -> index into candidates.
        original: index of the output that an unrefined generator would have given.
        probabilities: (n,) win probability b of each candidate, 0 to 1, or None.
        independent: the judge's score of a further draw of the same generator that no method could pick, or
            None.
        group: name of the prompt's group, or None.
    """

    prompt: Prompt
    candidates: list[str]
    scores: NDArray[np.float64] | Sequence[float]
    picks: dict[str, int]
    original: int = 0
    probabilities: NDArray[np.float64] | Sequence[float] | None = None
    independent: float | None = None
    group: str | None = None

    def changed(self, method: str) -> bool:
        """Return whether a method's pick reads differently from the original."""
        return self.candidates[self.picks[method]] != self.candidates[self.original]


@dataclass(frozen=True)
class MethodRow:
    """Holds the results of one method; every interval resamples the same prompts.

    Attributes:
        score: mean judge score.
        difference: mean judge score of the method under test minus this method's.
        win: share of prompts won against the original, ties half.
        win_controlled: the same at equal length; None when the effects of length and method cannot be separated.
        win_independent: share won against an independent draw; None without independent draws.
        changed: share of prompts whose text differs from the original.
        length_ratio: mean of (length of the pick / length of the original), in characters.
        oracle_share: share of the oracle's gain in mean score over the original; None when the oracle gains
            nothing.
        gap_closed: share of the gap in mean score from a random candidate to the oracle; None where there is none.
    """

    name: str
    label: str
    score: Estimate
    difference: Estimate
    win: Estimate
    win_controlled: Estimate | None
    win_independent: Estimate | None
    changed: Estimate
    length_ratio: Estimate
    oracle_share: Estimate | None
    gap_closed: Estimate | None = None


@dataclass(frozen=True)
class Calibration:
    """Calibration of the win probabilities b.

    The outcome of a candidate is the share of the other candidates of its prompt that it beats, ties half:
    what b predicts.

    Attributes:
        reliability: ECE, its noise floor, slope, and the bins of the reliability plot.
        accuracy: share of candidate pairs with different judge scores that b orders as the judge does; None
            without any.
        gaps: share of candidates that beat the original, by how much higher their b is.
        prompts: prompts with probabilities and at least two candidates.
    """

    reliability: Reliability
    accuracy: Estimate | None
    gaps: list[Bin]
    prompts: int

    @property
    def sentence(self) -> str:
        """Summarise the calibration of b in one sentence."""
        r = self.reliability
        plain = "" if r.measured_ece is None else f" without noise; measured {r.measured_ece:.3f}"
        measured = (
            f"ECE {r.ece.text()}{plain}, where a perfectly calibrated predictor would show {r.noise_floor:.3f} "
            f"(95% of the time below {r.noise_ceiling:.3f})"
        )
        if r.within_noise:
            return f"The win probabilities are calibrated as far as these data can tell: {measured}."
        if r.slope and r.slope.high < 0:
            return f"The win probabilities point the wrong way: {measured}; slope {r.slope.text()}."
        if r.slope and r.slope.high < 1:
            return f"The win probabilities are overconfident: {measured}; slope {r.slope.text()}."
        if r.slope and r.slope.low > 1:
            return f"The win probabilities are underconfident: {measured}; slope {r.slope.text()}."
        return f"The win probabilities are off: {measured}."


@dataclass(frozen=True)
class GroupRow:
    """Holds the results of the method under test on one group; ``gain`` is its mean score minus the original's."""

    name: str
    prompts: int
    win: Estimate
    gain: Estimate
    accuracy: Estimate | None


@dataclass(frozen=True)
class Verdict:
    """The answer in words.

    ``outcome`` is "helps", "hurts", "mixed" or "no evidence"; ``headline`` says it in a few words and
    ``sentences`` give the figures: against the original, beside the strongest baseline, at equal length. Wins,
    losses and ties count prompts against the original; ``p_value`` is the exact two-sided sign test on them.
    """

    outcome: str
    headline: str
    sentences: list[str]
    warnings: list[str]
    wins: int
    losses: int
    ties: int
    p_value: float

    @property
    def text(self) -> str:
        """Join headline and sentences."""
        return f"{self.headline}. {' '.join(self.sentences)}"


@dataclass(frozen=True)
class Failure:
    """A prompt whose refinement reported an error; ``evaluated`` when it still left candidates to judge."""

    prompt: int
    error: str
    evaluated: bool


@dataclass(frozen=True)
class Example:
    """A prompt before and after; ``kind`` says how it was chosen: "random" or "largest loss"."""

    prompt: str
    original: str
    refined: str
    original_score: float
    refined_score: float
    original_probability: float | None
    refined_probability: float | None
    kind: str


@dataclass
class Results:
    """Hold all that a report card shows; :class:`pfm.Report` makes, draws and saves it.

    Attributes:
        rows: what each method reached, the original first.
        verdict: the answer in words.
        calibration: how far the win probabilities can be believed; None without any.
        groups: what the method under test reached on each group of prompts.
        failures: prompts whose refinement reported an error.
        settings: how the figures were measured (JSON values).
        examples: prompts before and after.
    """

    rows: list[MethodRow]
    verdict: Verdict
    calibration: Calibration | None
    groups: list[GroupRow]
    failures: list[Failure]
    settings: dict[str, Any]
    examples: list[Example] = field(default_factory=list[Example])

    def row(self, name: str) -> MethodRow:
        """Return the row of a method by name.

        Raises:
            KeyError: the report has no such method.
        """
        return named_row(self.rows, name, "report")
