"""Candidates of many prompts as flat arrays, and the scores of the picks of a method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pfm.data.conversations import conversation_text
from pfm.data.identity import PromptIdentity, prompt_identity
from pfm.evaluation.results import Calibration, Example, GroupRow, MethodRow, Scored
from pfm.statistics import (
    Array,
    Bootstrap,
    Estimate,
    binned,
    length_controlled,
    pairwise_agreement,
    reliability,
    win_share,
    win_share_among,
)

__all__ = ["COMPUTED", "LABELS", "Candidates", "by_group", "calibrate", "measure", "pick_examples"]

LABELS = {
    "identity": "Original, unchanged",
    "random": "Random candidate",
    "longest": "Longest candidate",
    "mean_shift": "Mean shift",
    "bradley_terry": "Bradley–Terry best-of-n",
    "pfm": "Preference flow",
    "oracle": "Oracle best-of-n",
}

COMPUTED = ("random", "longest", "oracle")  # baselines that need the scores and the texts alone


class Candidates:
    """All candidates of all prompts as flat arrays (M,); a method is a weight on each, 1 in all a prompt."""

    def __init__(self, rows: Sequence[Scored]):
        self.rows = rows
        #: (n,) the number of each row's prompt: rows of one prompt are resampled, and tested, together
        self.unit = _prompt_numbers(rows)
        sizes = np.array([len(row.candidates) for row in rows])
        self.size = sizes
        self.owner = np.repeat(np.arange(len(rows)), sizes)
        self.start = np.cumsum(sizes) - sizes
        self.original = self.start + np.array([row.original for row in rows])
        self.score = np.concatenate([row.scores for row in rows])
        #: (n,) where all candidates have the same score: rounding aside, nothing can be chosen there
        self.flat = np.array([np.ptp(row.scores) == 0 for row in rows])
        self.length = np.array([len(text) for row in rows for text in row.candidates], dtype=np.float64)
        self.changed = np.array(
            [float(text != row.candidates[row.original]) for row in rows for text in row.candidates]
        )
        # a text cannot win against itself, whatever a noisy judge says
        self.win = np.where(self.changed, win_share(self.score, self.score[self.original][self.owner]), 0.5)
        self.gap = self.length - self.length[self.original][self.owner]
        self.length_ratio = self.length / np.maximum(self.length[self.original], 1.0)[self.owner]
        self.has_independent = np.array([row.independent is not None for row in rows])
        draws = np.array([0.0 if row.independent is None else row.independent for row in rows])
        self.win_independent = win_share(self.score, draws[self.owner])

    def weights(self, method: str) -> Array:
        """Return the probability (M,) with which a method picks each candidate."""
        if method == "random":
            return (1.0 / self.size)[self.owner]
        if method == "identity":
            index = self.original
        elif method == "longest":
            index = self._best(self.length)
        elif method == "oracle":
            index = self._best(self.score)
        else:
            index = self.start + np.array([row.picks[method] for row in self.rows])
        weights = np.zeros(self.owner.size)
        weights[index] = 1.0
        return weights

    def mean(self, weights: Array, values: Array) -> Array:
        """Return a method's expected value for each prompt: (M,), (M,) -> (n,)."""
        return np.add.reduceat(weights * values, self.start)

    def bootstrap(self, resamples: int, seed: int) -> Bootstrap:
        """Return resamples of the prompts."""
        return Bootstrap(len(self.rows), resamples, seed, self.unit)

    @property
    def prompts(self) -> int:
        """Count the different prompts."""
        return int(self.unit.max()) + 1

    def by_prompt(self, values: Array) -> Array:
        """Average values (n,) over the rows of each prompt."""
        return np.bincount(self.unit, values) / np.bincount(self.unit)

    def _best(self, values: Array) -> NDArray[np.int64]:
        """Index the highest value of each prompt: the original among equals, else the first."""
        best = np.maximum.reduceat(values, self.start)
        is_best = values == best[self.owner]
        first = np.array([s + np.argmax(is_best[s : s + n]) for s, n in zip(self.start, self.size, strict=True)])
        return np.where(is_best[self.original], self.original, first)


def _prompt_numbers(rows: Sequence[Scored]) -> NDArray[np.int64]:
    """Number the prompts of rows; a row without a prompt is one of its own."""
    numbers: dict[PromptIdentity, int] = {}
    found = []
    for place, row in enumerate(rows):
        text = conversation_text(row.prompt) if isinstance(row.prompt, str | list) else ""
        found.append(numbers.setdefault(prompt_identity(text, place), len(numbers)))
    return np.array(found)


