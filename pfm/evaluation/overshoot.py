"""When choosing overshoots: with more candidates b rises on, but the true score may fall.

The highest of n noisy b is more and more the candidate at which b errs most (Goodhart; Gao et al. 2023, arXiv
2210.10760). :func:`choose_selection` chooses between two remedies on validation data: fewer candidates, and a draw in
proportion to b^strength (``by="sample"``), which spreads the bet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pfm._internal.checks import check_seed
from pfm.statistics import Bootstrap, Estimate

__all__ = ["Selecting", "best_of_curve", "choose_selection", "past_its_best"]

Array = NDArray[np.float64]

SIZES = (1, 2, 4, 8, 16, 32, 64)
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.inf)
LEAST_PROMPTS = 20  # below, a falling curve is not told from chance


def best_of_curve(probabilities: ArrayLike, scores: ArrayLike) -> Array:
    """Return the expected score of the best by b of k of m candidates, for k = 1..m, exactly.

    Of all subsets of k candidates the one of rank i by b (0 the highest) is the best in the share
    C(m - 1 - i, k - 1) / C(m, k). Candidates of equal b share their ranks.

    Args:
        probabilities: (m,) b of each candidate. scores: (m,) of each.

    Returns:
        (m,) expected scores.

    >>> best_of_curve([0.9, 0.5, 0.1], [3.0, 0.0, 0.0]).tolist()
    [1.0, 2.0, 3.0]
    """
    b, score = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (probabilities, scores))
    if len(b) != len(score) or not len(b):
        raise ValueError(f"probabilities and scores must be equally many, at least one: got {len(b)} and {len(score)}")
    for value in np.unique(b):
        score = np.where(b == value, score[b == value].mean(), score)
    ordered, m = score[np.argsort(-b, kind="stable")], len(b)
    weights = np.zeros((m, m))  # of rank i among subsets of k + 1
    for k in range(1, m + 1):
        share = k / m
        for i in range(m - k + 1):
            weights[k - 1, i] = share
            if i < m - k:
                share *= (m - k - i) / (m - 1 - i)
    return weights @ ordered


@dataclass(frozen=True)
class Selecting:
    """How to choose among candidates, found on validation data.

    Attributes:
        n: candidates. strength: exponent of b in ``by="sample"``; infinity for best of n.
        score: mean score, on prompts left out in turn of the choice of n and strength.
        gain: its difference from best of the most candidates, on the same prompts.
    """

    n: int
    strength: float
    score: Estimate
    gain: Estimate

    @property
    def options(self) -> dict[str, object]:
        """Return the options for :func:`pfm.wrap`: best of n, or a draw in proportion to b^strength."""
        if math.isinf(self.strength):
            return {"n": self.n}
        return {"n": self.n, "by": "sample", "strength": self.strength}


def choose_selection(
    probabilities: Sequence[ArrayLike],
    scores: Sequence[ArrayLike],
    *,
    sizes: Sequence[int] = SIZES,
    strengths: Sequence[float] = STRENGTHS,
    replays: int = 100,
    seed: int = 0,
) -> Selecting:
    """Choose the number of candidates and the strength of soft selection on validation prompts.

    Every combination is scored on random subsets of each prompt's candidates; the best mean wins, of equal ones the
    fewest candidates. Its own figures are of prompts left out of the choice (two halves, in turn).

    Args:
        probabilities: for each prompt b (m,) of its candidates. scores: (m,) of each, higher is better.
        sizes: numbers of candidates to try, cut to those that every prompt has. strengths: exponents to try.
        replays: subsets of each prompt and number. seed: of them.

    Raises:
        ValueError: fewer than two prompts, unequal lengths, or a size or strength out of range.
    """
    seed = check_seed(seed)
    if len(probabilities) != len(scores) or len(scores) < 2:
        raise ValueError(f"needs two prompts or more with as many scores: got {len(probabilities)} and {len(scores)}")
    if not sizes or min(sizes) < 1 or not strengths or not min(strengths) >= 0:
        raise ValueError(f"sizes must be at least 1 and strengths at least 0: got {list(sizes)} and {list(strengths)}")
    pools = []
    for row, (b, score) in enumerate(zip(probabilities, scores, strict=True)):
        values, found = (np.asarray(column, dtype=np.float64).reshape(-1) for column in (b, score))
        if len(values) != len(found) or not len(values) or not (np.isfinite(values).all() and np.isfinite(found).all()):
            raise ValueError(f"prompt {row}: b and scores must be finite, one each a candidate, at least one")
        pools.append((values, found))
    least = min(len(values) for values, _ in pools)
    usable = sorted({min(size, least) for size in sizes})
    table = np.array(
        [
            [_soft_scores(pool[0], pool[1], size, strengths, replays, (seed, row)) for size in usable]
            for row, pool in enumerate(pools)
        ]
    )  # (P, sizes, strengths)
    half = np.random.default_rng(seed).permutation(len(pools)) % 2
    chosen = np.array([table[row][_best(table[half != half[row]])] for row in range(len(pools))])
    sharpest = int(np.argmax(strengths))
    bootstrap = Bootstrap(len(pools))
    place, strength = _best(table)
    return Selecting(
        usable[place],
        float(strengths[strength]),
        bootstrap.mean(chosen),
        bootstrap.mean(chosen - table[:, -1, sharpest]),
    )


def past_its_best(probabilities: Sequence[ArrayLike], scores: Sequence[ArrayLike]) -> tuple[int, Estimate] | None:
    """Return the number of candidates that scores confirm as better than all of them, and by how much; else None.

    The number is chosen on one half of the prompts and measured on the other, in turn; it is believed where the
    interval of the gain is above 0.

    Args:
        probabilities: for each prompt b (m,) of its candidates. scores: (m,) of each.
    """
    if len(scores) < LEAST_PROMPTS:
        return None
    curves = [best_of_curve(b, score) for b, score in zip(probabilities, scores, strict=True)]
    most = max(map(len, curves))
    if most < 3:
        return None
    # A prompt with fewer candidates stays where it ends.
    table = np.array([np.pad(curve, (0, most - len(curve)), mode="edge") for curve in curves])
    half = np.random.default_rng(0).permutation(len(curves)) % 2
    places = [int(table[half != side].mean(0).argmax()) for side in (0, 1)]
    gain = Bootstrap(len(curves)).mean(table[np.arange(len(curves)), np.take(places, half)] - table[:, -1])
    best = int(table.mean(0).argmax()) + 1
    return (best, gain) if gain.low > 0 and best < most else None


def _soft_scores(
    b: Array, scores: Array, size: int, strengths: Sequence[float], replays: int, seed: tuple[int, int]
) -> Array:
    """Return the mean score of a draw in proportion to b^strength among ``size`` random candidates."""
    count = 1 if size == len(b) else replays
    places = np.argsort(np.random.default_rng(seed).random((count, len(b))), axis=1)[:, :size]
    log_b, found = np.log(np.maximum(b[places], 1e-12)), scores[places]
    log_b = log_b - log_b.max(axis=1, keepdims=True)
    result = []
    for strength in strengths:
        weights = (log_b == 0).astype(np.float64) if math.isinf(strength) else np.exp(strength * log_b)
        result.append(((weights * found).sum(1) / weights.sum(1)).mean())
    return np.array(result)


def _best(table: Array) -> tuple[int, int]:
    mean = table.mean(0)
    place, strength = np.unravel_index(int(np.argmax(mean)), mean.shape)
    return int(place), int(strength)