def measure(name: str, table: Candidates, method: str, bootstrap: Bootstrap) -> MethodRow:
    """Measure one method against the original, the oracle and the method under test."""
    weights = table.weights(name)
    score = table.mean(weights, table.score)
    base, best, tested = (table.mean(table.weights(other), table.score) for other in ("identity", "oracle", method))
    against = table.has_independent.astype(np.float64)
    random = table.mean(table.weights("random"), table.score)
    gain, gap = best - base, np.where(table.flat, 0.0, best - random)
    return MethodRow(
        name=name,
        label=LABELS.get(name, name),
        score=bootstrap.mean(score),
        difference=bootstrap.mean(tested - score),
        win=_win_rate(table, weights, bootstrap),
        win_controlled=length_controlled(
            table.win, table.gap, bootstrap, owner=table.owner, weight=weights, changed=table.changed
        ),
        win_independent=bootstrap.share(against * table.mean(weights, table.win_independent), against),
        changed=bootstrap.mean(table.mean(weights, table.changed), (0.0, 1.0)),
        length_ratio=bootstrap.mean(table.mean(weights, table.length_ratio)),
        oracle_share=bootstrap.ratio(score - base, gain) if gain.any() else None,
        gap_closed=bootstrap.ratio(np.where(table.flat, 0.0, score - random), gap) if gap.any() else None,
    )


def _win_rate(table: Candidates, weights: Array, bootstrap: Bootstrap) -> Estimate:
    wins = table.mean(weights, table.win)
    estimate = bootstrap.share(wins, np.ones_like(wins))
    assert estimate is not None  # scores are finite
    return estimate


def _agreement(rows: Sequence[Scored], bootstrap: Bootstrap) -> Estimate | None:
    counts = [
        (0.0, 0) if row.probabilities is None else pairwise_agreement(row.probabilities, row.scores) for row in rows
    ]
    right, pairs = np.array(counts, dtype=np.float64).T
    return bootstrap.share(right, pairs)


def calibrate(rows: Sequence[Scored], bootstrap: Bootstrap) -> Calibration | None:
    """Compare b with the shares of wins among candidates; None where no row has b and several candidates."""
    used = [
        (number, row.probabilities, row)
        for number, row in enumerate(rows)
        if row.probabilities is not None and len(row.candidates) > 1
    ]
    if not used:
        return None
    probability = np.concatenate([b for _, b, _ in used])
    outcome = np.concatenate([win_share_among(row.scores) for _, _, row in used])
    owner = np.repeat([number for number, _, _ in used], [len(row.candidates) for _, _, row in used])
    rises, wins, owners = [], [], []
    for number, b, row in used:
        others = np.array([text != row.candidates[row.original] for text in row.candidates])
        b, scores = np.asarray(b), np.asarray(row.scores)
        rises.append((b - b[row.original])[others])
        wins.append(win_share(scores, scores[row.original])[others])
        owners.append(np.full(int(others.sum()), number))
    gaps = []
    if sum(map(len, rises)):
        gaps = binned(np.concatenate(rises), np.concatenate(wins), np.concatenate(owners), bootstrap, bins=8)
    return Calibration(
        reliability=reliability(probability, outcome, owner, bootstrap),
        accuracy=_agreement(rows, bootstrap),
        gaps=gaps,
        prompts=len(used),
    )


def by_group(rows: Sequence[Scored], method: str, resamples: int, seed: int) -> list[GroupRow]:
    """Measure the method under test within each group of prompts."""
    members: dict[str, list[Scored]] = {}
    for row in rows:
        if row.group is not None:
            members.setdefault(row.group, []).append(row)
    result = []
    for name in sorted(members):
        part = members[name]
        table = Candidates(part)
        bootstrap, weights = table.bootstrap(resamples, seed), table.weights(method)
        gain = table.mean(weights, table.score) - table.score[table.original]
        result.append(
            GroupRow(
                name=name,
                prompts=table.prompts,
                win=_win_rate(table, weights, bootstrap),
                gain=bootstrap.mean(gain),
                accuracy=_agreement(part, bootstrap),
            )
        )
    return result


def pick_examples(rows: Sequence[Scored], method: str, count: int, seed: int) -> list[Example]:
    """Draw examples at random among the changed prompts, and add the largest loss if there is one."""
    changed = [row for row in rows if row.changed(method)]
    order = np.random.default_rng(seed).permutation(len(changed))
    gains = [float(row.scores[row.picks[method]] - row.scores[row.original]) for row in changed]
    worst = int(np.argmin(gains)) if gains and min(gains) < 0 else None
    chosen = [(int(i), "random") for i in order if i != worst][: max(0, count - (worst is not None))]
    if worst is not None and count > 0:
        chosen.append((worst, "largest loss"))
    return [_example(changed[i], method, kind) for i, kind in chosen]


def _example(row: Scored, method: str, kind: str) -> Example:
    old, new, b = row.original, row.picks[method], row.probabilities
    return Example(
        prompt=conversation_text(row.prompt),
        original=row.candidates[old],
        refined=row.candidates[new],
        original_score=float(row.scores[old]),
        refined_score=float(row.scores[new]),
        original_probability=None if b is None else float(b[old]),
        refined_probability=None if b is None else float(b[new]),
        kind=kind,
    )
